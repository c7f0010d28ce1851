"""Guidance on arrays: see pydiffuse.guidance, whose names and arguments these are.

Predictions are arrays [B, ...] of float32, float16 or bfloat16, alike in shape and dtype. A scale or
weight is a number or (B,). `out` may be an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pydiffuse import _host
from pydiffuse._core.rules import (
    COMMON,
    EMIT_PREDICT,
    EMIT_STATE,
    EMIT_UPDATE,
    MAX_PREDS,
    RULES,
    UPDATE,
    own_values,
)
from pydiffuse.numpy.arrays import Array, Outputs, Scalar, array_of, floats, numbers, scalar, sequence

_PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""a, b, h, s, p, q: the value of a rule, with no update."""


def cfg(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """u + w (c - u).  See pydiffuse.cfg."""
    return _value("cfg", (cond, uncond), (scale,), original, rescale, out)


def tcfg(
    cond: Array | Sequence[Array],
    uncond: Array,
    scale: Scalar | Sequence[Scalar],
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """u_f + w (c - u_f); cond may be a list, and scale then, too.  See pydiffuse.tcfg."""
    if isinstance(cond, list | tuple):
        return _tcfg_of_many(list(cond), uncond, scale, original, rescale, out)
    return _value("tcfg", (cond, uncond), (scale,), original, rescale, out)


def cfg_zero(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """alpha u + w (c - alpha u).  See pydiffuse.cfg_zero."""
    return _value("cfg_zero", (cond, uncond), (scale,), original, rescale, out)


def magnitude_aware(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    alpha: Scalar = 8.0,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """See pydiffuse.magnitude_aware."""
    return _value("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale, out)


def apg(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    eta: Scalar = 1.0,
    norm_threshold: Scalar = 0.0,
    momentum: Scalar | None = None,
    state: Array | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Any = None,
) -> Any:
    """See pydiffuse.apg: with momentum, (result, new state), and `out` is a pair, too."""
    if state is not None and momentum is None:
        raise ValueError("apg: state was given without momentum; give both, or neither")
    preds = (cond, uncond) if state is None else (cond, uncond, state)
    values = (scale, eta, norm_threshold, 0.0 if momentum is None else momentum)
    emit = EMIT_UPDATE if momentum is None else EMIT_UPDATE | EMIT_STATE
    return _value("apg", preds, values, original, rescale, out, emit=emit)


def perp_neg(
    cond: Array,
    uncond: Array,
    negatives: Sequence[Array],
    scale: Scalar,
    weights: Sequence[Scalar] | Array,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """See pydiffuse.perp_neg."""
    negatives = sequence("perp_neg", "negatives", negatives, least=0)
    values = (scale, *_columns("perp_neg", weights, len(negatives)))
    return _value("perp_neg", (cond, *negatives, uncond), values, original, rescale, out)


def compose(
    conds: Sequence[Array],
    uncond: Array,
    weights: Sequence[Scalar] | Array,
    *,
    rescale: Scalar = 0.0,
    out: Array | None = None,
) -> Array:
    """u + sum_i w_i (c_i - u).  See pydiffuse.compose."""
    conds = sequence("compose", "conds", conds)
    values = _columns("compose", weights, len(conds))
    return _value("compose", (*conds, uncond), values, False, rescale, out)


def slerp(a: Array, b: Array, weight: Scalar, *, out: Array | None = None) -> Array:
    """See pydiffuse.slerp."""
    return _value("slerp", (a, b), (weight,), False, 0.0, out)


def rescale(guided: Array, cond: Array, factor: Scalar, *, out: Array | None = None) -> Array:
    """See pydiffuse.rescale."""
    return _value("rescale", (cond, guided), (), False, factor, out)


def gram(preds: Sequence[Array], *, sums: bool = False) -> Any:
    """G[b,i,j] = <p_i, p_j> in float64; with `sums`, also the sums (B, k)."""
    G, totals = _host.gram(predictions("gram", sequence("gram", "preds", preds)))
    return (G, totals) if sums else G


def combine(preds: Sequence[Array], coefficients: ArrayLike, *, out: Array | None = None) -> Array:
    """sum_i c[b,i] p_i, coefficients (B, k) or (k,)."""
    arrays = predictions("combine", sequence("combine", "preds", preds))
    shape = (len(arrays[0]), len(arrays))
    given = numbers("combine", "coefficients", coefficients)
    if given.shape not in (shape, shape[1:]):
        raise ValueError(
            f"combine: coefficients has shape {given.shape}; accepted: {shape} or {shape[1:]}"
        )
    return mixed("combine", arrays, given, out)


def mixed(op: str, arrays: list[Array], coefficients: Array, out: Array | None) -> Array:
    """coefficients: float64, (B, k) or (k,)."""
    shape = (len(arrays[0]), len(arrays))
    matrix = np.broadcast_to(coefficients, shape)[:, None].copy()
    outs = Outputs(op, out, [(arrays[0].shape, arrays[0].dtype)], same=arrays)
    _host.mix(outs.arrays, arrays, matrix)
    return outs.results()


def guide(
    preds: Sequence[Array],
    rule: str,
    *,
    x: Array,
    a: Scalar = 1.0,
    b: Scalar = 1.0,
    history: Array | None = None,
    h: Scalar = 0.0,
    noise: Array | None = None,
    s: Scalar = 0.0,
    predict: tuple[Scalar, Scalar] | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Any = None,
    **parameters: Any,
) -> Any:
    """x' = a x + b g + h history + s noise in one pass.  See pydiffuse.guide."""
    if rule not in RULES:
        raise ValueError(f"guide: unknown rule {rule!r}; accepted: {', '.join(RULES)}")
    preds = sequence("guide", "preds", preds)
    if (history is None and np.any(h)) or (noise is None and np.any(s)):
        raise ValueError("guide: h needs history and s needs noise; one of them was left out")
    momentum = parameters.get("momentum")
    if rule == "apg" and len(preds) == 3 and momentum is None:
        raise ValueError("guide: preds holds apg's state, but momentum was left out; give both")
    values = own_values(RULES[rule], len(preds), parameters, _columns)
    p, q = (0.0, 1.0) if predict is None else predict
    emit = EMIT_UPDATE | (EMIT_PREDICT if predict is not None else 0)
    if rule == "apg" and momentum is not None:
        emit |= EMIT_STATE
    extras, update = (x, history, noise), (a, b, h, s, p, q)
    return _value(rule, preds, values, original, rescale, out, update, extras, emit, "guide")


def predictions(op: str, preds: Sequence[Any]) -> list[Array]:
    if not 1 <= len(preds) <= MAX_PREDS:
        raise ValueError(f"{op}: {len(preds)} predictions; accepted: 1 to {MAX_PREDS}")
    first = floats(op, "the first prediction", preds[0])
    arrays = [first, *(floats(op, "a prediction", p, like=first) for p in preds[1:])]
    if any(a.dtype != first.dtype for a in arrays):
        given = ", ".join(sorted({a.dtype.name for a in arrays}))
        raise ValueError(f"{op}: the predictions are {given}; accepted: one dtype")
    return arrays


def _columns(op: str, weights: Any, count: int) -> tuple[Any, ...]:
    """One weight for each of `count` predictions, from a sequence or the columns of (B, count)."""
    if not isinstance(weights, Sequence):
        weights = array_of(op, "weights", weights)
        if weights.ndim not in (1, 2):
            raise TypeError(f"{op}: weights is {weights!r}; accepted: {count} numbers, or (B, {count})")
    columns = tuple(weights.T if isinstance(weights, np.ndarray) and weights.ndim == 2 else weights)
    if len(columns) != count:
        raise ValueError(f"{op}: weights holds {len(columns)} values; accepted: {count}")
    return columns


def _tcfg_of_many(
    conds: list[Array], uncond: Array, scale: Any, original: bool, rescale: Scalar, out: Array | None
) -> Array:
    """From the Gram matrix's top projector P: u_f = sum_j P[u,j] p_j."""
    m = len(conds)
    scales = _columns("tcfg", scale if isinstance(scale, Sequence) else [scale] * m, m)
    if m == 1:
        return _value("tcfg", (*conds, uncond), scales, original, rescale, out)
    preds = predictions("tcfg", [*conds, uncond])
    B = len(preds[0])
    w = np.stack([np.broadcast_to(scalar("tcfg", "scale", v, B), B) for v in scales], 1)
    u = _top_projector(gram(preds))[:, -1]  # (B, m + 1)
    total = w.sum(1, keepdims=True)
    weights = np.concatenate([w, np.zeros_like(total)], 1) - total * u
    weights += np.eye(m + 1)[0] if original else u
    return _value("linear", preds, tuple(weights.T), False, rescale, out, op="tcfg")


def _top_projector(G: Array) -> Array:
    """On the top eigenvector of G [B, k, k], by squaring: pydiffuse.reference.guidance.top_projector."""
    k = G.shape[-1]

    def unit_trace(m: Array) -> Array:
        trace = np.trace(m, axis1=1, axis2=2)[:, None, None]
        return np.where(trace == 0, np.eye(k) / k, m / np.where(trace == 0, 1, trace))

    projector = unit_trace(G)
    for _ in range(60):
        projector = unit_trace(projector @ projector)
    return projector


def _value(
    rule: str,
    preds: Sequence[Any],
    values: tuple[Any, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    update: tuple[Any, ...] = _PLAIN,
    extras: tuple[Any, ...] = (None, None, None),
    emit: int = EMIT_UPDATE,
    op: str | None = None,
) -> Any:
    """A rule's value, with the update x' = a x + b g + h history + s noise. extras: x, history, noise."""
    row = RULES[rule]
    op = op or rule
    if len(preds) not in row.counts:
        raise ValueError(f"{op}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    arrays = predictions(op, preds)
    first, B = arrays[0], len(arrays[0])
    x, history, noise = (
        None if t is None else floats(op, name, t, like=first)
        for name, t in zip(("x", "history", "noise"), extras, strict=True)
    )
    names = (*UPDATE, *COMMON, *row.parameters)
    params: list[float] = []
    varied: dict[int, Array] = {}
    for i, value in enumerate((*update, original, rescale, *values)):
        number = scalar(op, names[i] if i < len(names) else row.weights, value, B)
        if isinstance(number, np.ndarray):
            varied[i], number = number, 0.0
        params.append(number)
    table = np.stack(list(varied.values()), 1) if varied else None
    like = first if x is None else x
    likes = [(like.shape, like.dtype)] * (emit & ~EMIT_STATE).bit_count()
    if emit & EMIT_STATE:
        likes.append((first.shape, first.dtype))
    outs = Outputs(op, out, likes, same=(*arrays, x, history, noise))
    rescaled = params[7] != 0.0 or 7 in varied
    _host.guide(
        outs.arrays, arrays, x, history, noise, row.code, params, rescaled, table, list(varied), emit
    )
    return outs.results()
