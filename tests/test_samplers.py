"""Samplers against plain PyTorch loops, and where their patches meet."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pydiffuse import samplers
from pydiffuse.samplers import Prediction
from tests.helpers import DEVICE, relative_error

P, N = 2, 12


def field(t):
    """(B, N) on the pixels of a 6 x 8 image with patches of 2."""
    return t.view(-1, 1, 3, 1, 4, 1).expand(-1, 1, 3, 2, 4, 2).reshape(-1, 1, 6, 8)


class Net:
    """A prediction in which patches see each other, and a score, from fixed weights."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.weight = 0.4 * torch.randn(3, 3, 3, 3, generator=g, dtype=torch.float64).to(DEVICE)
        self.calls, self.levels = 0, []

    def __call__(self, x, t):
        self.calls += 1
        self.levels.append(t)
        v = torch.nn.functional.conv2d(x, self.weight.to(x.dtype), padding=1)
        v = torch.tanh(v + field(t).to(x.dtype))
        return Prediction(v, score=x[:, 0, ::2, ::2].flatten(1))


def start(dtype=torch.float32):
    g = torch.Generator().manual_seed(9)
    return torch.randn(2, 3, 6, 8, generator=g, dtype=torch.float64).to(DEVICE, dtype)


def top(score, k):
    ids = score.topk(k, 1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, ids, True)


def test_dual_loop_is_the_plain_loop():
    net, seen = Net(), []
    x = samplers.dual_loop(
        net, start(), P, steps=4, certain=5, inner=3, progress=lambda i, x, t: seen.append((i, t))
    )
    y, plain = start(torch.float64), Net()
    for i in range(4):
        t, dt = torch.full((2, N), i / 4, dtype=torch.float64, device=DEVICE), 1 / 4
        v, score, _ = plain(y, t)
        sure = top(score, 5)
        for j in range(3):
            if j:
                v, *_ = plain(y, t)
            step = torch.where(sure, dt if j == 0 else 0.0, dt / 3)
            y, t = y + field(step) * v, t + step
    assert relative_error(x, y) < 1e-6
    assert net.calls == plain.calls == 12
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    for i, t in seen:  # to the bit
        assert (t == torch.tensor((i + 1) / 4)).all()


def test_look_ahead_is_the_plain_loop():
    net, seen = Net(), []
    x = samplers.look_ahead(
        net, start(), P, steps=5, certain=4, factor=1.4, plain=-1, progress=lambda i, x, t: seen.append(t)
    )
    y, plain = start(torch.float64), Net()
    for i in range(5):
        t, dt = torch.full((2, N), i / 5, dtype=torch.float64, device=DEVICE), 1 / 5
        v, score, _ = plain(y, t)
        sure = top(score, 4)
        jump = torch.where(sure, (1.4 * t).clamp(max=1), t)
        w, *_ = plain(y + field(jump - t) * v, jump)
        y = y + dt * torch.where(field(sure) > 0, v, w)
    assert relative_error(x, y) < 1e-6
    for i, t in enumerate(seen):
        assert (t == torch.tensor((i + 1) / 5, dtype=torch.float32).item()).all()
    for a, b in zip(net.levels, plain.levels, strict=True):
        torch.testing.assert_close(a.double(), b)


@pytest.mark.parametrize("guided_jump", [False, True])
def test_look_ahead_is_guided_as_published(guided_jump):
    """The jump and the steps up to t = 0.05 see no guidance; the rest does."""

    class Guided(Net):
        def __call__(self, x, t):
            pred, score, _ = super().__call__(x, t)
            return Prediction(pred, score, uncond=0.5 * pred - 0.1 * x)

    net = Guided()
    x = samplers.look_ahead(net, start(), P, steps=25, certain=4, scale=3.0, guided_jump=guided_jump)
    y, plain = start(torch.float64), Guided()
    for i in range(25):
        t, dt = torch.full((2, N), i / 25, dtype=torch.float64, device=DEVICE), 1 / 25
        v, score, u = plain(y, t)
        if i / 25 <= 0.05:
            y = y + dt * v
            continue
        sure = top(score, 4)
        jump = torch.where(sure, (1.4 * t).clamp(max=1), t)
        guided = u + 3 * (v - u)
        w, _, u = plain(y + field(jump - t) * (guided if guided_jump else v), jump)
        y = y + dt * torch.where(field(sure) > 0, guided, u + 3 * (w - u))
    assert relative_error(x, y) < 1e-5
    assert net.calls == plain.calls == 2 + 2 * 23


