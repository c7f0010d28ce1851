"""SuperDiff on arrays: see pydiffuse.superpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pydiffuse import _host
from pydiffuse.numpy.arrays import Array, Scalar, describe, numbers, scalar, sequence
from pydiffuse.numpy.guidance import mixed, predictions


def superpose(
    preds: Sequence[Array],
    log_density: Array,
    step: Scalar,
    *,
    kind: str = "or",
    noise: Array | None = None,
    uncond: Array | None = None,
    scale: Scalar = 1.0,
    temperature: float = 1.0,
    bias: Array | float = 0.0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """A mixture of noise predictions by their log-densities l, and the new l (B, k) float64.

    See pydiffuse.superpose; `out` is where the mixture goes.
    """
    preds = sequence("superpose", "preds", preds)
    arrays = predictions("superpose", [*preds, *(t for t in (uncond, noise) if t is not None)])
    G, _ = _host.gram(arrays)
    B, k = len(G), len(preds)
    if kind not in ("or", "and"):
        raise ValueError(f"superpose: unknown kind {kind!r}; accepted: 'or', 'and'")
    l = numbers("superpose", "log_density", log_density)
    if l.shape not in ((B, k), (k,)):
        raise ValueError(f"superpose: log_density is {describe(l)}; accepted: ({B}, {k}) or ({k},)")
    if not np.all(numbers("superpose", "step", step) > 0):
        raise ValueError(f"superpose: step is {step!r}; accepted: > 0, a number or ({B},)")
    r = _column("step", step, B)
    w = _column("scale", 1.0 if uncond is None else scale, B)
    inner = G[:, :k, :k]
    with_uncond = 0.0 if uncond is None else G[:, :k, k]
    with_noise = 0.0 if noise is None else G[:, :k, -1]
    fixed = r * ((1 - w) * with_uncond - np.diagonal(inner, axis1=1, axis2=2) / 2)
    fixed = fixed - np.sqrt(r) * with_noise
    if kind == "or":
        weights = _softmax(temperature * l + bias)
        weights = np.broadcast_to(weights, (B, k))
    else:
        weights = _balanced(inner, (fixed + bias) / (r * w))
    new = l + r * w * np.einsum("bij,bj->bi", inner, weights) + fixed
    if uncond is not None:
        weights = np.concatenate([w * weights, 1 - w], 1)
    return mixed("superpose", arrays[: weights.shape[1]], weights, out), new


def _column(argument: str, value: Any, batch: int) -> Array:
    return np.broadcast_to(scalar("superpose", argument, value, batch), batch)[:, None]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _balanced(inner: Array, f: Array) -> Array:
    """G k + f = lambda 1 and 1'k = 1, without the last weight, in units of the mean <p_i, p_i>; the diagonal
    lifted by 1e-12 of it, so that predictions that are equal share alike."""
    k = inner.shape[-1]
    unit = np.diagonal(inner, axis1=1, axis2=2).mean(1)[:, None]
    unit = np.where(unit == 0, 1, unit)
    G, f = inner / unit[..., None] + 1e-12 * np.eye(k), f / unit
    across = G[:, :-1] - G[:, -1:]
    right = f[:, -1:] - f[:, :-1] - across[:, :, -1]
    y = np.linalg.solve(across[:, :, :-1] - across[:, :, -1:], right[..., None])[..., 0]
    return np.concatenate([y, 1 - y.sum(1, keepdims=True)], 1)
