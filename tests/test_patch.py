"""Every patch op on every backend against the float64 reference, what it promises, and bad input.

Levels to train at and which patches go next: test_patch_levels.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_map

import pydiffuse as pd
from pydiffuse._core.grids import KINDS, METHODS, PATHS, count_patches, grid_of, patch_sizes
from tests import helpers
from tests.cases.patch import (
    CASES,
    DIFFERENTIABLE,
    MIXES,
    SHAPES,
    TOLERANCE,
    Maker,
    takes_gradient,
)
from tests.helpers import (
    DEVICE,
    GPU,
    check_refused,
    doubled,
    leaves,
    relative_error,
    run,
)

BACKENDS = ["triton"] if GPU else ["cpu", "triton"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_case = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)
by_mix = pytest.mark.parametrize("case", MIXES, ids=lambda case: case.id)
FULL = {name: pair for name, pair in SHAPES.items() if name not in ("empty", "hollow")}


def arguments(case, shape, dtype=torch.float32, **options):
    return case.make(Maker(*shape, dtype, DEVICE, **options))


def values_and_gradients(case, given, backend):
    return helpers.values_and_gradients(case, given, backend, wants=lambda t: takes_gradient(case, t))


def assert_close(results, expected, kind, given=()):
    """`given` are the results whose gradient was given, in their precision."""
    least = 1e-2 * max((ref.double().norm().item() for ref in expected), default=0.0)
    for i, (out, ref) in enumerate(zip(results, expected, strict=True)):
        assert out.shape == ref.shape
        error = relative_error(out, ref, least)
        bound = max(getattr(TOLERANCE[t.dtype], kind) for t in (out, *given))
        assert error <= bound, f"{kind} {i}: {error:.2e} > {bound:.0e}"


def check(case, given, backend):
    results, gradients = values_and_gradients(case, given, backend)
    expected, slopes = values_and_gradients(case, doubled(given), "reference")
    assert_close(results, expected, "value")
    assert_close(gradients, slopes, "grad", results)


@by_case
@pytest.mark.parametrize("shape", FULL.values(), ids=FULL)
def test_values_and_gradients(case, shape):
    check(case, arguments(case, shape), BACKENDS[0])


@pytest.mark.skipif(GPU, reason="this run is for a GPU, where Triton is the first backend already")
@by_case
@pytest.mark.parametrize("shape", [SHAPES["image"], SHAPES["video"]], ids=["image", "video"])
def test_values_and_gradients_in_triton(case, shape):
    check(case, arguments(case, shape), "triton")


@by_mix
@by_backend
@pytest.mark.parametrize("name", ["empty", "hollow"])
def test_images_without_elements(case, backend, name):
    given = arguments(case, SHAPES[name])
    for out, ref in zip(run(case, given, backend), run(case, given, "reference"), strict=True):
        assert out.shape == ref.shape and torch.equal(out, ref)


@by_case
@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, dtype):
    check(case, arguments(case, SHAPES["image"], dtype), backend)


LAYOUTS = {
    "every_other": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "spaced": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@by_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(case, layout):
    check(case, arguments(case, SHAPES["oblong"], layout=layout), BACKENDS[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_path_kind_and_method(path, kind, method):
    m = Maker(*SHAPES["image"], device=DEVICE)
    more = {"ancestral": {"noise": m.image()}, "multistep": {"history": (m.image(), m.table(0, 0.3))}}
    args = (m.image(), m.image(), m.level(), m.level(), m.patch_size)
    kwargs = {"method": method, "path": path, "predicts": kind, "mask": m.mask(), **more.get(method, {})}
    found = leaves(pd.patch_step(*args, **kwargs))
    with pd.use_backend("reference"):
        args, kwargs = doubled((args, kwargs))
        expected = leaves(pd.patch_step(*args, **kwargs))
    for out, ref in zip(found, expected, strict=True):
        assert relative_error(out, ref) <= 1e-6


@by_case
@by_backend
def test_same_bits_twice_and_alone(case, backend):
    """Run to run, and whatever the neighbours in the batch."""
    given = arguments(case, SHAPES["oblong"])
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    if case.op == "patch_loss":
        return  # one number for the batch
    alone = tree_map(lambda t: t[1:2] if isinstance(t, torch.Tensor) else t, given)
    for a, b in zip(run(case, alone, backend), first[0], strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU's threads")
def test_threads_change_nothing():
    x, u = (torch.randn(1, 3, 256, 256) for _ in range(2))
    t, l = torch.rand(2, 1, 128 * 128)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = pd.patch_loss(x, u, l, t, 2)
            results.append((loss, *pd.patch_step(x, u, t, l, 2, method="ddim", path="vp")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["mask", "t_next"])
def test_patches_that_stay_keep_their_bits(backend, dtype, method, how):
    """Whatever is predicted for them, and their history; nor does a NaN there reach a gradient."""
    m = Maker((2, 3, 6, 8), 2, dtype, DEVICE)
    x, pred, past = m.image(), m.image(), m.image()
    t, to, mask = m.level(), m.level(), m.mask()
    before = m.table(0.0, 0.05)
    options = {"method": method, "path": "trig"}
    if how == "mask":
        options["mask"] = mask
    else:
        to = torch.where(mask, to, t)
    stays = ~mask.view(2, 1, 3, 1, 4, 1).expand(2, 3, 3, 2, 4, 2).reshape(x.shape)
    pred[stays] = float("nan")
    if method == "multistep":
        past[stays] = float("inf")
        options["history"] = (past, before)
    x.requires_grad_(), pred.requires_grad_()
    with pd.use_backend(backend):
        y, now, *kept = pd.patch_step(x, pred, t, to, 2, **options)
        dx, dpred = torch.autograd.grad(y.float().sum(), (x, pred))
    assert torch.equal(y[stays], x[stays]) and y[~stays].isfinite().all()
    assert torch.equal(now, torch.where(mask, to, t))
    assert (dx[stays] == 1).all() and (dpred[stays] == 0).all() and dpred.isfinite().all()
    if method == "multistep":
        ((slope, last),) = kept
        assert torch.equal(slope[stays], past[stays]) and slope[~stays].isfinite().all()
        assert torch.equal(last, torch.where(mask, t, before))


@by_backend
def test_out_may_be_x(backend):
    """To the bit, though kernels go another way where an output is what another one reads."""
    m = Maker((2, 3, 6, 40), 2, device=DEVICE)
    x, pred, u, t, to, mask = m.image(), m.image(), m.image(), m.level(), m.level(), m.mask()
    options = {"uncond": u, "scale": 2.0, "mask": mask, "method": "multistep"}
    options["history"] = (m.image(), m.table(0.0, 0.05))
    with pd.use_backend(backend):
        expected = leaves(pd.patch_step(x, pred, t, to, 2, **options))
        other = torch.empty(2, 3, 40, 6, device=DEVICE).mT
        found = pd.patch_step(x, pred, t, to, 2, out=other, **options)
        assert found[0] is other and torch.equal(other, expected[0])
        found = leaves(pd.patch_step(x, pred, t, to, 2, out=x, **options))
    assert found[0] is x and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_patches_writes_to_out(backend, dtype):
    """In memory of any order, and in that of its inputs."""
    m = Maker((2, 3, 6, 40), 2, dtype, DEVICE)
    x1, noise, t = m.image(), m.image(), m.level()
    with pd.use_backend(backend):
        expected = pd.noise_patches(x1, t, 2, "vp", noise)
        fresh = (torch.empty_like(x1), torch.empty(2, 3, 40, 6, dtype=dtype, device=DEVICE).mT)
        pairs = (fresh, (x1.clone(), noise.clone()), (noise.clone(), x1.clone()))
        for data, eps, out in (
            (x1, noise, pairs[0]),
            (pairs[1][0], pairs[1][1], pairs[1]),
            (pairs[2][1], pairs[2][0], pairs[2]),
        ):
            found = pd.noise_patches(data, t, 2, "vp", eps, out=out)
            for a, b, c in zip(found, out, expected, strict=True):
                assert a is b and torch.equal(a, c)


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU's caches")
def test_outputs_too_large_for_the_caches():
    """From 4 MB on they are written past them, where rows are aligned and where not."""
    for width in (640, 628):
        x1, noise = torch.randn(2, 1, 4, 512, width)
        t = torch.rand(1, 256 * width // 2)
        found = pd.noise_patches(x1, t, 2, noise=noise)
        with pd.use_backend("reference"):
            expected = pd.noise_patches(x1, t, 2, noise=noise)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-6


def test_merged_dimensions_are_the_same_patches():
    """A grid in its fewest dimensions numbers the patches as the image does."""
    for shape, patch_size in SHAPES.values():
        sizes = patch_sizes("test", shape, patch_size)
        grid, count = grid_of(shape, sizes), count_patches(shape, sizes)
        assert grid.patches == count and math.prod(grid.sizes) == math.prod(shape[1:])
    (channels, *size), patch = grid_of((2, 3, 4, 6, 10), (1, 6, 10))
    assert (channels, *size, *patch) == (3, 1, 1, 240, 1, 1, 60)


@by_backend
def test_one_step_to_the_end_finds_the_data(backend):
    """A prediction that is right takes any patch to x1, on every path, from every kind."""
    m = Maker((2, 3, 6, 8), 2, device=DEVICE)
    x1, noise, t = m.image(), m.image(), m.level()
    with pd.use_backend(backend):
        for path in PATHS:
            for kind in KINDS:
                x, target = pd.noise_patches(x1, t, 2, path, noise, target=kind)
                y, now = pd.patch_step(x, target, t, 1.0, 2, method="ddim", path=path, predicts=kind)
                assert relative_error(y, x1) < 1e-6 and (now == 1).all()
                for other in KINDS:
                    expected = pd.noise_patches(x1, t, 2, path, noise, target=other)[1]
                    found = pd.convert(x, target, t, kind, other, 2, path=path)
                    assert relative_error(found, expected) < 1e-5, (path, kind, other)


def test_diff2flow_in_closed_form():
    """u = ((2t - 1)/Q) x - v/sqrt(Q), u = (x - eps)/t, at the state of the linear path."""
    x, p = (torch.randn(2, 3, 4, 4, device=DEVICE) for _ in range(2))
    t = torch.tensor([0.3, 0.8], device=DEVICE)
    s = t.view(-1, 1, 1, 1)
    Q = s**2 + (1 - s) ** 2
    torch.testing.assert_close(pd.convert(x, p, t, "v", "flow"), (2 * s - 1) / Q * x - p / Q.sqrt())
    torch.testing.assert_close(pd.convert(x, p, t, "eps", "flow"), (x - p) / s)


def test_ancestral_keeps_the_variance():
    """On the variance-preserving path unit variance stays, at any eta; eta = 0 is ddim."""
    g = torch.Generator().manual_seed(0)
    x1, eps, n = torch.randn(3, 1, 1, 400, 400, generator=g).to(DEVICE)
    for eta in (0.0, 0.5, 1.0):
        x, v = pd.noise_patches(x1, 0.3, None, "vp", eps)
        y, _ = pd.patch_step(x, v, 0.3, 0.6, method="ancestral", path="vp", noise=n, eta=eta)
        assert abs(y.std().item() - 1) < 1e-2
        if eta == 0:
            assert torch.equal(y, pd.patch_step(x, v, 0.3, 0.6, method="ddim", path="vp")[0])


def test_multistep_is_of_second_order():
    """dx/dt = x, a slope per step: halving the steps quarters the error."""

    def error(steps):
        x = torch.ones(1, 1, 2, 2, device=DEVICE)
        t, history = torch.zeros(1, 1, device=DEVICE), None
        for i in range(steps):
            x, t, history = pd.patch_step(
                x, x, t, (i + 1) / steps, None, method="multistep", history=history
            )
        return abs(x[0, 0, 0, 0].item() - math.e)

    assert 3.5 < error(32) / error(64) < 4.5


def test_drawn_noise_is_the_generators():
    """A CPU generator gives one draw, whatever the backend and dtype."""
    x, t = torch.randn(2, 3, 4, 4, device=DEVICE), 0.0
    draws = []
    for backend in ("reference", *BACKENDS):
        with pd.use_backend(backend):
            draws.append(pd.noise_patches(x, t, 2, generator=torch.Generator().manual_seed(3))[0])
    expected = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert all(torch.equal(d, expected) for d in draws)


def test_loss_gives_its_head_no_way_to_the_prediction():
    """The second part's gradient by pred is zero, by definition."""
    p, u = (torch.randn(2, 3, 4, 4, device=DEVICE) for _ in range(2))
    l = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    p.requires_grad_()
    for nll in (0.0, 10.0):
        (dp,) = torch.autograd.grad(pd.patch_loss(p, u, l, None, 2, nll=nll), p)
        torch.testing.assert_close(dp, 2 * (p - u).detach() / p.numel())
    assert pd.patch_loss(p[:0], u[:0], None, None, 2).isnan()


