"""Tile attention on every backend against the float64 reference, what it promises, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pydiffuse as pd
from pydiffuse import plans
from pydiffuse.plans.plan import make_plan
from tests import helpers
from tests.cases.attention import CASES, TOLERANCE, Maker, Size, ordered, ragged
from tests.helpers import (
    DEVICE,
    GPU,
    assert_close,
    check_refused,
    doubled,
    relative_error,
    run,
)
from tests.table import Case

BACKENDS = ["triton"] if GPU else ["cpu", "triton"]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
FRAMES, TEXT, RAGGED, PER_HEAD, ORDERED, BLOCKS = CASES
SIZES = {
    "wide": Size(2, 4, 4, 16),
    "grouped": Size(1, 4, 2, 40),
    "one key head": Size(1, 3, 1, 24),
    "96": Size(1, 2, 2, 96),
}


def arguments(case, size, dtype=torch.float32, **options):
    return case.make(Maker(size, dtype, DEVICE, **options))


def values_and_gradients(case, given, backend):
    """lse that is -inf, of queries that see nothing, counts as 0 after a look at where it is."""
    return helpers.values_and_gradients(case, given, backend, wants=lambda t: t.dim() == 4)


def check(case, given, backend, dtype=torch.float32, factor=1.0):
    results, gradients = values_and_gradients(case, given, backend)
    expected, slopes = values_and_gradients(case, doubled(given), "reference")
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.isneginf(), b.isneginf())
    results, expected = ([t.masked_fill(t.isneginf(), 0) for t in ts] for ts in (results, expected))
    assert_close(results, expected, TOLERANCE, dtype, "value", factor)
    assert_close(gradients, slopes, TOLERANCE, dtype, "grad", factor)


@by_case
@by_backend
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_values_and_gradients(case, backend, size):
    if backend == "triton" and not GPU and size != SIZES["one key head"] and case is not FRAMES:
        return  # interpreted, they take long and show nothing new
    check(case, arguments(case, size), backend)


@by_backend
@pytest.mark.parametrize("D", [8, 64, 72, 128, 248, 256])
def test_every_piece_of_a_head(backend, D):
    """Pieces of every width, the last of 8 features and of 16."""
    check(FRAMES, arguments(FRAMES, Size(1, 1, 1, D)), backend)


@pytest.mark.skipif(GPU, reason="a GPU has tiles of its own")
@pytest.mark.parametrize("case", [RAGGED, PER_HEAD, ORDERED], ids=lambda case: case.name)
def test_tiles_of_small_cards(case, monkeypatch):
    """Where a block has 99 kB of shared memory, wide heads take 16 queries at a time."""
    from pydiffuse.kernels import attention_tile

    monkeypatch.setattr(attention_tile, "capability", lambda like: 120)
    check(case, arguments(case, Size(1, 2, 1, 256)), "triton")


@by_backend
@pytest.mark.parametrize("case", [TEXT, PER_HEAD, ORDERED], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, dtype):
    check(case, arguments(case, Size(1, 2, 1, 40), dtype), backend, dtype)


LAYOUTS = {
    "tokens_first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "spaced": lambda t: torch.stack([t, t], -1)[..., 0],
    "every_other_token": lambda t: torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2],
    "part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "off_by_one": lambda t: torch.cat([t, t[..., :1]], -1)[..., 1:],
    "expanded": lambda t: t[:1, :1].expand_as(t),
}


@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(backend, layout):
    check(RAGGED, arguments(RAGGED, Size(1, 2, 1, 24), layout=layout), backend)


@by_backend
def test_the_output_lies_as_the_queries_do(backend):
    (q, k, v, plan), _ = arguments(FRAMES, Size(1, 2, 2, 16), layout=LAYOUTS["tokens_first"])
    with pd.use_backend(backend):
        assert pd.tile_attention(q, k, v, plan).transpose(1, 2).is_contiguous()
        assert pd.tile_attention(q.contiguous(), k, v, plan).is_contiguous()


@by_backend
@pytest.mark.parametrize("case", [TEXT, PER_HEAD], ids=lambda case: case.name)
def test_same_bits_twice_and_alone(case, backend):
    """In every run, and whatever else is in the batch."""
    given = arguments(case, Size(2, 2, 1, 16))
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    q, k, v, plan = given[0]
    alone = run(case, ((q[1:], k[1:], v[1:], plan), given[1]), backend)
    for a, b in zip(alone, first[0], strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU's threads")
def test_threads_change_nothing():
    given = arguments(PER_HEAD, Size(2, 4, 2, 24))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results, gradients = values_and_gradients(PER_HEAD, given, "cpu")
            found.append(results + gradients)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@by_backend
@pytest.mark.parametrize("B, H, Hk", [(0, 2, 1), (2, 0, 1)])
def test_no_samples_and_no_heads(backend, B, H, Hk):
    """Key heads that no query head uses get gradients of 0."""
    results, gradients = values_and_gradients(TEXT, arguments(TEXT, Size(B, H, Hk, 16)), backend)
    assert results[0].shape == (B, H, 41, 16) and results[1].shape == (B, H, 41)
    assert not any(g.any() for g in gradients)


@by_backend
def test_queries_and_keys_that_see_nothing(backend):
    """Zeros, -inf, and gradients of zeros: everything is written."""
    mask = torch.ones(40, 50, dtype=torch.bool)
    mask[:20] = False
    mask[25] = False
    mask[:, 30:] = False
    mask[:, 3] = False
    case = Case("tile_attention", "holes", lambda t: t.call(plans.from_mask(mask, 10), return_lse=True))
    given = arguments(case, Size(1, 2, 1, 16))
    (out, lse), (dq, dk, dv) = values_and_gradients(case, given, backend)
    unseen = [*range(20), 25]
    assert not out[:, :, unseen].any() and lse[:, :, unseen].isneginf().all()
    assert not dq[:, :, unseen].any()
    assert not dk[:, :, [3, *range(30, 50)]].any() and not dv[:, :, [3, *range(30, 50)]].any()
    check(case, given, backend)


@by_backend
def test_large_scores(backend):
    """Scores of +-1e4 have neither overflow nor underflow, forward and backward."""
    (q, k, v, plan), kwargs = arguments(RAGGED, Size(1, 2, 2, 16))
    # Small integers: products are exact, so only the softmax is looked at.
    q, k = (q * 2).round(), (k * 2).round()
    for scale in (200.0, -200.0):
        given = (q, k, v, plan), {**kwargs, "scale": scale}
        assert (q @ k.mT * scale).abs().max() > 1e4
        check(RAGGED, given, backend, factor=1e3)


@by_backend
@pytest.mark.parametrize("scale", [0, -0.3, "heads"])
def test_scales_of_any_sign(backend, scale):
    maker = Maker(Size(1, 4, 2, 16), device=DEVICE)
    given = maker.call(ragged(4), return_lse=True)
    given[1]["scale"] = (
        maker.scales() * torch.tensor([1, -1, 0, 2], device=DEVICE) if scale == "heads" else scale
    )
    check(PER_HEAD, given, backend)


@by_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate(backend, value):
    """To the queries that see them, and to no others."""
    (q, k, v, plan), _ = arguments(FRAMES, Size(1, 2, 2, 16))
    tensors = {"q": q, "k": k, "v": v}
    for place in tensors:
        given = {**tensors, place: tensors[place].clone()}
        given[place][0, 1, 30, 3] = value
        (out, lse), (expected, expected_lse) = (
            run(FRAMES, ((*given.values(), plan), {"return_lse": True}), b)
            for b in (backend, "reference")
        )
        good = out.isfinite()
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
        assert not good.all() and torch.equal(good, expected.isfinite())
        assert relative_error(out[good], expected[good]) < 1e-5


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_mask_keeps_out_has_no_influence(backend, place, value):
    """Within a tile: as if it were 0, forward and backward, for all that it does not reach."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 40, generator=generator) < 0.5
    mask[:, 33:] = False  # padding, which none sees
    mask[11] = False
    bad = [3, 11, 36]  # tokens, one that is seen among them
    dtype = torch.bfloat16 if backend == "cpu" and value == math.inf else torch.float32  # pairs, singles
    given = {
        n: torch.randn(1, 1, 40, 24, generator=generator).to(DEVICE, dtype)
        for n in ("q", "k", "v", "dout")
    }

    def run_with(value):
        tensors = {n: t.clone() for n, t in given.items()}
        tensors[place][:, :, bad, 3] = value
        inputs = [tensors[n].requires_grad_() for n in ("q", "k", "v")]
        with pd.use_backend(backend):
            out, lse = pd.tile_attention(*inputs, plans.from_mask(mask, 20), return_lse=True)
            return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, tensors["dout"])]

    if place in ("k", "v"):
        rows = mask[:, bad].any(1)  # queries that it reaches, and the keys that these see
    else:
        rows = torch.zeros(40, dtype=torch.bool)
        rows[bad] = True
    keys = mask[rows].any(0)
    reached = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}
    assert rows.any() and not rows.all() and keys.any() and not keys.all()
    for (name, hit), found, expected in zip(reached.items(), run_with(value), run_with(0.0), strict=True):
        if place == "dout" and (backend == "reference" or name in ("out", "lse")):
            continue  # no input of the forward; the reference's backward is autograd's
        left = ~hit.to(DEVICE)
        torch.testing.assert_close(
            found[:, :, left], expected[:, :, left], msg=lambda m, n=name: f"{n}: {m}"
        )
        if backend == "cpu":
            assert torch.equal(found[:, :, left], expected[:, :, left]), name
        assert name == "lse" or not found.isfinite().all() or name == "dv"


