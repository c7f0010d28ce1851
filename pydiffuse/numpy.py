"""Guidance on NumPy arrays: the same CPU kernels, no torch tensors in between.

Same names and arguments as `pydiffuse.guidance`. Arrays are [B, ...] of float32, float16 or bfloat16
(as in ml_dtypes); what is not C-contiguous is copied. A JAX array on the CPU passes as it is through
`numpy.asarray`. Scales are numbers or (B,) arrays. No gradients: results are arrays.

`cpu_capability()` tells the instruction set in use; `num_threads()` and `set_num_threads(n)` its threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydiffuse import _host
from pydiffuse._core.rules import COMMON, MAX_PREDS, RULES, UPDATE, Rule, own_values

Array = NDArray[Any]
Scalar = float | ArrayLike
cpu_capability = _host.capability
num_threads = _host.threads
set_num_threads = _host.set_threads

_PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
_DTYPES = ("float32", "float16", "bfloat16")


def cfg(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """u + w (c - u).  See pydiffuse.cfg."""
    return _value("cfg", (cond, uncond), (scale,), original, rescale)


def tcfg(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """u_f + w (c - u_f).  See pydiffuse.tcfg."""
    return _value("tcfg", (cond, uncond), (scale,), original, rescale)


def cfg_zero(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """alpha u + w (c - alpha u).  See pydiffuse.cfg_zero."""
    return _value("cfg_zero", (cond, uncond), (scale,), original, rescale)


def magnitude_aware(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    alpha: Scalar = 8.0,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """See pydiffuse.magnitude_aware."""
    return _value("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale)


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
) -> Any:
    """See pydiffuse.apg: with momentum, (result, new state)."""
    if state is not None and momentum is None:
        raise ValueError("apg: state was given without momentum; give both, or neither")
    preds = (cond, uncond) if state is None else (cond, uncond, state)
    values = (scale, eta, norm_threshold, 0.0 if momentum is None else momentum)
    return _value("apg", preds, values, original, rescale, emit=1 if momentum is None else 5)


def perp_neg(
    cond: Array,
    uncond: Array,
    negatives: Sequence[Array],
    scale: Scalar,
    weights: Sequence[Scalar] | Array,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """See pydiffuse.perp_neg."""
    values = _columns("perp_neg", weights, len(negatives))
    return _value("perp_neg", (cond, *negatives, uncond), (scale, *values), original, rescale)


def compose(
    conds: Sequence[Array], uncond: Array, weights: Sequence[Scalar] | Array, *, rescale: Scalar = 0.0
) -> Array:
    """u + sum_i w_i (c_i - u).  See pydiffuse.compose."""
    values = _columns("compose", weights, len(conds))
    return _value("compose", (*conds, uncond), values, False, rescale)


def slerp(a: Array, b: Array, weight: Scalar) -> Array:
    """See pydiffuse.slerp."""
    return _value("slerp", (a, b), (weight,), False, 0.0)


def rescale(guided: Array, cond: Array, factor: Scalar) -> Array:
    """See pydiffuse.rescale."""
    return _value("rescale", (cond, guided), (), False, factor)


def gram(preds: Sequence[Array], *, sums: bool = False) -> Any:
    """G[b,i,j] = <p_i, p_j> in float64; with `sums`, also the sums (B, k)."""
    G, totals = _host.gram(_arrays("gram", preds))
    return (G, totals) if sums else G


def combine(preds: Sequence[Array], coefficients: ArrayLike) -> Array:
    """sum_i c[b,i] p_i, coefficients (B, k) or (k,)."""
    arrays = _arrays("combine", preds)
    shape = (len(arrays[0]), len(arrays))
    given = np.asarray(coefficients, dtype=np.float64)
    if given.shape not in (shape, shape[1:]):
        raise ValueError(
            f"combine: coefficients has shape {given.shape}; accepted: {shape} or {shape[1:]}"
        )
    out = np.empty_like(arrays[0])
    _host.mix([out], arrays, np.ascontiguousarray(np.broadcast_to(given, shape)))
    return out


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
    **parameters: Any,
) -> Any:
    """x' = a x + b g + h history + s noise in one pass.  See pydiffuse.guide."""
    if rule not in RULES:
        raise ValueError(f"guide: unknown rule {rule!r}; accepted: {', '.join(RULES)}")
    values = own_values(RULES[rule], len(preds), parameters, _columns)
    p, q = (0.0, 1.0) if predict is None else predict
    emit = 1 | (2 if predict is not None else 0)
    if rule == "apg" and parameters.get("momentum") is not None:
        emit |= 4
    update = (a, b, h, s, p, q)
    return _value(
        rule, tuple(preds), values, original, rescale, update, (x, history, noise), emit, "guide"
    )