@by_backend
def test_low_levels_are_refused_or_nan(backend):
    x = torch.zeros(1, 1, 2, 2, device=DEVICE)
    t = torch.tensor([[1.5]], device=DEVICE)
    with pd.use_backend(backend):
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=r"noise_patches: t .*\[0, 1\]"):
                pd.noise_patches(x, t, 2, noise=x)
            with pytest.raises(ValueError, match=r"dual_loop_t: t .*\[0, 1\]"):
                pd.dual_loop_t(t, 1, t, dt=0.1, steps=2)
        else:
            assert pd.noise_patches(x, t, 2, noise=x)[0].isnan().all()
            assert pd.dual_loop_t(t, 1, t, dt=0.1, steps=2).isnan().all()


X, P = (torch.zeros(2, 3, 4, 6, device=DEVICE) for _ in range(2))
T = torch.full((2, 6), 0.5, device=DEVICE)
BAD = {  # what is wrong: (the call, the words its error must hold)
    "t high": (lambda: pd.patch_step(X, P, 1.5, 1.0, 2), ["patch_step", "t is 1.5", "0 (noise) to 1"]),
    "t_next low": (lambda: pd.patch_step(X, P, T, -0.1, 2), ["patch_step", "t_next is -0.1"]),
    "t shape": (lambda: pd.patch_step(X, P, T[:, :5], 1.0, 2), ["t has shape (2, 5)", "(2, 6)", "6 patches"]),
    "t dtype": (lambda: pd.noise_patches(X, T.long(), 2), ["noise_patches", "int64", "float"]),
    "t type": (lambda: pd.noise_patches(X, None, 2), ["noise_patches", "NoneType", "(B, N)"]),
    "t gradient": (lambda: pd.noise_patches(X, T.clone().requires_grad_(), 2), ["gradient", "detach"]),
    "patch_size": (lambda: pd.noise_patches(X, T, 4), ["(4, 4)", "does not divide", "(4, 6)"]),
    "patch_size count": (lambda: pd.noise_patches(X, T, (1, 2, 2)), ["3 values", "2 spatial"]),
    "patch_size zero": (lambda: pd.noise_patches(X, T, 0), ["(0, 0)", "positive"]),
    "x flat": (lambda: pd.noise_patches(X[0, 0], T, 2), ["[B, C, H, W]", "(4, 6)"]),
    "shapes": (lambda: pd.patch_step(X, P[:, :2], T, T, 2), ["patch_step", "alike", "(2, 2, 4, 6)"]),
    "float64": (lambda: pd.noise_patches(X.double(), T, 2), ["float64", "use_backend"]),
    "mask dtype": (lambda: pd.patch_step(X, P, T, T, 2, mask=T), ["mask", "float32", "torch.bool", "(2, 6)"]),
    "mask shape": (lambda: pd.patch_step(X, P, T, T, 2, mask=T[:1] > 0), ["mask", "(1, 6)", "(2, 6)"]),
    "method": (lambda: pd.patch_step(X, P, T, T, 2, method="heun"), ["method", "'heun'", "multistep"]),
    "path": (lambda: pd.noise_patches(X, T, 2, "ve"), ["noise_patches", "path", "'ve'", "trig"]),
    "predicts": (lambda: pd.patch_step(X, P, T, T, 2, predicts="x0"), ["predicts", "'x0'", "eps"]),
    "target": (lambda: pd.convert(X, P, T, "v", "u", 2), ["convert", "target", "'u'", "flow"]),
    "scale alone": (lambda: pd.patch_step(X, P, T, T, 2, scale=2.0), ["scale", "uncond"]),
    "scale shape": (
        lambda: pd.patch_step(X, P, T, T, 2, uncond=P, scale=torch.ones(3)), ["scale", "(3,)", "(2,)"]
    ),
    "scale gradient": (
        lambda: pd.patch_step(X, P, T, T, 2, uncond=P, scale=torch.ones(2, requires_grad=True)),
        ["scale", "pydiffuse.cfg"],
    ),
    "noise unused": (lambda: pd.patch_step(X, P, T, T, 2, noise=P), ["noise", "'euler'", "ancestral"]),
    "history unused": (lambda: pd.patch_step(X, P, T, T, 2, history=(P, T)), ["history", "multistep"]),
    "history type": (
        lambda: pd.patch_step(X, P, T, T, 2, method="multistep", history=P), ["history", "the pair"]
    ),
    "eta": (lambda: pd.patch_step(X, P, T, T, 2, method="ancestral", eta=2), ["eta is 2", "0 to 1"]),
    "out alone": (lambda: pd.noise_patches(X, T, 2, noise=P, out=P), ["noise_patches", "out", "(x_t, target)"]),
    "out twice": (lambda: pd.noise_patches(X, T, 2, noise=P, out=(P, P)), ["out[1]", "another output"]),
    "out shape": (
        lambda: pd.noise_patches(X, T, 2, noise=P, out=(P, P[:, :2])), ["out[1]", "(2, 2, 4, 6)", "(2, 3, 4, 6)"]
    ),
    "out gradient": (
        lambda: pd.noise_patches(X.clone().requires_grad_(), T, 2, noise=P, out=(P.clone(), P.clone())),
        ["noise_patches", "no part in autograd"],
    ),
    "out dtype": (lambda: pd.patch_step(X, P, T, T, 2, out=X.half()), ["patch_step", "out", "float16"]),
    "k": (lambda: pd.select_patches(T, 7), ["select_patches", "k is 7", "0 to 6"]),
    "k negative": (lambda: pd.select_patches(T, -1), ["k is -1"]),
    "score": (lambda: pd.select_patches(T[0], 1), ["score", "(6,)", "(B, N)"]),
    "as_mask": (lambda: pd.select_patches(T, 1, as_mask=1), ["select_patches", "as_mask is 1", "True"]),
    "k of parts": (lambda: pd.dual_loop_t(T, 7, 0.0, dt=0.1, steps=2), ["dual_loop_t", "k is 7", "0 to 6"]),
    "steps": (lambda: pd.dual_loop_t(T, 1, 0.0, dt=0.1, steps=0), ["dual_loop_t", "steps is 0", "1 or more"]),
    "dt of parts": (lambda: pd.dual_loop_t(T, 1, T, dt=T[0], steps=2), ["dual_loop_t", "dt", "(6,)", "(2, 6)"]),
    "t of parts": (lambda: pd.dual_loop_t(T, 1, T[:, :5], dt=0.1, steps=2), ["dual_loop_t", "t has shape (2, 5)"]),
    "logvar": (lambda: pd.patch_loss(X, P, T[:1], None, 2), ["patch_loss", "logvar", "(1, 6)", "(2, 6)"]),
    "kind": (lambda: pd.sample_t(2, 3, "beta"), ["sample_t", "'beta'", "ltg"]),
    "shift": (lambda: pd.sample_t(2, 3, shift=0), ["shift is 0", "shift > 0"]),
    "mode_scale": (lambda: pd.sample_t(2, 3, "mode", mode_scale=2.0), ["mode_scale is 2.0", "1.75"]),
    "dt": (lambda: pd.next_t(T, "uniform"), ["next_t", "dt is None", "number >= 0"]),
    "index": (lambda: pd.next_t(T, "dual_loop", dt=0.1, index=2, steps=2), ["index is 2", "0 to 1"]),
    "schedule": (lambda: pd.next_t(T, "schedule", schedule=[[0.0] * 6], index=0), ["index is 0", "1 rows"]),
    "factor": (lambda: pd.next_t(T, "look_ahead", factor=0.5), ["factor is 0.5", "1 or more"]),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    call, words = row
    check_refused(call, (ValueError, TypeError), words)


def test_every_case_is_tested():
    mine = {case.op for case in CASES}
    assert mine == {op.name for op in pd.OPS.values() if op.stem == "patch"}
