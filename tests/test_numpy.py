"""Functions on arrays give the bits of the torch functions, whatever the array."""

from __future__ import annotations

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import pydiffuse
import pydiffuse.numpy as pn
from pydiffuse import paths, plans
from tests.cases import adaln, attention, conv, guidance, patch, routing, scan
from tests.helpers import doubled, leaves, relative_error

MAKERS = {
    "guidance": (guidance, guidance.Maker),
    "patch": (patch, lambda shape, dtype: patch.Maker(*shape, dtype)),
    "adaln": (adaln, adaln.Maker),
    "routing": (routing, routing.Maker),
    "scan": (scan, scan.ScanMaker),
    "bld": (scan, lambda size, dtype: scan.ScanMaker(size, dtype, layout="bld")),
    "conv": (conv, scan.ScanMaker),
    "attention": (attention, lambda size, dtype: attention.Maker(attention.Size(*size), dtype)),
}
DRAWS = ("sample_t", "route")  # of NumPy's generator
CASES = [
    (stem, case)
    for stem, (cases, _) in MAKERS.items()
    for case in cases.CASES
    if hasattr(pn, case.op) and case.op not in DRAWS
]


def takes_out(op):
    return "out" in inspect.signature(getattr(pn, op)).parameters


BY_OP = {case.op: (stem, case) for stem, case in CASES}


SIZES = {
    **{stem: list(scan.SIZES.values()) for stem in ("scan", "bld", "conv")},
    "attention": [(2, 4, 2, 24), (1, 3, 3, 64), (0, 2, 1, 8)],
}


def makers(stem, dtype):
    """A maker for each shape of the family; of narrow dtypes one is enough."""
    family, make = MAKERS[stem]
    shapes = list(SIZES.get(stem) or family.SHAPES.values())[: None if dtype is torch.float32 else 1]
    return [make(shape, dtype) for shape in shapes]


OTHER_BITS = {"superpose", "tcfg-many", "embed_t", "next_t"}
"""A little linear algebra or a few functions of NumPy's own, held to the reference in float64."""


def as_array(t):
    if not isinstance(t, torch.Tensor):
        return t
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def as_tensor(a):
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def call(op, arguments):
    args, kwargs = arguments
    return np_leaves(getattr(pn, op)(*args, **kwargs))


def same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(
            np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("stem", "case"), CASES, ids=lambda v: getattr(v, "id", v))
def test_same_as_torch(stem, case, dtype):
    family = MAKERS[stem][0]
    for maker in makers(stem, dtype):
        given = case.make(maker)
        if given[1].get("path") == [None, None]:
            continue  # no paths over no tokens
        found = call(case.op, tree_map(as_array, given))
        expected = leaves(getattr(pydiffuse, case.op)(*given[0], **given[1]))
        if OTHER_BITS.isdisjoint((case.op, case.id)):
            same_bits(found, [as_array(t) for t in expected])
            continue
        with pydiffuse.use_backend("reference"):
            right = leaves(getattr(pydiffuse, case.op)(*doubled(given[0]), **doubled(given[1])))
        for a, b, c in zip(found, expected, right, strict=True):
            assert as_tensor(a).dtype == b.dtype
            assert relative_error(as_tensor(a), c) <= family.TOLERANCE[dtype].value


def fortran(a):
    return np.asfortranarray(a)


def backwards(a):
    every = (slice(None, None, -1),) * a.ndim
    return a[every].copy()[every]


def apart(a):
    return np.repeat(a, 2, -1)[..., ::2] if a.ndim else a


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def swapped(a):
    return a.byteswap().view(a.dtype.newbyteorder(">"))


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    memory[:] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    return memory.view(a.dtype).reshape(a.shape)