@pytest.mark.parametrize("path", ["linear", "vp", "trig"])
@pytest.mark.parametrize("name", ["dual_loop", "look_ahead", "sparse_guidance", "diffusion_forcing"])
def test_predictions_of_the_noise_have_a_start(name, path):
    """At t = 0 they say nothing of the data: finite by default, refused where 0 is asked for."""
    sampler = getattr(samplers, name)
    more = {"path": path, "predicts": "eps"}
    net = Net()
    if name == "sparse_guidance":
        more |= {"steps": 3, "keep": 4, "scale": 2.0}
        net = lambda x, t, ids: torch.tanh(x)  # noqa: E731
    elif name == "diffusion_forcing":
        zero = torch.tensor([[0.0] * N, [0.5] * N, [1.0] * N])
        with pytest.raises(ValueError, match="starts at 0"):
            sampler(net, start(), P, schedule=zero, **more)
        assert sampler(net, start(), P, schedule=zero.clamp(min=0.01), **more).isfinite().all()
        return
    else:
        more |= {"steps": 3, "certain": 4}
    assert sampler(net, start(), P, **more).isfinite().all()
    with pytest.raises(ValueError, match="start is 0"):
        sampler(net, start(), P, start=0.0, **more)


def test_staggered_schedules():
    """No row in which nothing moves; blocks together, frames that are ready, shifted levels."""
    for lag in (0, 2, 3, 9):
        rows = samplers.staggered(4, 3, lag)
        assert (rows.diff(dim=0) > 0).any(1).all() and (rows[-1] == 1).all()
    assert torch.equal(samplers.staggered(4, 3, 9), samplers.staggered(4, 3, 3))
    blocks = samplers.staggered(5, 3, 2, block=2)
    assert torch.equal(blocks[:, 0], blocks[:, 1]) and torch.equal(blocks[:, 2], blocks[:, 3])
    assert torch.equal(blocks[:, ::2], samplers.staggered(3, 3, 2))
    ready = samplers.staggered(5, 3, 2, ready=2)
    assert (ready[:, :2] == 1).all() and torch.equal(ready[:, 2:], samplers.staggered(3, 3, 2))
    assert (samplers.staggered(2, 3, 1, ready=2) == 1).all()
    t = samplers.staggered(3, 4, 1).double()
    torch.testing.assert_close(samplers.staggered(3, 4, 1, shift=3.0).double(), 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 49])
@pytest.mark.parametrize("begin", [0.0, 0.3])
def test_all_patches_arrive_at_one(steps, begin):
    """Steps add up to the bit, whatever their number."""
    for sampler, more in ((samplers.dual_loop, {"inner": 3}), (samplers.look_ahead, {})):
        seen = []
        sampler(
            Net(), start(), P, steps=steps, certain=6, start=begin,
            progress=lambda i, x, t, seen=seen: seen.append(t), **more,
        )  # fmt: skip
        assert len(seen) == steps and (seen[-1] == 1).all()


@pytest.mark.parametrize("method", ["euler", "multistep"])
def test_diffusion_forcing_is_the_plain_loop(method):
    """Frames of a video, each with its own level, each starting two steps after the one before it."""
    frames, lag, steps = 4, 2, 3
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, frames, 4, 4, generator=g).to(DEVICE)
    seen = []

    def model(x, t):
        seen.append((x.clone(), t))
        return torch.sin(x.mean(2, keepdim=True) - x) * (1 + t.to(x.dtype)[:, None, :, None, None])

    schedule = samplers.staggered(frames, steps, lag)
    assert len(schedule) == steps + lag * (frames - 1) + 1
    assert (schedule.diff(dim=1) <= 0).all() and (schedule.diff(dim=0) >= 0).all()
    assert (schedule[0] == 0).all() and (schedule[-1] == 1).all()
    out = samplers.diffusion_forcing(model, x, (1, 4, 4), schedule=schedule, method=method)
    y, rows = x.double(), schedule.double().to(DEVICE)
    calls, seen = seen, []
    last, before = torch.zeros_like(y), rows[0]
    for now, to in pairwise(rows):
        v = model(y, now.expand(2, -1))
        h, gap = to - now, now - before
        r = torch.where(gap > 0, h / torch.where(gap > 0, gap, 1), 0)
        r = r[:, None, None] if method == "multistep" else 0 * r[:, None, None]
        y = y + h[:, None, None] * ((1 + r / 2) * v - r / 2 * last)
        moved = (h > 0)[:, None, None]
        last, before = torch.where(moved, v, last), torch.where(h > 0, now, before)
    assert relative_error(out, y) < 1e-6
    (x0, _), (x1, _) = calls[:2]
    assert torch.equal(x0[:, :, 1:], x1[:, :, 1:])  # frames that wait keep their bits


