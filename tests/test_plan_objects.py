"""Plans as objects: equality, copies, files, pictures, memory, time."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from pydiffuse import plans
from pydiffuse.plans import TilePlan
from pydiffuse.plans.combine import _per_head, _union
from pydiffuse.plans.files import _coded, _packed
from pydiffuse.plans.joint import _joint
from pydiffuse.plans.patterns import _block_causal, _frames, _local
from pydiffuse.plans.plan import _GIVEN, make_plan
from pydiffuse.plans.sliding import _sliding_tile
from tests.cases.plans import EXAMPLES, KINDS, check_sense
from tests.helpers import check_refused


def test_every_constructor_has_an_example():
    others = {"TilePlan", "search", "SearchResult", "LayerChoice", "causal"}  # which is a `local`
    assert {*KINDS} | others >= set(plans.__all__)
    assert set(KINDS) <= set(plans.__all__)


def same(a: TilePlan, b: TilePlan) -> bool:
    tensors = zip(a.tensors, b.tensors, strict=True)
    return (
        a == b
        and hash(a) == hash(b)
        and all((x is None and y is None) or torch.equal(x, y) for x, y in tensors)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_give_the_same_object(kind):
    plan = EXAMPLES[kind]()
    assert EXAMPLES[kind]() is plan
    assert plan == plan.to("cpu") and hash(plan) == hash(plan.to("cpu"))
    others = [EXAMPLES[other]() for other in KINDS if other != kind]
    assert plan not in others
    assert plan.name == kind and plan.name in repr(plan)


@pytest.mark.parametrize("kind", KINDS)
def test_transpose(kind):
    plan = EXAMPLES[kind]()
    turned = plan.transpose()
    check_sense(turned, plan.to_dense().transpose(1, 2))
    assert turned.transpose() is plan and plan.transpose() is turned and turned != plan
    assert (turned.q_length, turned.k_length) == (plan.k_length, plan.q_length)
    assert "transposed=True" in repr(turned)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind, tmp_path):
    for plan in (EXAMPLES[kind](), EXAMPLES[kind]().transpose()):
        for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
            assert other is plan
        plan.save(tmp_path / "plan.json")
        assert TilePlan.load(tmp_path / "plan.json") is plan


def test_what_is_loaded_where_no_plan_is(tmp_path):
    """In another process: the plans have to be made anew."""
    mask = torch.rand(2, 40, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    path = tmp_path / "plan.json"
    plan = plans.from_mask(mask, 16, 10)
    data = pickle.dumps(plan)
    plan.save(path)
    name, parameters, tensors = plan.name, plan.parameters, plan.tensors
    _GIVEN.clear()
    for found in (TilePlan.load(path), pickle.loads(data)):
        _GIVEN.clear()
        assert found is not plan and same(found, plan)
        assert (found.name, found.parameters) == (name, parameters)
        assert len(found.tensors) == len(tensors)
        check_sense(found, mask)
    order = np.random.default_rng(0).permutation(12)
    own = make_plan("mine", [("x", (1, 2))], [5, 7], [5, 7], plans.frames(2, 6, 1).rows, order)
    assert same(pickle.loads(pickle.dumps(own)), own)
    check_refused(lambda: own.save(path), ValueError, ["'mine'", "neither a closed form"])


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "plan.json"
    given = EXAMPLES["from_mask"]()
    given.save(path)
    good = json.loads(path.read_text())

    def refused(words, change=lambda content: None, text=None):
        content = copy.deepcopy(good)
        change(content)
        path.write_text(json.dumps(content) if text is None else text)
        check_refused(lambda: TilePlan.load(path), ValueError, ["plan.json", *words])

    def arrays(**changed):
        return lambda content: content["plan"]["arrays"].update(changed)

    refused(["not JSON"], text="{")
    refused(["format None", "pydiffuse.plan"], text="{}")
    refused(["format None"], text="[]")
    refused(["format 'other'"], lambda c: c.update(format="other"))
    refused(["version 2", "reads 1"], lambda c: c.update(version=2))
    refused(["holds no plan"], lambda c: c.pop("plan"))
    refused(["holds no plan"], lambda c: c.update(plan=[1]))
    refused(["damaged", "digest"], lambda c: c["plan"]["parameters"].update(digest="0"))
    refused(["damaged"], arrays(bits=_coded(bytes(len(given.rows.bits) * 2 - 1) + b"\x80")))
    refused(["does not unpack"], arrays(tiles="AAAA"))
    refused(["holds no plan"], arrays(tiles="not base64!"))
    refused(["boundaries ascend"], arrays(k_bounds=_packed(np.array([0, 3, 3, 7]))))
    refused(["tiles are tiles of keys"], arrays(tiles=_packed(given.rows.tiles + 9)))
    refused(["tiles of a row ascend"], arrays(tiles=_packed(given.rows.tiles[::-1].copy())))
    refused(["masks are masks"], arrays(masks=_packed(given.rows.masks + 99)))
    refused(["rows hold all tiles"], arrays(tiles=_packed(given.rows.tiles[:-1])))
    refused(["masks are as large"], arrays(masks=_packed(np.full_like(given.rows.masks, 0))))
    refused(["holds no plan"], arrays(heads=0, starts=_packed(np.zeros(0))))
    refused(["holds no plan"], arrays(q_bounds=_packed(np.zeros(0))))
    refused(["permutation"], arrays(order=_packed(np.array([0, 0, 1]))))
    refused(["closed form", "'mine' of x"], lambda c: c["plan"].update(name="mine", parameters={"x": 1}))
    refused(["'from_mask' of no parameters"], lambda c: c["plan"].update(parameters={}))
    refused(["holds no plan"], arrays(heads=2**70))
    for shape in (
        [2**40, 4],
        [4, 2**40],
        [2**70, 1],
        [-1, -8],
        [0, 4],
        [1.0, 4],
        [True, 4],
        ["4", 4],
        [4],
    ):
        refused(
            ["holds no plan"], arrays(shapes=[shape, *map(list, (b.shape for b in given.rows.bits[1:]))])
        )
    for name in (None, 3, 2.5, True, ["from_mask"], {}):
        refused(["its name is"], lambda c, name=name: c["plan"].update(name=name))
    bomb = base64.b64encode(zlib.compress(bytes(2**25), 9)).decode()
    for array in ("starts", "tiles", "masks", "bits"):
        change = arrays(**{array: bomb})
        _, peak = peak_bytes(lambda change=change: refused(["more than"], change))
        assert peak < 2**22
    refused(["ends early"], arrays(tiles=base64.b64encode(zlib.compress(bytes(64))[:-6]).decode()))
    deep = "[" * 100_000
    refused(["not JSON"], text=deep)
    turned = "{" + '"transposed": {' * 900 + "}" * 901
    refused(["holds no plan"], text=f'{{"format": "pydiffuse.plan", "version": 1, "plan": {turned}}}')
    refused(["not JSON", "NaN"], text='{"format": NaN}')
    foreign = good["plan"]["arrays"]
    plans.frames(4, 9, 2).save(path)
    good = json.loads(path.read_text())
    refused(["'frames'", "with arrays"], lambda c: c["plan"].update(arrays=foreign))
    refused(["'spirals'", "sliding_tile"], lambda c: c["plan"].update(name="spirals"))
    refused(["references is 5", "0 to 4"], lambda c: c["plan"]["parameters"].update(references=5))
    refused(["unexpected keyword"], lambda c: c["plan"]["parameters"].update(more=5))


def test_a_layer_with_a_plan_is_copied_and_saved(tmp_path):
    from pydiffuse.nn import TileAttention

    plan = plans.local(12, 3, tile=5)
    layer = TileAttention(16, 2, plan)
    assert copy.deepcopy(layer).plan is plan
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=False).plan is plan


def test_summary_and_picture(tmp_path):
    plan = plans.union([plans.frames(4, 40, 1), plans.local(160, 10, tile=32)])
    text = plan.summary()
    for words in (
        "union: 160 queries x 160 keys",
        f"{plan.density:.1%} of all pairs",
        f"{160**2 / plan.computed[0]:.2f}x over dense",
        "partial",
    ):
        assert words in text
    heads = plans.per_head([plans.dense(160), plan])
    assert "2 heads" in heads.summary() and "to 100.0% by head" in heads.summary()
    # A pixel per token, no edges: the picture is the mask.
    image = plans.local(96, 5, tile=12).picture(size=96)
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    kept = (image == (38, 70, 122)).all(2) | (image == (224, 122, 47)).all(2)
    edges = (image == 255).all(2)
    expected = plans.local(96, 5, tile=12).to_dense()[0].numpy()
    assert edges.any() and (kept == expected)[~edges].all()
    wide = plans.dense(30, 90)
    assert wide.picture(60).shape == (20, 60, 3)
    assert not np.array_equal(heads.picture(80, head=0), heads.picture(80, head=1))
    plan.save_picture(tmp_path / "plan.png", size=64)
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(tmp_path / "plan.png")), plan.picture(64))
    check_refused(lambda: plan.picture(0), ValueError, ["picture: size is 0"])
    check_refused(
        lambda: heads.picture(9, 2), ValueError, ["picture: head is 2; accepted: an int, 0 to 1"]
    )


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_plan_keeps_nothing_of_the_mask(kind):
    rng = np.random.default_rng(5)
    array = rng.random((30, 30)) < 0.5
    before = array.copy()
    plan = plans.from_mask(kind(array), 10)
    array[:] = ~array
    assert np.array_equal(plan.to_dense()[0].numpy(), before)
    assert np.array_equal(plan.transpose().to_dense()[0].numpy(), before.T)
    assert plan.rows.bits and plans.from_mask(kind(before), 10) is plan
    for bits in (*plan.rows.bits, *plan.transpose().rows.bits):
        assert bits.base is None and not bits.flags.writeable


def peak_bytes(make):
    tracemalloc.start()
    try:
        plan = make()
        return plan, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make",
    [
        lambda: _local.__wrapped__(115200, 2048, False, 128),
        lambda: _sliding_tile.__wrapped__((30, 48, 80), (6, 8, 8), (18, 24, 24), 256),
        lambda: _frames.__wrapped__(7680, 15, 1, 0),
        lambda: _block_causal.__wrapped__((15,) * 7680, 1, 1, False),
        lambda: _joint.__wrapped__(
            (("a", 57600), ("b", 57600)),
            (("a", ("b",)), ("b", ("a",))),
            (("a", "a", 0), ("a", "b", 0), ("b", "b", 0)),
            7680,
        ),
    ],
    ids=["local", "sliding_tile", "frames", "block_causal", "joint"],
)
def test_memory_does_not_grow_with_pairs_of_tokens(make):
    plan, peak = peak_bytes(make)
    assert plan.q_length >= 115200
    # All pairs would be 13 GB of bytes; a few arrays over tokens and over tiles are some MB.
    assert peak < 16e6


def test_time_of_24_frames():
    plan = _frames.__wrapped__(24, 3600, 6, 0)
    assert plan.q_length == 86400
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _frames.__wrapped__(24, 3600, 6, 0)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


ALL = (("a", ("b",)), ("b", ("a",)))


@pytest.mark.parametrize(
    "make, pairs",
    [
        (lambda: _block_causal.__wrapped__((1,) * 15000, None, 0, False), 15000 * 15001 // 2),
        (lambda: _block_causal.__wrapped__((1,) * 8000, None, 0, True), 8000 * 8001),
        (lambda: _frames.__wrapped__(8192, 1, 8192, 0), 8192**2),
        (lambda: _frames.__wrapped__(1024, 1024, 4, 77), None),
        (lambda: _local.__wrapped__(2**20, 2**20, True, 128), 2**19 * (2**20 + 1)),
        (lambda: _local.__wrapped__(2**20, 2**16, False, 128), None),
        (lambda: _per_head.__wrapped__((plans.causal(2**20), plans.local(2**20, 512))), None),
        (lambda: _union.__wrapped__((plans.causal(2**20), plans.local(2**20, 512))), None),
        (lambda: _joint.__wrapped__((("a", plans.causal(2**20)), ("b", 77)), ALL, (), None), None),
    ],
    ids=[
        "block_causal",
        "clean",
        "frames",
        "references",
        "causal",
        "local",
        "per_head",
        "union",
        "joint",
    ],
)
def test_long_plans(make, pairs):
    """A million tokens, or a hundred million tiles: what is kept is a few runs in a row, or one."""
    plan, peak = peak_bytes(make)
    assert peak < 48e6
    assert pairs is None or plan.kept.tolist() == [pairs]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        make()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25
    turned = plan.transpose()
    assert turned.kept.tolist() == plan.kept.tolist()
    for a, b in zip(turned.tensors[:8], (*plan.tensors[4:8], *plan.tensors[:4]), strict=True):
        assert torch.equal(a, b)


def test_many_tiles():
    plan = plans.block_causal(1500, 1)
    assert plan.kept.tolist() == [1500 * 1501 // 2] and len(plan.tensors.spans) == 1500
    lone = plans.frames(200_000, 1, 0)
    assert lone.kept.tolist() == [200_000]
    # More tiles than 16 bits number.
    spans = plans.frames(70_000, 1, 1).tensors.k_spans
    assert len(spans) == 1 + 1 + 2 * 69_998 and spans[-1].tolist() == [69_999, 70_000, -1]


def test_a_plan_on_another_device():
    plan = plans.sliding_tile((4, 6), (2, 3), (2, 3))
    meta = plan.to("meta")
    assert meta.device.type == "meta" and meta.to("meta") is meta and meta.to("cpu") is plan
    assert meta == plan and meta.order.device.type == "meta"