@by_backend
def test_rows_of_minus_infinity_alone(backend):
    """Seen or not, what has no weight is 0, as in the reference."""
    (q, k, v, plan), _ = arguments(RAGGED, Size(1, 1, 1, 16))
    q, k = q.abs(), k.abs()
    k[..., 0] = -math.inf
    found, expected = (
        run(RAGGED, ((q, k, v, plan), {"return_lse": True}), b) for b in (backend, "reference")
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isneginf(), b.isneginf())


@by_backend
def test_an_order_is_a_gather(backend):
    """The op on tokens in order equals the op on gathered tokens, bit for bit."""
    plan = ordered()
    rows = make_plan("positions", (), [13] * 3, [13] * 3, plan.rows)
    (q, k, v, _), _ = arguments(ORDERED, Size(1, 2, 1, 16))
    order = plan.order.long().to(DEVICE)
    with pd.use_backend(backend):
        out = pd.tile_attention(q, k, v, plan)
        gathered = pd.tile_attention(*(t[:, :, order] for t in (q, k, v)), rows)
    assert torch.equal(out[:, :, order], gathered)


@by_backend
def test_joining_two_sets_of_keys(backend):
    """lse is what attentions over different keys are joined with."""
    mask = torch.ones(9, 24, dtype=torch.bool)
    mask[:, ::5] = False
    (q, k, v, plan), _ = Maker(Size(1, 2, 2, 16), device=DEVICE).call(plans.from_mask(mask, 8))
    with pd.use_backend(backend):
        whole = pd.tile_attention(q, k, v, plan)
        parts = [
            pd.tile_attention(
                q, k[:, :, at], v[:, :, at], plans.from_mask(mask[:, at], 8), return_lse=True
            )
            for at in (slice(0, 8), slice(8, 24))
        ]
    weight = torch.stack([lse for _, lse in parts]).softmax(0)
    joined = sum(w[..., None] * out for w, (out, _) in zip(weight, parts))
    torch.testing.assert_close(joined, whole)


