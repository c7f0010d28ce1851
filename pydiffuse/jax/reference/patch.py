"""Patches with a noise level of their own, in jax.numpy: formulas and sources in pydiffuse.reference.patch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse._core.grids import OWN_KIND, PatchSize, count_patches, patch_sizes

Pair = tuple[Array, Array]


def _up(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _spread(c: Array, x: Array, patch_size: PatchSize) -> Array:
    """A value per patch (B, N) on every element: [B, 1, *spatial]."""
    sizes = patch_sizes("patch", x.shape, patch_size)
    c = c.reshape(x.shape[0], *(e // s if s else 0 for e, s in zip(x.shape[2:], sizes, strict=True)))
    for dim, size in enumerate(sizes, 1):
        c = jnp.repeat(c, size, dim)
    return c[:, None]


def _table(value: Any, x: Array, patch_size: PatchSize) -> Array:
    n = count_patches(x.shape, patch_sizes("patch", x.shape, patch_size))
    value = jnp.asarray(value, jnp.promote_types(x.dtype, jnp.float32))
    return jnp.broadcast_to(value[:, None] if value.ndim == 1 else value, (x.shape[0], n))


def _level(t: Array, path: str) -> tuple[Array, Array, Array, Array]:
    """alpha, sigma and their slopes in t."""
    if path == "linear":
        return t, 1 - t, jnp.ones_like(t), -jnp.ones_like(t)
    if path == "trig":
        half = math.pi / 2
        s, c = jnp.sin(half * t), jnp.cos(half * t)
        return s, c, half * c, -half * s
    Q = t * t + (1 - t) * (1 - t)
    alpha, sigma = t / jnp.sqrt(Q), (1 - t) / jnp.sqrt(Q)
    return alpha, sigma, sigma / Q, -alpha / Q


def _prediction(kind: str, alpha: Array, sigma: Array) -> Pair:
    """(a, b) of what a model predicts, a x1 + b eps."""
    one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
    if kind == "v":
        r = jnp.hypot(alpha, sigma)
        return -sigma / r, alpha / r
    return {"flow": (one, -one), "eps": (zero, one), "x1": (one, zero)}[kind]


def _from_prediction(source: Pair, wanted: Pair, alpha: Array, sigma: Array) -> Pair:
    """The coefficients of x and of the prediction in wanted[0] x1 + wanted[1] eps."""
    (a, b), (c, d) = source, wanted
    det = alpha * b - sigma * a
    return (c * b - d * a) / det, (d * alpha - c * sigma) / det


def _noise(x: Array, noise: Array | None, key: Array | None) -> Array:
    if noise is not None:
        return noise
    assert key is not None
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)


def noise_patches(
    x1: Array,
    t: Any,
    patch_size: PatchSize = None,
    path: str = "linear",
    noise: Array | None = None,
    key: Array | None = None,
    *,
    target: str | None = None,
) -> Pair:
    """x_t = alpha x1 + sigma eps and the target a x1 + b eps, each patch at its level."""
    eps = _noise(x1, noise, key)
    alpha, sigma, *_ = _level(_table(t, x1, patch_size), path)

    def sum_of(c: Array, d: Array) -> Array:
        y = _spread(c, x1, patch_size) * _up(x1) + _spread(d, x1, patch_size) * _up(eps)
        return y.astype(x1.dtype)

    return sum_of(alpha, sigma), sum_of(*_prediction(target or OWN_KIND[path], alpha, sigma))


def convert(
    x: Array,
    pred: Array,
    t: Any,
    source: str,
    target: str,
    patch_size: PatchSize = None,
    *,
    path: str = "linear",
) -> Array:
    """The same prediction as another kind: x1 and eps from (x, pred), then a x1 + b eps."""
    alpha, sigma, *_ = _level(_table(t, x, patch_size), path)
    given, wanted = (_prediction(k, alpha, sigma) for k in (source, target))
    of_x, of_pred = _from_prediction(given, wanted, alpha, sigma)
    y = _spread(of_x, x, patch_size) * _up(x) + _spread(of_pred, x, patch_size) * _up(pred)
    return y.astype(pred.dtype)


def patch_step(
    x: Array,
    pred: Array,
    t: Any,
    t_next: Any,
    patch_size: PatchSize = None,
    *,
    uncond: Array | None = None,
    scale: Any = 1.0,
    mask: Array | None = None,
    method: str = "euler",
    path: str = "linear",
    predicts: str | None = None,
    eta: float = 1.0,
    noise: Array | None = None,
    key: Array | None = None,
    history: Any = None,
    donate_x: bool = False,
) -> tuple[Any, ...]:
    """One step of every patch from its t to its t_next; g = uncond + scale (pred - uncond).

    A patch outside the mask, or with t_next = t, keeps x, t and history.
    """
    now, then = _table(t, x, patch_size), _table(t_next, x, patch_size)
    moves = now != then if mask is None else (now != then) & mask
    safe, goal = jnp.where(moves, now, 0.5), jnp.where(moves, then, 0.75)
    everywhere = _spread(moves, x, patch_size)

    def term(value: Array) -> Array:
        return jnp.where(everywhere, _up(value), 0)

    g = term(pred)
    if uncond is not None:
        w = jnp.broadcast_to(jnp.asarray(scale, g.dtype), x.shape[:1]).reshape(-1, *[1] * (x.ndim - 1))
        g = w * g + (1 - w) * term(uncond)
    alpha, sigma, dalpha, dsigma = _level(safe, path)
    kind = _prediction(predicts or OWN_KIND[path], alpha, sigma)
    alpha_next, sigma_next, *_ = _level(goal, path)
    h = goal - safe

    def combined(wanted: Pair) -> Array:
        of_x, of_g = _from_prediction(kind, wanted, alpha, sigma)
        return _spread(of_x, x, patch_size) * term(x) + _spread(of_g, x, patch_size) * g

    slope = f_last = None
    t_last = now
    if method in ("euler", "multistep"):
        slope = f = combined((dalpha, dsigma))
        f_last = jnp.zeros_like(slope)
        if history is not None:
            f_last, t_last = history[0], _table(history[1], x, patch_size)
            before = jnp.where(moves, now - t_last, 0)
            r = jnp.where(before > 0, h / jnp.where(before > 0, before, 1), 0)
            half = _spread(r / 2, x, patch_size)
            f = (1 + half) * slope - half * term(f_last)
        y = _up(x) + _spread(h, x, patch_size) * f
    elif method == "ddim":
        y = combined((alpha_next, sigma_next))
    else:
        forward = goal > safe
        over = jnp.where(forward, alpha_next * sigma, 1)
        q = jnp.minimum(jnp.where(forward, sigma_next * alpha / over, 1), 1)
        up = eta * sigma_next * jnp.sqrt(1 - q * q)
        down = jnp.sqrt(jnp.maximum(sigma_next**2 - up**2, 0))
        y = combined((alpha_next, down)) + _spread(up, x, patch_size) * term(_noise(x, noise, key))
    y = jnp.where(everywhere, y, _up(x)).astype(x.dtype)
    arrived = jnp.where(moves, then, now)
    if slope is None or f_last is None or method != "multistep":
        return y, arrived
    kept = jnp.where(everywhere, slope, _up(f_last)).astype(x.dtype)
    return y, arrived, (kept, jnp.where(moves, now, t_last))


def select_patches(score: Array, k: int, *, as_mask: bool = False) -> Any:
    """The places of the k highest scores and of the others, each ascending, or a mask of the k.

    Of equal scores the first counts as the highest; NaN is below every number.
    """
    order = jnp.lexsort((-score, jnp.isnan(score)), axis=1)
    if as_mask:
        return jnp.zeros(score.shape, bool).at[jnp.arange(len(score))[:, None], order[:, :k]].set(True)
    return jnp.sort(order[:, :k], axis=1), jnp.sort(order[:, k:], axis=1)


def dual_loop_t(score: Array, k: int, t: Any, *, dt: Any, steps: int) -> Array:
    """Where patches are after each part of a step to t + dt, at most 1: the k surest are there at once, the others
    after `steps` equal parts; (steps, B, N).  Patch Forcing, arXiv 2604.19141."""

    def table(value: Any) -> Array:
        value = jnp.asarray(value, jnp.float32)
        return jnp.broadcast_to(value[:, None] if value.ndim == 1 else value, score.shape)

    sure, begin, step = select_patches(score, k, as_mask=True), table(t), table(dt)
    parts = (jnp.arange(1, steps + 1, dtype=jnp.float32) / steps)[:, None, None]
    whole = jnp.minimum(begin + step, 1)
    return jnp.where(sure, whole, begin + (whole - begin) * parts)