class Producer:
    """What has its memory to show, and nothing of NumPy's."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


LAYOUTS = [fortran, backwards, apart, read_only, swapped, unaligned, Producer]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", BY_OP)
def test_any_array(op, layout):
    stem, case = BY_OP[op]
    # NumPy's DLPack has no bfloat16.
    given = tree_map(
        as_array, case.make(makers(stem, torch.float16 if layout is Producer else torch.bfloat16)[0])
    )
    changed = tree_map(lambda a: layout(a) if isinstance(a, np.ndarray) else a, given)
    same_bits(call(op, changed), call(op, given))


WITH_OUT = {
    op: 1 if op in ("patch_step", "selective_scan", "superpose", "tile_attention") else 9
    for op in BY_OP
    if takes_out(op)
}
"""How many of the results it is for, at most."""


def with_out(given, outs):
    return given[0], given[1] | {"out": outs[0] if len(outs) == 1 else tuple(outs)}


@pytest.mark.parametrize("op", WITH_OUT)
def test_out(op):
    stem, case = BY_OP[op]
    given = tree_map(as_array, case.make(makers(stem, torch.float32)[0]))
    expected = call(op, given)
    results = expected[: WITH_OUT[op]]
    for make in (
        np.empty_like,
        lambda a: backwards(np.empty_like(a)),
        lambda a: np.empty((*a.shape, 2), a.dtype)[..., 1],
        lambda a: np.empty(a.shape, a.dtype, order="F"),
        lambda a: np.empty_like(a).astype(a.dtype.newbyteorder(">")),
    ):
        outs = [make(a) for a in results]
        found = call(op, with_out(given, outs))
        assert all(a is b for a, b in zip(found, outs, strict=False))
        same_bits([np.asarray(a, a.dtype.newbyteorder("=")) for a in found], expected)
    for wrong, words in (
        (read_only(results[0]), "read-only"),
        (results[0].astype(np.float64), f"accepted: a {results[0].dtype} array"),
        (np.zeros((*results[0].shape, 2), results[0].dtype), f"accepted: a {results[0].dtype} array"),
        ([1.0], "accepted: a"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{op}: .*{words}"):
            call(op, with_out(given, [wrong, *results[1:]]))
    if len(results) > 1 and results[0].shape == results[1].shape:
        with pytest.raises(ValueError, match="another output"):
            call(op, with_out(given, [results[0]] * len(results)))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("op", WITH_OUT)
def test_an_input_as_output(op, shift):
    """Itself, or the memory an element further: as if it had been another array."""
    stem, case = BY_OP[op]
    given = tree_map(as_array, case.make(makers(stem, torch.float32)[0]))
    expected = call(op, given)
    for result in range(min(len(expected), WITH_OUT[op])):
        like = expected[result]
        for i, a in enumerate(np_leaves(given)):
            if a.shape != like.shape or a.dtype != like.dtype:
                continue
            memory = np.zeros(a.size + 1, a.dtype)
            mine = memory[shift : shift + a.size].reshape(a.shape)
            mine[...] = a
            copies = replaced(given, i, mine)
            outs = [np.empty_like(a) for a in expected[: WITH_OUT[op]]]
            outs[result] = memory[: a.size].reshape(a.shape)
            same_bits(call(op, with_out(copies, outs)), expected)


def replaced(given, place, new):
    """`given` with its array number `place` replaced, the others copied."""
    at = iter(range(1000))
    return tree_map(
        lambda a: a if not isinstance(a, np.ndarray) else new if next(at) == place else a.copy(), given
    )


def np_leaves(given):
    found = []
    tree_map(lambda a: found.append(a) if isinstance(a, np.ndarray) else None, given)
    return found


def test_threads_change_no_bit():
    c, u = (np.random.default_rng(i).standard_normal((3, 200, 700), np.float32) for i in range(2))
    expected, before = pn.tcfg(c, u, 7.5), pn.num_threads()
    try:
        for threads in (1, 3):
            pn.set_num_threads(threads)
            assert pn.num_threads() == threads and np.array_equal(pn.tcfg(c, u, 7.5), expected)
    finally:
        pn.set_num_threads(before)
    assert pn.cpu_capability() in ("default", "avx2", "avx512")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", scan.STEPS, ids=lambda case: case.id)
def test_a_step_of_a_scan(case, dtype):
    """Results and the new state, in whatever memory they are."""
    for size in scan.SIZES.values() if dtype is torch.float32 else [scan.SIZES["odd"]]:
        args, kwargs = case.make(scan.ScanMaker(size, dtype))
        for change in (np.copy, backwards, np.asfortranarray, swapped):
            state, x, *rest = (
                change(as_array(a.clone())) if isinstance(a, torch.Tensor) else a for a in args
            )
            y = pn.selective_state_update(state, x, *rest, **kwargs)
            theirs = args[0].clone()
            expected = pydiffuse.selective_state_update(theirs, *args[1:], **kwargs)
            same_bits(
                [y, state.astype(state.dtype.newbyteorder("="))], [as_array(expected), as_array(theirs)]
            )
        out = np.empty_like(y)
        state = as_array(args[0].clone())
        found = pn.selective_state_update(state, *map(as_array, args[1:]), **kwargs, out=out)
        assert found is out
        same_bits([out], [y])


def test_every_op_is_there():
    """But for those that are there for their gradients, or for the products of a library."""
    assert set(pydiffuse.OPS) - set(pn.__all__) == {"patch_loss", "routed_linear", "zigzag_mamba_inner"}


NO_TORCH = """
import pickle, sys
import numpy as np
import pydiffuse.numpy as pn
from pydiffuse import paths, plans

rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape, np.float32)

for path in (paths.zigzag((4, 6), 3), paths.hilbert((4, 6)), paths.from_order(rng.permutation(24))):
    for way in (path, path.reversed()):
        assert pickle.loads(pickle.dumps(way)) is way and way.reversed().reversed() is way and len(repr(way))
    x, w = normal(2, 6, 24), normal(6, 3)
    there = pn.causal_conv1d(x[..., path.visits], w)
    assert np.array_equal(pn.causal_conv1d(x, w, path=path)[..., path.visits], there)
    pn.selective_scan(x, np.abs(x), -np.ones((6, 4), np.float32), normal(2, 4, 24), normal(2, 4, 24),
                      path=[path, path.reversed()])
window = plans.sliding_tile((8, 6), (4, 3), (4, 9))
some = [plans.frames(3, 16, 1), plans.local(48, 5), plans.causal(48), plans.block_causal(6, 8), window,
        plans.groups([20, 28]), plans.joint({"image": window, "text": 3}),
        plans.union([plans.local(48, 5), plans.causal(48)]),
        plans.per_head([window, plans.dense(48)]), plans.from_mask(rng.random((48, 48)) < 0.4, 16),
        plans.from_blocks(rng.random((3, 3)) < 0.7, [16] * 3)]
for plan in some:
    turned = plan.transpose()
    assert turned.transpose() is plan and pickle.loads(pickle.dumps(plan)) is plan
    q = normal(1, 2, plan.q_length, 16)
    out, lse = pn.tile_attention(q, q, q, plan, return_lse=True)
    assert plan.picture(32).any() and plan.summary() and np.isfinite(out).all()
    plan.save(FILE)
    assert plans.TilePlan.load(FILE) is plan
pn.sample_t(2, 3), pn.route(2, 5, 0.5)
assert "torch" not in sys.modules

import torch  # tensors are made where they are asked for
import pydiffuse
for plan in some:
    q = torch.ones(1, 2, plan.q_length, 16)
    assert np.array_equal(pydiffuse.tile_attention(q, q, q, plan), pn.tile_attention(q, q, q, plan))
    assert plan.tensors.spans.device == plan.device and plan.to("cpu") is plan
    assert plan.to("meta").transpose().to("cpu") is plan.transpose()