def test_the_entropy_scale():
    assert pd.attention.entropy_scale(64, 1024, 1024) == pytest.approx(1 / 8)
    assert pd.attention.entropy_scale(64, 1024**2, 1024) == pytest.approx(math.sqrt(2) / 8)


def rand(*shape):
    return torch.randn(shape, device=DEVICE)


PLAN = plans.frames(2, 4, 1)
Q, K = rand(1, 4, 8, 16), rand(1, 2, 8, 16)


def call(q=Q, k=K, v=K, plan=PLAN, **options):
    return lambda: pd.tile_attention(q, k, v, plan, **options)


BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "q's dimensions": (call(Q[0]), ValueError, ["tile_attention", "q", "(4, 8, 16)", "[B, H, S, D]"]),
    "no tensor": (call("q"), TypeError, ["tile_attention", "q", "str"]),
    "k's batch": (call(k=rand(2, 2, 8, 16)), ValueError, ["k", "(2, 2, 8, 16)"]),
    "k's features": (call(k=rand(1, 2, 8, 8)), ValueError, ["k", "(1, 2, 8, 8)"]),
    "v unlike k": (call(v=rand(1, 4, 8, 16)), ValueError, ["v", "(1, 4, 8, 16)", "as k is"]),
    "dtypes": (call(k=K.half(), v=K.half()), TypeError, ["k", "float16", "float32"]),
    "v's dtype": (call(v=K.half()), TypeError, ["v", "float16", "float32"]),
    "integers": (call(Q.int(), K.int(), K.int()), TypeError, ["q", "int32"]),
    "float64": (call(Q.double(), K.double(), K.double()), TypeError, ["float64", "use_backend"]),
    "devices": (call(k=K.to("meta")), ValueError, ["k", "meta"]),
    "head_dim": (
        call(Q.repeat(1, 1, 1, 2)[..., :20], K.repeat(1, 1, 1, 2)[..., :20], K.repeat(1, 1, 1, 2)[..., :20]),
        ValueError, ["head_dim 20", "multiple of 8", "pad q, k and v to 24"],
    ),
    "head_dim too large": (
        call(*(t.repeat(1, 1, 1, 17) for t in (Q, K, K))), ValueError, ["head_dim 272", "256"],
    ),
    "heads": (call(Q[:, :3]), ValueError, ["3 heads", "2", "divisor"]),
    "no key heads": (call(k=K[:, :0], v=K[:, :0]), ValueError, ["0", "divisor"]),
    "no plan": (call(plan=torch.ones(8, 8)), TypeError, ["plan", "TilePlan", "pydiffuse.plans"]),
    "plan for other queries": (
        call(plan=plans.frames(3, 4, 1)), ValueError, ["q has 8 tokens", "12", "a plan made for this length"],
    ),
    "plan for other keys": (call(k=rand(1, 2, 9, 16), v=rand(1, 2, 9, 16)), ValueError, ["k has 9 tokens"]),
    "plan for other heads": (
        call(plan=plans.from_mask(np.ones((3, 8, 8), bool), 4)), ValueError, ["3 heads", "q has 4"],
    ),
    "scale's length": (call(scale=rand(3)), ValueError, ["scale", "(3,)", "(4,)"]),
    "scale's dtype": (call(scale=torch.ones(4, dtype=torch.int32, device=DEVICE)), ValueError, ["scale", "int32"]),
    "scale's device": (call(scale=torch.ones(4, device="meta")), ValueError, ["scale", "meta"]),
    "scale's gradient": (call(scale=rand(4).requires_grad_()), ValueError, ["scale", "no gradient", "multiply q"]),
    "scale's type": (call(scale="1"), ValueError, ["scale", "'1'", "number"]),
    "infinite scale": (call(scale=math.inf), ValueError, ["scale", "inf", "finite"]),
    "bool scale": (call(scale=True), ValueError, ["scale", "True"]),
    "return_lse": (call(return_lse=1), TypeError, ["return_lse", "1"]),
    "training length": (lambda: pd.attention.entropy_scale(64, 9, 1), ValueError, ["trained_length", "1", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    check_refused(*row)


def test_it_differentiates_once():
    q = Q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(pd.tile_attention(q, K, K, PLAN).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="use_backend"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("bad", ["features", "lse", "dtype"])
def test_triton_refuses_what_it_cannot_address(bad):
    """Callers of the raw op: strided features, an lse that is not float32 and contiguous."""
    out, lse = torch.empty_like(Q), torch.empty(1, 4, 8, device=DEVICE)
    if bad == "features":
        out = out.mT.contiguous().mT
    elif bad == "lse":
        lse = torch.empty(1, 8, 4, device=DEVICE).mT
    else:
        lse = lse.double()
    with pytest.raises(ValueError, match="tile_attention"):
        torch.ops.pydiffuse_triton.tile_attention(out, lse, Q, K, K, None, 0.25, *PLAN.to(DEVICE).tensors)
