"""Levels of patches: their distributions, the selection of patches, and where patches go next."""

from __future__ import annotations

import math

import pytest
import torch

import pydiffuse as pd
from tests.helpers import DEVICE, GPU

BACKENDS = ["triton"] if GPU else ["cpu", "triton"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def test_nobody_knows_more_than_the_bound():
    """ltg over 10^6 draws: max t_i <= the bound, which is the generator's first draw."""
    for loc, scale, std in ((0.0, 1.0, 0.25), (1.0, 2.0, 0.6), (-1.0, 0.5, 0.05)):
        g = torch.Generator().manual_seed(5)
        t = pd.sample_t(4000, 256, "ltg", loc=loc, scale=scale, std=std, generator=g)
        bound = torch.sigmoid(loc + scale * torch.randn(4000, 1, generator=g.manual_seed(5)))
        assert t.numel() > 10**6 and (t <= bound).all() and (t >= 0).all()
        assert (t < bound).float().mean() > 0.99


def test_noise_does_not_decrease():
    """nondecreasing over 10^6 draws, with and without a shift; every level occurs."""
    for shift in (1.0, 3.0):
        g = torch.Generator().manual_seed(6)
        t = pd.sample_t(65000, 16, "nondecreasing", shift=shift, generator=g)
        assert t.numel() > 10**6 and (t.diff(dim=1) <= 0).all() and t.min() >= 0 and t.max() <= 1
    t = pd.sample_t(65000, 16, "nondecreasing", generator=torch.Generator().manual_seed(6))
    assert t[:, 0].mean() > 0.7 > 0.3 > t[:, -1].mean() and abs(t.mean() - 0.5) < 0.01


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "ltg", "nondecreasing"])
def test_levels_are_levels(kind):
    g = torch.Generator().manual_seed(1)
    t = pd.sample_t(500, 40, kind, generator=g)
    assert t.dtype == torch.float32 and t.shape == (500, 40) and t.min() >= 0 and t.max() <= 1
    shifted = pd.sample_t(500, 40, kind, shift=0.3, generator=g.manual_seed(1))
    torch.testing.assert_close(shifted, 0.3 * t / (1 - 0.7 * t))