assert path.order.tolist() == path.visits.tolist() and path.to("cpu") is path and path.reversed().reversed() is path
assert path.inverse[path.order.long()].tolist() == list(range(24))
"""


def test_no_torch(tmp_path):
    code = NO_TORCH.replace("FILE", repr(str(tmp_path / "plan.json")))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples/numpy_arrays.py"
    done = subprocess.run(
        [sys.executable, str(example)], check=True, timeout=120, capture_output=True, text=True
    )
    rows = [line for line in done.stdout.splitlines() if "differ by" in line]
    assert len(rows) == 3 and all(float(line.split()[-1]) < 1e-4 for line in rows), done.stdout


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "ltg", "nondecreasing"])
def test_draws_of_levels(kind):
    """As torch's: the same mean and spread within a few standard errors, the same bounds."""
    options = {"shift": 0.7, "loc": 0.3} if kind in ("ltg", "logit_normal") else {}
    found = [
        pn.sample_t(4000, 8, kind, generator=np.random.default_rng(seed), **options) for seed in (0, 0, 1)
    ]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    t = found[0].astype(np.float64)
    assert found[0].dtype == np.float32 and t.min() >= 0 and t.max() <= 1
    expected = pydiffuse.sample_t(4000, 8, kind, generator=torch.Generator().manual_seed(0), **options)
    for statistic in (np.mean, np.std, lambda a: a.max(1).mean(), lambda a: a.min(1).mean()):
        assert abs(statistic(t) - statistic(expected.double().numpy())) < 0.03
    if kind == "nondecreasing":
        assert (np.diff(t, axis=1) <= 0).all()
    assert pn.sample_t(0, 3, kind).shape == (0, 3) and pn.sample_t(2, 0, kind).shape == (2, 0)


def test_draws_of_tokens_and_noise():
    ids = pn.route(500, 12, 0.25, generator=np.random.default_rng(0))
    assert ids.shape == (500, 3) and ids.dtype == np.int64 and (np.diff(ids, axis=1) > 0).all()
    assert np.abs(np.bincount(ids.ravel(), minlength=12) / 500 - 0.25).max() < 0.08
    assert pn.route(2, 5, np.int64(5)).tolist() == [[0, 1, 2, 3, 4]] * 2 and pn.route(2, 5, 0).shape == (
        2,
        0,
    )
    x = np.zeros((2, 3, 40, 40), np.float32)
    noisy, target = pn.noise_patches(x, 0.0, 4, generator=np.random.default_rng(1))
    assert abs(noisy.std() - 1) < 0.03 and np.array_equal(noisy, -target)
    step = [
        pn.patch_step(x, x, 0.2, 0.5, 4, method="ancestral", generator=np.random.default_rng(s))[0]
        for s in (1, 1, 2)
    ]
    assert np.array_equal(step[0], step[1]) and not np.array_equal(step[0], step[2])


def test_scalars_of_numpy():
    x, u = np.random.default_rng(0).standard_normal((2, 2, 3, 8, 8), np.float32)
    plain = pn.patch_step(x, u, 0.25, 0.5, 4, uncond=x, scale=2.0)
    found = pn.patch_step(
        x, u, np.float32(0.25), np.float64(0.5), np.int64(4), uncond=x, scale=np.float32(2)
    )
    same_bits(found, plain)
    same_bits(pn.patch_step(x, u, 0.25, 0.5, (np.int8(4), 4), uncond=x, scale=np.array(2.0)), plain)
    score = x[:, 0, 0]
    same_bits(pn.select_patches(score, np.int32(3)), pn.select_patches(score, 3))
    table = np.zeros((1, 2, 8), np.float32)
    same_bits(
        [pn.modulate(x, table, 0, eps=np.float32(0.5))],
        [pn.modulate(x, table, np.zeros(1, int), eps=0.5)],
    )
    same_bits(pn.embed_t(x, np.int64(4), max_distinct=np.int32(500)), pn.embed_t(x, 4, max_distinct=500))


