"""The definition of every patch op in plain PyTorch: same names, same signatures, any device.

x is [B, C, *spatial], t (B, N) over its patches in raster order; t = 0 is noise, t = 1 data. A path
has x_t = alpha x1 + sigma eps:
    linear  alpha = t                sigma = 1 - t
    vp      alpha = t / sqrt(Q)      sigma = (1 - t) / sqrt(Q)     Q = t^2 + (1 - t)^2
    trig    alpha = sin(pi t / 2)    sigma = cos(pi t / 2)
vp is the linear path at unit variance: x_vp = x_linear / sqrt(Q), with the same signal to noise.
A prediction is a x1 + b eps:
    flow (1, -1)    v (-sigma, alpha) / hypot(alpha, sigma)    eps (0, 1)    x1 (1, 0)
Computed in float32, or in float64 for float64 inputs (the oracle of the tests), rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.draws import drawn
from pydiffuse._core.grids import OWN_KIND, PatchSize, count_patches, patch_sizes

Scalar = float | Tensor
Pair = tuple[Tensor, Tensor]


def _up(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _spread(c: Tensor, x: Tensor, patch_size: PatchSize) -> Tensor:
    """A value per patch (B, N) on every element: [B, 1, *spatial]."""
    sizes = patch_sizes("patch", x.shape, patch_size)
    c = c.reshape(x.shape[0], *(e // s if s else 0 for e, s in zip(x.shape[2:], sizes, strict=True)))
    for dim, size in enumerate(sizes, 1):
        c = c.repeat_interleave(size, dim)
    return c[:, None]


def _table(value: Scalar, x: Tensor, patch_size: PatchSize) -> Tensor:
    """A number, (B,) or (B, N), as (B, N)."""
    n = count_patches(x.shape, patch_sizes("patch", x.shape, patch_size))
    value = torch.as_tensor(value, device=x.device)
    value = value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (value[:, None] if value.dim() == 1 else value).expand(x.shape[0], n)


def level(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma and their slopes in t."""
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if path == "trig":
        half = math.pi / 2
        return (half * t).sin(), (half * t).cos(), half * (half * t).cos(), -half * (half * t).sin()
    Q = t * t + (1 - t) * (1 - t)
    alpha, sigma = t / Q.sqrt(), (1 - t) / Q.sqrt()
    return alpha, sigma, sigma / Q, -alpha / Q


def prediction(kind: str, alpha: Tensor, sigma: Tensor) -> Pair:
    """(a, b) of what a model predicts, a x1 + b eps."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if kind == "v":
        r = torch.hypot(alpha, sigma)
        return -sigma / r, alpha / r
    return {"flow": (one, -one), "eps": (zero, one), "x1": (one, zero)}[kind]


def from_prediction(source: Pair, wanted: Pair, alpha: Tensor, sigma: Tensor) -> Pair:
    """The coefficients of x and of the prediction in wanted[0] x1 + wanted[1] eps."""
    (a, b), (c, d) = source, wanted
    det = alpha * b - sigma * a
    return (c * b - d * a) / det, (d * alpha - c * sigma) / det


def sample_t(
    batch: int,
    patches: int,
    kind: str = "uniform",
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    std: float = 0.25,
    mode_scale: float = 1.29,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Levels to train at, (B, N).  uniform; logit_normal and mode: SD3, arXiv 2403.03206, 3.1; ltg: Patch
    Forcing, arXiv 2604.19141; nondecreasing: SkyReels-V2, arXiv 2504.13074; shift: SD3, 5.3.2."""
    where = generator.device if generator is not None else torch.device(device or "cpu")

    def normal(*shape: int) -> Tensor:
        return drawn(torch.randn, shape, generator, where)

    def uniform(*shape: int) -> Tensor:
        return drawn(torch.rand, shape, generator, where)

    if kind == "uniform":
        t = uniform(batch, patches)
    elif kind == "logit_normal":
        t = torch.sigmoid(loc + scale * normal(batch, patches))
    elif kind == "mode":
        u = uniform(batch, patches)
        t = 1 - u - mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
        t = t.clamp(0, 1)  # rounding only
    elif kind == "ltg":
        most = torch.sigmoid(loc + scale * normal(batch, 1))
        t = most - (most / 2).clamp(max=std) * normal(batch, patches).abs()
        t = torch.where(t < 0, uniform(batch, patches) * most, t)
    else:  # nondecreasing: a frame at a uniform level, cleaner ones before it, noisier ones after
        pivot, u = uniform(batch, 1), uniform(batch, patches)
        place = torch.arange(patches, device=where) - (uniform(batch, 1) * patches).floor()
        t = torch.where(place < 0, pivot + (1 - pivot) * u, torch.where(place > 0, pivot * u, pivot))
        t = t.clamp(max=1).sort(1, descending=True).values
    if shift != 1.0:
        t = t.double()  # a rounding that keeps the order
        t = (shift * t / (1 + (shift - 1) * t)).clamp(0, 1).float()
    return t if device is None else t.to(device)