def _arrays(op: str, arrays: Sequence[Any]) -> list[Array]:
    if not 1 <= len(arrays) <= MAX_PREDS + 3:
        raise ValueError(f"{op}: {len(arrays)} arrays; accepted: 1 to {MAX_PREDS}")
    given = [np.ascontiguousarray(a) for a in arrays]
    for a in given:
        if a.dtype.name not in _DTYPES:
            raise TypeError(f"{op}: an array is {a.dtype.name}; accepted: {', '.join(_DTYPES)}")
        if a.shape != given[0].shape:
            raise ValueError(
                f"{op}: shapes {given[0].shape} and {a.shape}; all must be one shape [B, ...]"
            )
    return given


def _columns(op: str, weights: Any, count: int) -> tuple[Any, ...]:
    """One weight for each of `count` predictions, from a sequence or the columns of (B, count)."""
    if not isinstance(weights, Sequence | np.ndarray):
        raise TypeError(f"{op}: weights is {weights!r}; accepted: {count} numbers, or (B, {count})")
    columns = tuple(weights.T if isinstance(weights, np.ndarray) and weights.ndim == 2 else weights)
    if len(columns) != count:
        raise ValueError(f"{op}: weights holds {len(columns)} values; accepted: {count}")
    return columns


def _value(
    rule: str,
    preds: tuple[Array, ...],
    values: tuple[Any, ...],
    original: bool,
    rescale: Scalar,
    update: tuple[Any, ...] = _PLAIN,
    extras: tuple[Array | None, ...] = (None, None, None),
    emit: int = 1,
    op: str | None = None,
) -> Any:
    row: Rule = RULES[rule]
    op = op or rule
    if len(preds) not in row.counts:
        raise ValueError(f"{op}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    there = [t for t in extras if t is not None]
    arrays = _arrays(op, [*preds, *there])
    k, B = len(preds), len(arrays[0])
    if any(p.dtype != arrays[0].dtype for p in arrays[:k]):
        raise ValueError(f"{op}: the predictions must have one dtype")
    rest = iter(arrays[k:])
    x, history, noise = (None if t is None else next(rest) for t in extras)
    params: list[float] = []
    columns: list[int] = []
    varied: list[Array] = []
    for i, value in enumerate((*update, original, rescale, *values)):
        number = np.asarray(value, dtype=np.float64)
        if number.ndim > 1 or (number.ndim == 1 and len(number) != B):
            names = (*UPDATE, *COMMON, *row.parameters)
            name = names[i] if i < len(names) else row.weights
            raise ValueError(f"{op}: {name} has shape {number.shape}; accepted: a number or ({B},)")
        if number.ndim == 1:
            columns.append(i)
            varied.append(number)
        params.append(0.0 if number.ndim else float(number))
    like = arrays[0] if x is None else x
    out = [np.empty_like(like) for _ in range((emit & 3).bit_count())]
    if emit & 4:
        out.append(np.empty_like(arrays[0]))
    table = np.ascontiguousarray(np.stack(varied, 1)) if varied else None
    rescaled = params[7] != 0.0 or 7 in columns
    _host.guide(out, arrays[:k], x, history, noise, row.code, params, rescaled, table, columns, emit)
    return out[0] if len(out) == 1 else tuple(out)