def test_steps_of_arrays():
    """Paths, permutations and offsets as arrays of any integers."""
    rng = np.random.default_rng(0)
    u, delta, B, C = (
        rng.standard_normal(s, np.float32) for s in ((2, 6, 16), (2, 6, 16), (2, 4, 16), (2, 4, 16))
    )
    A, path = -np.ones((6, 4), np.float32), paths.zigzag((4, 4), 3)
    for cu, reverse in itertools.product((None, [0, 5, 5, 16]), (False, True)):
        expected = call(
            "selective_scan", ((u, delta, A, B, C), {"path": path, "cu_seqlens": cu, "reverse": reverse})
        )
        for kind in (np.int16, np.int64, ">i8", np.uint8):
            where = {
                "path": path.visits.astype(kind),
                "cu_seqlens": None if cu is None else np.array(cu, kind),
                "reverse": np.bool_(reverse),
            }
            same_bits(call("selective_scan", ((u, delta, A, B, C), where)), expected)
        w = np.ones((6, 3), np.float32)
        where = {"path": path.visits.tolist(), "cu_seqlens": cu, "reverse": reverse}
        same_bits(
            call("causal_conv1d", ((u, w), where)),
            [
                as_array(
                    pydiffuse.causal_conv1d(
                        as_tensor(u), as_tensor(w), path=path, cu_seqlens=cu, reverse=reverse
                    )
                )
            ],
        )