def noise_patches(
    x1: Tensor,
    t: Scalar,
    patch_size: PatchSize = None,
    path: str = "linear",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    target: str | None = None,
    out: Pair | None = None,
) -> Pair:
    """x_t = alpha x1 + sigma eps and the target a x1 + b eps, each patch at its level."""
    if noise is None:
        noise = draw_like(x1, generator)
    alpha, sigma, *_ = level(_table(t, x1, patch_size), path)
    a, b = prediction(target or OWN_KIND[path], alpha, sigma)

    def sum_of(c: Tensor, d: Tensor) -> Tensor:
        y = _spread(c, x1, patch_size) * _up(x1) + _spread(d, x1, patch_size) * _up(noise)
        return y.to(x1.dtype)

    x_t, goal = sum_of(alpha, sigma), sum_of(a, b)
    return (x_t, goal) if out is None else (out[0].copy_(x_t), out[1].copy_(goal))


def draw_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn in float32 where the generator is: one draw on every device."""
    where = x.device if generator is None else generator.device
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return drawn(torch.randn, x.shape, generator, where, dtype=dtype).to(x.device, x.dtype)


def convert(
    x: Tensor,
    pred: Tensor,
    t: Scalar,
    source: str,
    target: str,
    patch_size: PatchSize = None,
    *,
    path: str = "linear",
) -> Tensor:
    """The same prediction as another kind: x1 and eps from (x, pred), then a x1 + b eps.

    From v, for x on the linear path: u = ((2t - 1)/Q) x - v/sqrt(Q); from eps: u = (x - eps)/t.
    Diff2Flow, arXiv 2506.02221.
    """
    alpha, sigma, *_ = level(_table(t, x, patch_size), path)
    given, wanted = (prediction(k, alpha, sigma) for k in (source, target))
    of_x, of_pred = from_prediction(given, wanted, alpha, sigma)
    y = _spread(of_x, x, patch_size) * _up(x) + _spread(of_pred, x, patch_size) * _up(pred)
    return y.to(pred.dtype)


def patch_step(
    x: Tensor,
    pred: Tensor,
    t: Scalar,
    t_next: Scalar,
    patch_size: PatchSize = None,
    *,
    uncond: Tensor | None = None,
    scale: Scalar = 1.0,
    mask: Tensor | None = None,
    method: str = "euler",
    path: str = "linear",
    predicts: str | None = None,
    eta: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    history: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> tuple[Any, ...]:
    """One step of every patch from its t to its t_next; g = uncond + scale (pred - uncond).

    euler      x' = x + h (alpha' x1 + sigma' eps), h = t_next - t, primes: slopes in t
    ddim       x' = alpha_next x1 + sigma_next eps
    ancestral  x' = alpha_next x1 + down eps + up n, q = sigma_next alpha / (alpha_next sigma),
               up = eta sigma_next sqrt(1 - q^2), down^2 + up^2 = sigma_next^2; backwards q = 1
    multistep  x' = x + h ((1 + r/2) f - r/2 f_last), f the slope at t, r = h / (t - t_last):
               Adams-Bashforth for steps of any length; r = 0 where t_last = t
    A patch outside the mask, or with t_next = t, keeps x, t and history.
    """
    now, then = _table(t, x, patch_size), _table(t_next, x, patch_size)
    moves = now != then if mask is None else (now != then) & mask
    # What a patch that stays is given is not looked at: not its NaN, not a level where nothing is defined.
    safe, goal = torch.where(moves, now, 0.5), torch.where(moves, then, 0.75)
    everywhere = _spread(moves, x, patch_size)

    def term(value: Tensor) -> Tensor:
        return torch.where(everywhere, _up(value), 0)

    g = term(pred)
    if uncond is not None:
        w = torch.as_tensor(scale, device=x.device).to(g.dtype)
        w = w.expand(x.shape[0]).reshape(-1, *[1] * (x.dim() - 1))
        g = w * g + (1 - w) * term(uncond)
    alpha, sigma, dalpha, dsigma = level(safe, path)
    kind = prediction(predicts or OWN_KIND[path], alpha, sigma)
    alpha_next, sigma_next, *_ = level(goal, path)
    h = goal - safe

    def combined(wanted: Pair) -> Tensor:
        of_x, of_g = from_prediction(kind, wanted, alpha, sigma)
        return _spread(of_x, x, patch_size) * term(x) + _spread(of_g, x, patch_size) * g

    if method in ("euler", "multistep"):
        slope = combined((dalpha, dsigma))
        f, f_last, t_last = slope, torch.zeros_like(slope), now
        if history is not None and method == "multistep":
            f_last, t_last = history[0], _table(history[1], x, patch_size)
            before = torch.where(moves, now - t_last, 0)
            r = torch.where(before > 0, h / torch.where(before > 0, before, 1), 0)
            half = _spread(r / 2, x, patch_size)
            f = (1 + half) * slope - half * term(f_last)
        y = _up(x) + _spread(h, x, patch_size) * f
    elif method == "ddim":
        y = combined((alpha_next, sigma_next))
    else:
        forward = goal > safe
        over = torch.where(forward, alpha_next * sigma, 1)
        q = torch.where(forward, sigma_next * alpha / over, 1).clamp(max=1)
        up = eta * sigma_next * (1 - q * q).sqrt()
        down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
        if noise is None:
            noise = draw_like(x, generator)
        y = combined((alpha_next, down)) + _spread(up, x, patch_size) * term(noise)
    y = torch.where(everywhere, y, _up(x)).to(x.dtype)
    y = y if out is None else out.copy_(y)
    arrived = torch.where(moves, then, now)
    if method != "multistep":
        return y, arrived
    kept = torch.where(everywhere, slope, _up(f_last)).to(x.dtype)
    return y, arrived, (kept, torch.where(moves, now, t_last))


def patch_loss(
    pred: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    weight: Tensor | None = None,
    patch_size: PatchSize = None,
    *,
    nll: float = 0.01,
) -> Tensor:
    """mean w (p - u)^2 + nll mean w 1/2 (log 2 pi + l + (u - sg p)^2 / e^l), means over elements.

    The second part trains the head that says how sure the model is of a patch, and nothing else: sg
    stops the gradient to the prediction.  Patch Forcing, arXiv 2604.19141.
    """
    p, u = _up(pred), _up(target)
    each = (p - u).square()
    if logvar is not None:
        l = _spread(_up(logvar), pred, patch_size)
        each = each + nll / 2 * (math.log(2 * math.pi) + l + (u - p.detach()).square() * (-l).exp())
    if weight is not None:
        each = _spread(_up(weight), pred, patch_size) * each
    return each.mean()


def select_patches(score: Tensor, k: int, *, as_mask: bool = False) -> Any:
    """The places of the k highest scores and of the others, each in ascending order, or a mask of the k.

    Of equal scores the first counts as the highest; NaN is below every number.
    """
    keys = torch.where(score.isnan(), -math.inf, score)
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices
    # A second stable sort puts NaN behind -inf.
    order = order.gather(1, torch.sort(score.gather(1, order).isnan().int(), dim=1, stable=True).indices)
    if as_mask:
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :k], True)
    return order[:, :k].sort(1).values, order[:, k:].sort(1).values


def dual_loop_t(score: Tensor, k: int, t: Scalar, *, dt: Scalar, steps: int) -> Tensor:
    """next_t for every part of a dual loop's step, (steps, B, N).  Patch Forcing, arXiv 2604.19141."""
    begin = _up(torch.as_tensor(t, device=score.device))
    begin = (begin[:, None] if begin.dim() == 1 else begin).expand(score.shape)
    sure = select_patches(score, k, as_mask=True)
    parts = (next_t(begin, "dual_loop", dt=dt, mask=sure, index=j, steps=steps) for j in range(steps))
    return torch.stack(list(parts))


def next_t(
    t: Tensor,
    kind: str = "uniform",
    *,
    dt: Scalar | None = None,
    mask: Tensor | None = None,
    index: int = 0,
    steps: int = 1,
    factor: float = 1.4,
    schedule: Tensor | Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """Where every patch goes next, (B, N): see pydiffuse.next_t."""
    if kind == "schedule":
        rows = torch.as_tensor(schedule, dtype=t.dtype, device=t.device)
        return rows[index + 1].expand(t.shape)
    if kind == "look_ahead":
        jump = (factor * t).clamp(max=1)
        return jump if mask is None else torch.where(mask, jump, t)
    whole = (t + _per_patch(dt, t)).clamp_(max=1)
    if kind == "uniform" or index == steps - 1:
        return whole
    part = torch.lerp(t, whole, (index + 1) / steps)
    return part if mask is None else torch.where(mask, whole, part)


def _per_patch(value: Scalar | None, t: Tensor) -> Scalar:
    if isinstance(value, Tensor):
        value = value.to(t)
        return value[:, None] if value.dim() == 1 else value
    return 0.0 if value is None else value
