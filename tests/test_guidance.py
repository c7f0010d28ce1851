"""Every guidance op on every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import pydiffuse
from tests.cases.guidance import CASES, SHAPES, TOLERANCE
from tests.helpers import (
    BACKENDS,
    DEVICE,
    arguments,
    check,
    leaves,
    relative_error,
    run,
    values_and_gradients,
)

DTYPES = list(TOLERANCE)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_case
@by_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(case, backend, shape):
    given = arguments(case, shape, torch.float32)
    check(case, given, backend, TOLERANCE, torch.float32)


@by_case
@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, dtype):
    given = arguments(case, SHAPES["odd"], dtype)
    check(case, given, backend, TOLERANCE, dtype)


def every_other(t):
    return torch.stack([t, t], 1).flatten(0, 1)[::2]


def transposed(t):
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def spaced(t):
    return torch.stack([t, t], -1)[..., 0]


def expanded(t):
    return t[:1].expand_as(t)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every_other_sample": every_other,
    "transposed": transposed,
    "spaced": spaced,
    "expanded": expanded,
}


@by_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(case, layout):
    given = arguments(case, SHAPES["odd"], torch.float32, layout=layout)
    check(case, given, BACKENDS[0], TOLERANCE, torch.float32)


def test_mixed_layouts():
    c, u, x = (torch.randn(2, 4, 6, 5, device=DEVICE) for _ in range(3))
    last = torch.channels_last
    expected = pydiffuse.guide([c, u], "tcfg", scale=3.0, x=x, b=0.1)
    mixed = pydiffuse.guide([c.contiguous(memory_format=last), u], "tcfg", scale=3.0, x=x, b=0.1)
    assert torch.equal(mixed, expected)
    mixed = pydiffuse.guide([c, u], "tcfg", scale=3.0, x=x.contiguous(memory_format=last), b=0.1)
    assert torch.equal(mixed, expected) and mixed.is_contiguous(memory_format=last)


@by_case
@by_backend
def test_same_bits_twice_and_alone(case, backend):
    """Run to run, and whatever the neighbours in the batch."""
    given = arguments(case, (3, 9001), torch.float32)
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    alone = torch.utils._pytree.tree_map(lambda t: t[1:2] if isinstance(t, torch.Tensor) else t, given)
    for a, b in zip(run(case, alone, backend), run(case, given, backend), strict=True):
        assert torch.equal(a[0], b[1])


def test_threads_change_nothing():
    c, u = (torch.randn(2, 100_003) for _ in range(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pydiffuse.tcfg(c, u, 7.5, rescale=0.5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


SCALES = (-3.0, 0.0, 0.3, 1.0, 1.7, 7.5, 100.3)
OF_EQUALS = {  # what is left of equal predictions c is c
    "cfg": lambda c, w: pydiffuse.cfg(c, c.clone(), w),
    "cfg, a scale per sample": lambda c, w: pydiffuse.cfg(c, c.clone(), torch.full((len(c),), w)),
    "cfg, original": lambda c, w: pydiffuse.cfg(c, c.clone(), w, original=True),
    "tcfg": lambda c, w: pydiffuse.tcfg(c, c.clone(), w),
    "magnitude_aware": lambda c, w: pydiffuse.magnitude_aware(c, c.clone(), w),
    "apg": lambda c, w: pydiffuse.apg(c, c.clone(), w),
    "slerp": lambda c, w: pydiffuse.slerp(c, c.clone(), w),
    "perp_neg": lambda c, w: pydiffuse.perp_neg(c, c.clone(), [c.clone()], w, [1.5]),
    "compose": lambda c, w: pydiffuse.compose([c, c.clone(), c.clone()], c.clone(), [w, 1.5, -2.0]),
    "compose, many": lambda c, w: pydiffuse.compose(
        [c] * 7, c.clone(), [w, 2.0, -1.0, 3.0, 1.0, 1.0, 1.0]
    ),
    "guide": lambda c, w: pydiffuse.guide([c, c.clone()], "cfg", x=torch.zeros_like(c), scale=w),
    "patch_step": lambda c, w: pydiffuse.patch_step(
        c.new_zeros(c.shape),
        c,
        torch.zeros(len(c), 4),
        torch.ones(len(c), 4),
        8,
        uncond=c.clone(),
        scale=w,
    )[0],
}


@by_backend
@pytest.mark.parametrize("op", OF_EQUALS.values(), ids=OF_EQUALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_predictions_come_back_exactly(backend, op, dtype):
    c = torch.randn(3, 2, 16, 16, device=DEVICE).to(dtype)
    with pydiffuse.use_backend(backend):
        for scale in SCALES:
            assert torch.equal(op(c, scale), c), scale


@by_backend
def test_far_coefficients_keep_their_terms(backend):
    """Sums around one prediction only where that loses nothing: a tiny u, and coefficients far apart."""
    c = torch.randn(2, 3000, device=DEVICE)
    u = 1e-6 * torch.randn(2, 3000, device=DEVICE)
    for preds, weights in ([c, u], (1e-3, 1.0)), ([u, c], (1e3, -1.0)), ([u, c], (1.0, 1.0)):
        with pydiffuse.use_backend(backend):
            out = pydiffuse.guide(preds, "linear", x=torch.zeros_like(c), weights=weights)
        ref = sum(w * p.double() for w, p in zip(weights, preds, strict=True))
        size = sum(abs(w) * p.double().abs() for w, p in zip(weights, preds, strict=True))
        assert ((out - ref).abs() <= 2e-7 * 2 * size).all()


@by_backend
def test_nan_and_inf_stay_in_their_sample(backend):
    c, u = (torch.randn(4, 3000, device=DEVICE) for _ in range(2))
    clean = c.clone()
    c[1, 7], c[2, 11] = float("nan"), float("inf")
    for op in ("cfg", "tcfg", "cfg_zero", "apg", "magnitude_aware", "slerp"):
        with pydiffuse.use_backend(backend):
            out = getattr(pydiffuse, op)(c, u, 0.7)
            good = getattr(pydiffuse, op)(clean, u, 0.7)
        assert torch.equal(out[[0, 3]], good[[0, 3]])
        assert out[1, 7].isnan()
        if op != "cfg":
            assert out[1].isnan().all() and not out[2].isfinite().all()


@by_backend
@pytest.mark.parametrize("size", [1e-22, 1e-10, 1e10, 1e18])
def test_extreme_values(backend, size):
    """Squares that float32 cannot hold: the inner products are float64."""
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(2, 500, generator=generator) * size
    u = c + 0.2 * size * torch.randn(2, 500, generator=generator)
    for op in ("tcfg", "apg", "magnitude_aware", "slerp"):
        with pydiffuse.use_backend("reference"):
            ref = getattr(pydiffuse, op)(c.double(), u.double(), 0.9)
        with pydiffuse.use_backend(backend):
            out = getattr(pydiffuse, op)(c.to(DEVICE), u.to(DEVICE), 0.9)
        assert relative_error(out.cpu(), ref) < 2e-6, op


def svd_tcfg(c, u, w):
    """TCFG as its paper has it, in float64: u on the first right singular vector."""
    rows = torch.stack([c, u], 1).flatten(2).double()
    first = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
    u = ((rows[:, 1] * first).sum(1, keepdim=True) * first).view(u.shape)
    return u + w * (c.double() - u)


@by_backend
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.0045], ids=["free", "near", "cosine_0.99999"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 4e-3)], ids=str)
def test_tcfg_is_the_svd(backend, apart, dtype, bound):
    u = torch.randn(2, 4, 33, 31, dtype=torch.float64)
    c = (u + apart * torch.randn_like(u)).to(dtype)
    u = u.to(dtype)
    with pydiffuse.use_backend(backend):
        out = pydiffuse.tcfg(c.to(DEVICE), u.to(DEVICE), 7.5)
    assert relative_error(out.cpu(), svd_tcfg(c, u, 7.5)) <= bound


@by_backend
def test_tcfg_of_many_is_the_svd(backend):
    preds = [torch.randn(3, 500) for _ in range(3)]
    preds[1] = preds[1] + 2 * preds[0]
    *conds, u = preds
    rows = torch.stack(preds, 1).double()
    first = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
    damped = (rows[:, -1] * first).sum(1, keepdim=True) * first
    expected = damped + sum(w * (c.double() - damped) for w, c in zip((3.0, 2.0), conds))
    with pydiffuse.use_backend(backend):
        out = pydiffuse.tcfg([c.to(DEVICE) for c in conds], u.to(DEVICE), [3.0, 2.0])
    assert relative_error(out.cpu(), expected) < 2e-6


ZERO, E1, E2 = torch.zeros(1, 4), torch.eye(4)[:1], torch.eye(4)[1:2]
DEGENERATE = {  # op, (cond, uncond), scale: what it must give
    "tcfg of zeros": ("tcfg", (ZERO, ZERO), 7.5, ZERO),
    "tcfg without u": ("tcfg", (E1, ZERO), 3.0, 3 * E1),
    "tcfg without c": ("tcfg", (ZERO, E2), 3.0, -2 * E2),
    "tcfg tie: u/2": ("tcfg", (E1, E2), 3.0, 3 * E1 - E2),
    "tcfg collinear: u": ("tcfg", (2 * E1, E1), 3.0, 4 * E1),
    "tcfg opposed": ("tcfg", (E1, -E1), 3.0, 5 * E1),
    "cfg_zero without u": ("cfg_zero", (E1, ZERO), 3.0, 3 * E1),
    "apg without c": ("apg", (ZERO, E2), 3.0, -2 * E2),
    "apg of equals": ("apg", (E1, E1), 3.0, E1),
    "mambo of equals": ("magnitude_aware", (E1, E1), 3.0, E1),
    "mambo without u": ("magnitude_aware", (E1, ZERO), 3.0, E1),
    "mambo of zeros": ("magnitude_aware", (ZERO, ZERO), 3.0, ZERO),
    "slerp of a zero": ("slerp", (E1, ZERO), 0.25, 0.75 * E1),
    "slerp collinear": ("slerp", (E1, 3 * E1), 0.5, 2 * E1),
    "slerp opposed": ("slerp", (E1, -E1), 0.25, 0.5 * E1),
    "slerp right angle": ("slerp", (E1, E2), 0.5, 0.5**0.5 * (E1 + E2)),
    "rescale of a constant": ("rescale", (torch.ones(1, 4), E1), 0.7, torch.ones(1, 4)),
    "rescale to a constant": ("rescale", (E1, torch.ones(1, 4)), 0.7, 0.3 * E1),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("row", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate(backend, row):
    op, pair, scale, expected = row
    c, u = (t.clone().to(DEVICE).requires_grad_() for t in pair)
    with pydiffuse.use_backend(backend):
        out = getattr(pydiffuse, op)(c, u, scale)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)
    for g in torch.autograd.grad(out.sum(), (c, u)):
        assert g.isfinite().all()


@by_backend
def test_rescale_of_one_element(backend):
    """One element has no spread, so nothing is rescaled."""
    c, u = torch.tensor([[2.0]], device=DEVICE), torch.tensor([[1.0]], device=DEVICE)
    with pydiffuse.use_backend(backend):
        assert pydiffuse.cfg(c, u, 3.0, rescale=0.7).item() == pytest.approx(4.0)


@by_backend
def test_rescale_of_what_cancels(backend):
    """Constant predictions: g is constant too, though the summands of its variance are large."""
    c, u = (torch.full((2, 4), value, device=DEVICE) for value in (1.0, 3.0))
    cut = torch.tensor([0.0, 2.0], device=DEVICE)
    options = {"eta": 0.2, "norm_threshold": cut, "original": True}
    with pydiffuse.use_backend(backend):
        plain = pydiffuse.apg(c, u, 3.0, **options)
        torch.testing.assert_close(pydiffuse.apg(c, u, 3.0, rescale=0.7, **options), plain)


@by_backend
def test_superpose_and_keeps_densities_alike(backend):
    """The property AND is defined by: every log-density moves by the same amount."""
    preds = [torch.randn(4, 300, device=DEVICE) for _ in range(3)]
    noise = torch.randn(4, 300, device=DEVICE)
    start = torch.zeros(3, device=DEVICE)
    with pydiffuse.use_backend(backend):
        _, new = pydiffuse.superpose(preds, start, 0.1, kind="and", noise=noise)
        same, _ = pydiffuse.superpose([preds[0]] * 3, start, 0.1, kind="and", noise=noise)
    assert (new - new[:, :1]).abs().max() < 1e-6
    torch.testing.assert_close(same, preds[0], rtol=1e-4, atol=1e-4)


@by_case
@by_backend
def test_out(case, backend):
    """out= holds the same bits, also where it is one of the inputs."""
    if case.op in ("gram", "superpose"):
        return
    args, kwargs = arguments(case, SHAPES["odd"], torch.float32)
    expected = run(case, (args, kwargs), backend)
    out = [torch.full_like(t, float("nan")) for t in expected]
    out = out[0] if len(out) == 1 else tuple(out)
    assert all(
        torch.equal(a, b) for a, b in zip(run(case, (args, {**kwargs, "out": out}), backend), expected)
    )
    first = next(t for t in leaves((args, kwargs)) if t.shape == expected[0].shape)
    if len(expected) == 1:
        reused = run(case, (args, {**kwargs, "out": first}), backend)[0]
        assert reused is first and torch.equal(first, expected[0])


def test_out_of_any_layout():
    c, u = (torch.randn(2, 3, 5, 4) for _ in range(2))
    expected = pydiffuse.tcfg(c, u, 3.0)
    for out in (
        torch.empty(2, 3, 4, 5).mT,
        torch.empty(2, 3, 5, 8)[..., ::2],
        torch.empty(4, 3, 5, 4)[::2],
    ):
        assert pydiffuse.tcfg(c, u, 3.0, out=out) is out and torch.equal(out, expected)


def test_multistep_out_may_be_the_history():
    c, u, x, history = (torch.randn(2, 3000) for _ in range(4))
    options = {"scale": 3.0, "a": 0.9, "b": 0.2, "h": 0.3, "predict": (1.1, -0.4)}
    expected = pydiffuse.guide([c, u], "tcfg", x=x, history=history, **options)
    pydiffuse.guide([c, u], "tcfg", x=x, history=history, out=(x, history), **options)
    assert torch.equal(x, expected[0]) and torch.equal(history, expected[1])