def test_mode_and_logit_normal_have_their_distribution():
    """The quantiles that their formulas map 1/4 and 3/4 to."""
    g = torch.Generator().manual_seed(2)
    quarters = torch.tensor([0.25, 0.5, 0.75])
    t = pd.sample_t(1000, 200, "mode", mode_scale=1.29, generator=g).flatten()
    u = quarters.flip(0)
    expected = 1 - u - 1.29 * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    torch.testing.assert_close(t.quantile(quarters), expected, atol=5e-3, rtol=0)
    t = pd.sample_t(1000, 200, "logit_normal", loc=0.5, scale=2.0, generator=g).flatten()
    expected = torch.sigmoid(0.5 + 2.0 * torch.tensor([-0.67449, 0.0, 0.67449]))
    torch.testing.assert_close(t.quantile(quarters), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selection_is_exact(backend, dtype):
    """Against Python's sort: ties, infinities, both zeros, NaN; every k at the ends."""
    g = torch.Generator().manual_seed(4)
    for n in (1, 7, 1030):
        score = torch.randn(5, n, generator=g).to(dtype)
        score[1, ::2] = 0.5
        score[2] = torch.where(torch.arange(n) % 3 == 0, -0.0, 0.0)
        score[3, ::3], score[3, 1::3] = float("nan"), float("-inf")
        score[4, ::4] = float("inf")
        slow = backend == "triton" and not GPU  # the interpreter takes seconds for what is left
        for k in {n // 3} if slow else sorted({0, 1, n // 2, n - 1, n}):
            with pd.use_backend(backend):
                ids, rest = pd.select_patches(score.to(DEVICE), k)
                mask = pd.select_patches(score.to(DEVICE), k, as_mask=True)
            for b, row in enumerate(score.tolist()):
                order = sorted(
                    range(n), key=lambda i: (row[i] != row[i], -row[i] if row[i] == row[i] else 0)
                )
                assert ids[b].tolist() == sorted(order[:k])
                assert rest[b].tolist() == sorted(order[k:])
                assert mask[b].nonzero().flatten().tolist() == sorted(order[:k])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_dual_loop_meets_exactly(parts):
    """From random levels, by a random dt: sure or not, all patches are at t + dt, to the bit."""
    g = torch.Generator().manual_seed(8)
    for _ in range(20):
        start = torch.rand(4, 64, generator=g).to(DEVICE)
        dt = torch.rand(4, generator=g).to(DEVICE)
        mask = (torch.rand(4, 64, generator=g) > 0.5).to(DEVICE)
        t = start
        for i in range(parts):
            to = pd.next_t(start, "dual_loop", dt=dt, mask=mask, index=i, steps=parts)
            assert (to >= t).all()
            if i:
                assert torch.equal(to[mask], t[mask])
            t = to
        assert torch.equal(t, (start + dt[:, None]).clamp(max=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_levels_of_the_dual_loop(backend, steps):
    """The parts next_t has, from any t by any dt; all patches meet at min(t + dt, 1), to the bit."""
    n = 1030 if backend == "cpu" else 40
    g = torch.Generator().manual_seed(8)
    score = torch.randn(3, n, generator=g).to(DEVICE)
    score[1] = score[1].round()  # ties
    begins = (
        torch.rand(3, n, generator=g),
        torch.rand(n, 3, generator=g).mT,
        torch.rand(3, generator=g),
        0.25,
    )
    steps_by = (0.3, torch.rand(3, generator=g), torch.rand(3, n, generator=g), torch.tensor(0.1))
    for t, dt in zip(begins, steps_by, strict=True):
        t, dt = (v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in (t, dt))
        with pd.use_backend(backend):
            levels = pd.dual_loop_t(score, n // 3, t, dt=dt, steps=steps)
            sure = pd.select_patches(score, n // 3, as_mask=True)
            alone = pd.dual_loop_t(
                score[1:2],
                n // 3,
                t[1:2] if isinstance(t, torch.Tensor) else t,
                dt=dt[1:2] if isinstance(dt, torch.Tensor) and dt.dim() else dt,
                steps=steps,
            )
        begin = torch.as_tensor(t, device=DEVICE)
        begin = (begin[:, None] if begin.dim() == 1 else begin).expand(3, n)
        assert levels.shape == (steps, 3, n) and torch.equal(alone, levels[:, 1:2])
        for j, found in enumerate(levels):
            expected = pd.next_t(begin, "dual_loop", dt=dt, mask=sure, index=j, steps=steps)
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
            assert torch.equal(found[sure], expected[sure])
            assert (found >= (levels[j - 1] if j else begin)).all()
        assert torch.equal(levels[-1], expected)


@by_backend
def test_levels_of_no_patches(backend):
    with pd.use_backend(backend):
        assert pd.dual_loop_t(torch.zeros(0, 4, device=DEVICE), 1, 0.5, dt=0.1, steps=2).shape == (
            2,
            0,
            4,
        )
        assert pd.select_patches(torch.zeros(2, 0, device=DEVICE), 0, as_mask=True).shape == (2, 0)


BAD_VALUES = [float("nan"), float("inf"), -0.5]


@pytest.mark.skipif(GPU, reason="on a GPU values are not looked at: that would be a sync")
@by_backend
@pytest.mark.parametrize("value", [*BAD_VALUES, 1.5])
def test_levels_that_are_none(backend, value):
    """NaN, infinite, negative, beyond 1: refused wherever a level comes as a tensor."""
    x, t = torch.randn(2, 3, 4, 4), torch.full((2, 4), 0.25)
    bad = t.clone()
    bad[1, 2] = value
    calls = {
        "t": lambda: pd.patch_step(x, x, bad, t, 2),
        "t_next": lambda: pd.patch_step(x, x, t, bad, 2),
        "history": lambda: pd.patch_step(x, x, t, t, 2, method="multistep", history=(x, bad)),
        "noise": lambda: pd.noise_patches(x, bad, 2),
        "convert": lambda: pd.convert(x, x, bad, "flow", "eps", 2),
        "schedule": lambda: pd.next_t(t, "schedule", schedule=torch.stack([t, bad])),
        "dual": lambda: pd.dual_loop_t(t, 1, bad, dt=0.1, steps=2),
    }
    if value != 1.5:  # a step may be longer
        calls |= {
            "dt": lambda: pd.next_t(t, dt=bad),
            "dual dt": lambda: pd.dual_loop_t(t, 1, t, dt=bad, steps=2),
        }
    with pd.use_backend(backend):
        for name, call in calls.items():
            with pytest.raises(ValueError):
                call()
                pytest.fail(f"{name} took {value}")


@pytest.mark.parametrize("name", ["loc", "scale", "std", "shift"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_draws_from_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=name):
        pd.sample_t(2, 3, "ltg", **{name: value})