def test_bad_arrays():
    c, x = np.ones((2, 5), np.float32), np.ones((2, 3, 4, 4), np.float32)
    table, u, A = (
        np.ones((3, 2, 5), np.float32),
        np.ones((2, 3, 5), np.float32),
        -np.ones((3, 3), np.float32),
    )
    s = np.ones((3, 3, 3), np.float32)
    q, dense = np.ones((2, 3, 4, 8), np.float32), plans.dense(4)
    for bad, error, word in (
        (lambda: pn.cfg(c, c[:, :4], 2.0), ValueError, "(2, 4)"),
        (lambda: pn.cfg(c, c.astype(np.int32), 2.0), TypeError, "int32"),
        (lambda: pn.cfg(c, c.astype(np.float16), 2.0), ValueError, "dtype"),
        (lambda: pn.cfg(c.astype(np.float64), c, 2.0), TypeError, "float64"),
        (lambda: pn.cfg(np.float32(1), np.float32(2), 2.0), ValueError, "no batch dimension"),
        (lambda: pn.cfg(np.ma.masked_less(c, 0), c, 2.0), TypeError, "mask"),
        (lambda: pn.cfg("c", c, 2.0), TypeError, "cfg: the first prediction"),
        (lambda: pn.cfg(c, c, None), TypeError, "scale is None"),
        (lambda: pn.cfg(c, c, "3"), TypeError, "scale is '3'"),
        (lambda: pn.cfg(c, c, 1j), TypeError, "scale"),
        (lambda: pn.tcfg(c, c, np.ones(3)), ValueError, "scale"),
        (lambda: pn.tcfg([c, c], c, [1.0]), ValueError, "2"),
        (lambda: pn.compose([c], c, [1.0, 2.0]), ValueError, "weights"),
        (lambda: pn.compose(c, c, [1.0, 2.0]), TypeError, "conds"),
        (lambda: pn.guide([c, c], "best", x=c), ValueError, "best"),
        (lambda: pn.guide([c], "tcfg", scale=1.0, x=c), ValueError, "uncond"),
        (lambda: pn.guide([c, c], "cfg", scale=1.0, x=c, h=0.5), ValueError, "history"),
        (lambda: pn.guide([c, c], "cfg", scale=1.0, x=c, s=np.ones(2)), ValueError, "noise"),
        (lambda: pn.guide([c, c, c], "apg", scale=1.0, x=c), ValueError, "momentum"),
        (lambda: pn.combine([c, c], np.ones((2, 3))), ValueError, "coefficients"),
        (lambda: pn.gram([]), TypeError, "preds"),
        (lambda: pn.superpose([c], np.zeros(1), 0.0), ValueError, "step"),
        (lambda: pn.superpose([c], np.zeros(2), 0.1), ValueError, "log_density"),
        (lambda: pn.set_num_threads(0), ValueError, "1 to"),
        (lambda: pn.noise_patches(c, 0.5), ValueError, "[B, C, L]"),
        (lambda: pn.noise_patches(x, 1.5, 2), ValueError, "t holds a value outside [0, 1]"),
        (lambda: pn.noise_patches(x, np.nan, 2), ValueError, "t holds a value outside [0, 1]"),
        (lambda: pn.noise_patches(x, 0.5, 3), ValueError, "does not divide"),
        (lambda: pn.noise_patches(x, "0.5", 2), TypeError, "t is '0.5'"),
        (lambda: pn.noise_patches(x, 0.5, 2, "straight"), ValueError, "straight"),
        (lambda: pn.noise_patches(x, 0.5, 2, generator=7), TypeError, "Generator"),
        (lambda: pn.patch_step(x, x, 0.5, np.ones((2, 3)), 2), ValueError, "(2, 4)"),
        (lambda: pn.patch_step(x, x, 0.5, 2, 2), ValueError, "t_next holds"),
        (lambda: pn.patch_step(x, x, 0.5, 1, 2, scale=2.0), ValueError, "uncond"),
        (lambda: pn.patch_step(x, x, 0.5, 1, 2, mask=np.ones((2, 4))), ValueError, "bool"),
        (lambda: pn.patch_step(x, x, 0.5, 1, 2, noise=x), ValueError, "ancestral"),
        (lambda: pn.patch_step(x, x, 0.5, 1, 2, method="multistep", history=x), TypeError, "pair"),
        (
            lambda: pn.patch_step(x, x, 0.5, 1, 2, method="multistep", history=(x, np.full(2, 2.0))),
            ValueError,
            "history[1] holds",
        ),
        (lambda: pn.convert(x, x, 0.5, "v", "w"), ValueError, "target is 'w'"),
        (lambda: pn.select_patches(c, 6), ValueError, "0 to 5"),
        (lambda: pn.select_patches(c, True), ValueError, "k is True"),
        (lambda: pn.select_patches(x, 1), ValueError, "(B, N)"),
        (lambda: pn.dual_loop_t(c, 2, 0.5, dt=-1.0, steps=2), ValueError, "dt"),
        (lambda: pn.dual_loop_t(c, 2, 0.5, dt=0.1, steps=0), ValueError, "steps"),
        (lambda: pn.sample_t(2, 3, "loud"), ValueError, "loud"),
        (lambda: pn.sample_t(2, 3, shift=np.nan), ValueError, "shift"),
        (lambda: pn.next_t(c, "schedule", schedule=[[0, 2]]), ValueError, "schedule"),
        (lambda: pn.modulate(c, np.ones((3, 2, 4), np.float32), [0, 0]), ValueError, "D = 5"),
        (lambda: pn.modulate(c, table, [0, 3]), ValueError, "rows holds 3"),
        (lambda: pn.modulate(c, table, [0, 2**32]), ValueError, "rows holds 4294967296"),
        (lambda: pn.modulate(c, table, [0, 1, 2]), ValueError, "broadcasts to (2,)"),
        (lambda: pn.modulate(c, table, [0.0, 1.0]), TypeError, "integers"),
        (lambda: pn.modulate(c, table, 0, norm="batch"), ValueError, "batch"),
        (lambda: pn.modulate(c, table, 0, eps=-1.0), ValueError, "eps"),
        (lambda: pn.modulate(c, table, 0, weight=c), ValueError, "(5,)"),
        (lambda: pn.gate_residual_modulate(c, c, table, 0), ValueError, "gate"),
        (lambda: pn.gate_residual_modulate(c, c.astype(np.float16), table, 0), TypeError, "branch"),
        (lambda: pn.embed_t(c, 0), ValueError, "dim"),
        (lambda: pn.embed_t(np.arange(3.0), 4, max_distinct=2), ValueError, "3 distinct"),
        (lambda: pn.gather_tokens(c, [[0, 5], [0, 1]]), ValueError, "ids holds 5"),
        (lambda: pn.gather_tokens(c, [[0, 2**32], [0, 1]]), ValueError, "ids holds 4294967296"),
        (lambda: pn.gather_tokens(c, [[0, 1]]), ValueError, "(2, keep)"),
        (lambda: pn.scatter_tokens(c, c[:, :2], [[0, 1], [3, 3]]), ValueError, "3 twice in sample 1"),
        (lambda: pn.scatter_tokens(c, c, [[0, 1], [3, 4]]), ValueError, "(2, 2)"),
        (lambda: pn.scatter_tokens(c, c[:, :2], [[0, 1], [3, 4]], np.ones(3)), ValueError, "gate"),
        (lambda: pn.route(2, 3, 4), ValueError, "0 to 3"),
        (lambda: pn.causal_conv1d(c, c), ValueError, "(B, D, L)"),
        (lambda: pn.causal_conv1d(u, c), ValueError, "weight is"),
        (lambda: pn.causal_conv1d(u, np.ones((3, 9), np.float32)), ValueError, "width 9"),
        (lambda: pn.causal_conv1d(u, u[0], activation="relu"), ValueError, "relu"),
        (lambda: pn.causal_conv1d(u, u[0], layout="ldb"), ValueError, "ldb"),
        (lambda: pn.causal_conv1d(u, u[0], path=[0, 1, 2, 3]), ValueError, "as the input has"),
        (lambda: pn.causal_conv1d(u, u[0], path=np.zeros(5, int)), ValueError, "no permutation"),
        (lambda: pn.causal_conv1d(u, u[0], path=np.arange(5.0)), TypeError, "no permutation"),
        (lambda: pn.causal_conv1d(u, u[0], path=[paths.sweep((1, 5))]), TypeError, "list of paths"),
        (lambda: pn.causal_conv1d(u, u[0], cu_seqlens=[0, 4]), ValueError, "ending at 5"),
        (lambda: pn.causal_conv1d(u, u[0], cu_seqlens=[0, 4, 3, 5]), ValueError, "never falling"),
        (lambda: pn.causal_conv1d(u, u[0], cu_seqlens=[0.0, 5.0]), TypeError, "integers"),
        (lambda: pn.selective_scan(u, u, A.astype(np.float64), u, u), TypeError, "A is a float64"),
        (lambda: pn.selective_scan(u, u, np.ones((3, 300), np.float32), u, u), ValueError, "300 states"),
        (lambda: pn.selective_scan(u, u[:1], A, u, u), ValueError, "delta is"),
        (lambda: pn.selective_scan(u, u, A, u[:, :2], u), ValueError, "B is"),
        (lambda: pn.selective_scan(u, u, A, u[:, :, None].repeat(2, 1), u), ValueError, "B is"),
        (lambda: pn.selective_scan(u, u, A, u, u, path=[]), ValueError, "empty list"),
        (lambda: pn.selective_scan(u, u, A, u, u, initial_state=u), ValueError, "initial_state"),
        (lambda: pn.selective_scan(u, u, A, u, u, delta_softplus=1), TypeError, "delta_softplus"),
        (lambda: pn.selective_state_update(u, A, A, A, A, A), ValueError, "state is"),
        (lambda: pn.selective_state_update([[0.0]], A, A, A, A, A), TypeError, "can be written"),
        (lambda: pn.selective_state_update(s, A, u, A, A, A), ValueError, "dt is"),
        (lambda: pn.selective_state_update(s, A, A, A, A, s), ValueError, "groups"),
        (lambda: pn.tile_attention(x, x, x, dense), ValueError, "head_dim 4"),
        (lambda: pn.tile_attention(q, q[:, :2], q[:, :2], dense), ValueError, "divisor"),
        (lambda: pn.tile_attention(q, q, q[:1], dense), ValueError, "v is"),
        (lambda: pn.tile_attention(q, q.astype(np.float16), q, dense), TypeError, "float32, as q is"),
        (lambda: pn.tile_attention(q[:, :, :3], q, q, dense), ValueError, "q has 3 tokens"),
        (
            lambda: pn.tile_attention(q, q, q, plans.per_head([dense, plans.causal(4)])),
            ValueError,
            "2 heads",
        ),
        (lambda: pn.tile_attention(q, q, q, "dense"), TypeError, "plan is 'dense'"),
        (lambda: pn.tile_attention(q, q, q, dense, scale=np.ones(2)), ValueError, "scale"),
        (lambda: pn.tile_attention(q, q, q, dense, scale=np.inf), ValueError, "scale is inf"),
        (lambda: pn.channel_mask(1.5, 8), ValueError, "level"),
    ):
        with pytest.raises(error, match=re.escape(word)):
            bad()