def test_sparse_guidance_is_the_plain_loop():
    net, kept = Net(), []

    def model(x, t, ids):
        v = net(x, t).pred
        if ids is None:
            return v
        kept.append(ids)
        return v * field(torch.zeros(2, N, device=DEVICE).scatter_(1, ids, 1.0)).to(x.dtype)

    g = torch.Generator().manual_seed(2)
    x = samplers.sparse_guidance(model, start(), P, steps=3, keep=7, scale=1.5, generator=g)
    drawn, y = kept, start(torch.float64)
    kept = []
    for i in range(3):
        t = torch.full((2, N), i / 3, dtype=torch.float64, device=DEVICE)
        dense, sparse = model(y, t, None), model(y, t, drawn[i])
        y = y + (sparse + 1.5 * (dense - sparse)) / 3
    assert relative_error(x, y) < 1e-6
    assert all(ids.shape == (2, 7) and (ids.diff(dim=1) > 0).all() for ids in drawn)
    again = samplers.sparse_guidance(
        model, start(), P, steps=3, keep=7, scale=1.5, generator=g.manual_seed(2)
    )
    assert torch.equal(again, x)


def test_guidance_and_other_steps_pass_through():
    """uncond= of a prediction, and what patch_step takes by name."""

    def guided(x, t):
        p = Net()(x, t)
        return p._replace(uncond=0.5 * p.pred)

    def scaled(x, t):
        p = Net()(x, t)
        return p._replace(pred=0.5 * p.pred + 2.0 * (p.pred - 0.5 * p.pred))

    a = samplers.dual_loop(guided, start(), P, steps=3, certain=5, scale=2.0)
    b = samplers.dual_loop(scaled, start(), P, steps=3, certain=5)
    assert relative_error(a, b) < 1e-6
    options = {"method": "ancestral", "path": "vp", "generator": torch.Generator().manual_seed(1)}
    assert samplers.dual_loop(Net(), start(), P, steps=3, certain=5, **options).isfinite().all()


def test_the_state_is_one_buffer_without_gradients():
    """In place under no_grad, and never in the caller's x; the same values either way."""
    seen, x = [], start()
    expected = samplers.dual_loop(Net(), x, P, steps=3, certain=5, inner=2)
    with torch.no_grad():
        found = samplers.dual_loop(
            Net(), x, P, steps=3, certain=5, inner=2, progress=lambda i, x, t: seen.append(x.data_ptr())
        )
    assert torch.equal(found, expected) and torch.equal(x, start())
    assert set(seen) == {found.data_ptr()} and found.data_ptr() != x.data_ptr()
    with torch.no_grad():
        ahead = samplers.look_ahead(Net(), x, P, steps=4, certain=4)
    assert torch.equal(ahead, samplers.look_ahead(Net(), x, P, steps=4, certain=4))


BAD = {
    "steps": (lambda: samplers.dual_loop(Net(), start(), P, steps=0, certain=1), "steps is 0"),
    "start": (
        lambda: samplers.look_ahead(Net(), start(), P, steps=2, certain=1, start=1.0), "start is 1.0"
    ),
    "no score": (
        lambda: samplers.dual_loop(lambda x, t: x, start(), P, steps=2, certain=1), "returned no score"
    ),
    "certain": (lambda: samplers.dual_loop(Net(), start(), P, steps=2, certain=13), "0 to 12"),
    "inner": (lambda: samplers.dual_loop(Net(), start(), P, steps=2, certain=1, inner=0), "inner is 0"),
    "multistep": (
        lambda: samplers.look_ahead(Net(), start(), P, steps=2, certain=1, method="multistep"), "multistep"
    ),
    "schedule": (
        lambda: samplers.diffusion_forcing(Net(), start(), P, schedule=torch.zeros(3, 5)), r"\(K, 12\)"
    ),
    "staggered": (lambda: samplers.staggered(0, 3, 1), "frames is 0"),
    "shift": (lambda: samplers.staggered(2, 3, 1, shift=0.0), "shift is 0"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    call, words = row
    with pytest.raises(ValueError, match=words):
        call()
