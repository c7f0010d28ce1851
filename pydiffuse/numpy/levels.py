"""Levels of noise: what to train at, where patches go next, and the noise itself. See pydiffuse.patch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pydiffuse._core.grids import MOVES, SAMPLES
from pydiffuse.numpy.arrays import (
    Array,
    Scalar,
    array_of,
    count,
    describe,
    finite,
    generator_of,
    name,
    numbers,
    per_patch,
)


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
    generator: np.random.Generator | None = None,
) -> Array:
    """Levels to train at, float32 (batch, patches) in [0, 1]: uniform, logit_normal, mode, ltg, nondecreasing.

    See pydiffuse.sample_t.
    """
    op = "sample_t"
    name(op, "kind", kind, SAMPLES)
    batch, patches = count(op, "batch", batch), count(op, "patches", patches)
    loc, scale, std, shift, mode_scale = (
        finite(op, n, v)
        for n, v in (("loc", loc), ("scale", scale), ("std", std), ("shift", shift), ("mode_scale", mode_scale))
    )  # fmt: skip
    if not shift > 0 or not std >= 0:
        raise ValueError(f"{op}: shift is {shift}, std {std}; accepted: shift > 0, std >= 0")
    if not -1 <= mode_scale <= 1.75:
        raise ValueError(
            f"{op}: mode_scale is {mode_scale}; accepted: -1 to 1.75, where the density is positive"
        )
    draw, one = generator_of(op, generator), np.float32(1)

    def normal(*shape: int) -> Array:
        return draw.standard_normal(shape, np.float32)

    def uniform(*shape: int) -> Array:
        return draw.random(shape, np.float32)

    def sigmoid(x: Array) -> Array:
        return one / (one + np.exp(-x))

    t: Array
    if kind == "uniform":
        t = uniform(batch, patches)
    elif kind == "logit_normal":
        t = sigmoid(loc + scale * normal(batch, patches))
    elif kind == "mode":
        u = uniform(batch, patches)
        t = 1 - u - mode_scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)
    elif kind == "ltg":
        most = sigmoid(loc + scale * normal(batch, 1))
        t = most - np.minimum(most / 2, std) * np.abs(normal(batch, patches))
        t = np.where(t < 0, uniform(batch, patches) * most, t)
    else:  # a frame at a uniform level, cleaner ones before it, noisier ones after
        pivot, u = uniform(batch, 1), uniform(batch, patches)
        place = np.arange(patches) - np.floor(uniform(batch, 1) * patches)
        t = np.where(place < 0, pivot + (1 - pivot) * u, np.where(place > 0, pivot * u, pivot))
        t = -np.sort(-t, axis=1)
    if shift != 1.0:
        wide = t.astype(np.float64)  # a rounding that keeps the order
        t = shift * wide / (1 + (shift - 1) * wide)
    return np.clip(t, 0, 1).astype(np.float32)


def next_t(
    t: Array,
    kind: str = "uniform",
    *,
    dt: Scalar | None = None,
    mask: Array | None = None,
    index: int = 0,
    steps: int = 1,
    factor: float = 1.4,
    schedule: ArrayLike | None = None,
) -> Array:
    """The t_next of patch_step, (B, N): uniform, dual_loop, look_ahead, schedule.  See pydiffuse.next_t."""
    op = "next_t"
    name(op, "kind", kind, MOVES)
    t = array_of(op, "t", t)
    if t.ndim != 2 or t.dtype.kind != "f":
        raise TypeError(f"{op}: t is {describe(t)}; accepted: a float array (B, N)")
    B, N = t.shape
    moves = None if mask is None else array_of(op, "mask", mask)
    if moves is not None and (moves.dtype != bool or moves.shape != t.shape):
        raise ValueError(f"{op}: mask is {describe(moves)}; accepted: a bool array {t.shape}")
    if kind == "schedule":
        rows = numbers(op, "schedule", [] if schedule is None else schedule).astype(t.dtype)
        if not np.all((rows >= 0) & (rows <= 1)):
            raise ValueError(f"{op}: schedule holds a value outside [0, 1] or NaN; accepted: 0 to 1")
        if rows.ndim not in (2, 3) or not 0 <= index < len(rows) - 1:
            raise ValueError(
                f"{op}: index is {index}; accepted: 0 to {len(rows) - 2}, of a schedule with {len(rows)} rows"
            )
        return np.broadcast_to(rows[index + 1], t.shape).copy()
    if kind == "look_ahead":
        if not 1 <= factor < math.inf:
            raise ValueError(f"{op}: factor is {factor!r}; accepted: 1 or more")
        jump = np.minimum(factor * t, 1).astype(t.dtype, copy=False)
        return jump if moves is None else np.where(moves, jump, t)
    if kind == "dual_loop" and not 0 <= index < steps:
        raise ValueError(f"{op}: index is {index}; accepted: 0 to {steps - 1}, the parts of the step")
    step = per_patch(op, "dt", dt, B, N).astype(t.dtype, copy=False)
    if not np.all((step >= 0) & np.isfinite(step)):
        raise ValueError(f"{op}: dt holds a value that is negative or not finite; accepted: 0 or more")
    whole = np.minimum(t + step, 1).astype(t.dtype, copy=False)
    if kind == "uniform" or index == steps - 1:
        return whole
    part = t + (whole - t) * t.dtype.type((index + 1) / steps)
    return part if moves is None else np.where(moves, whole, part)


def draw_like(op: str, x: Array, generator: Any) -> Array:
    """Standard normal noise, drawn in float32."""
    return generator_of(op, generator).standard_normal(x.shape, np.float32).astype(x.dtype, copy=False)
