"""Adaptive layer norm by rows of a table, on arrays: see pydiffuse.adaln, whose names and arguments these are.

Tokens are arrays [..., D]; tables, weights and biases may have another float dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydiffuse import _host
from pydiffuse.numpy.arrays import (
    Array,
    Outputs,
    array_of,
    as_int32,
    broadcasts,
    count,
    describe,
    finite,
    floats,
    integers,
    name,
    within,
)

NORMS = (None, "layer", "rms")  # as in csrc/adaln.h


def modulate(
    x: Array,
    table: Array,
    rows: Array,
    *,
    norm: str | None = "layer",
    eps: float = 1e-6,
    weight: Array | None = None,
    bias: Array | None = None,
    out: Array | None = None,
) -> Array:
    """norm(x) (1 + scale[row]) + shift[row].  See pydiffuse.modulate."""
    x = floats("modulate", "x", x)
    return _modulated("modulate", x, None, table, rows, norm, eps, weight, bias, out)


def gate_residual_modulate(
    residual: Array,
    branch: Array,
    table: Array,
    rows: Array,
    *,
    norm: str | None = "layer",
    eps: float = 1e-6,
    weight: Array | None = None,
    bias: Array | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """(r, y): r = residual + gate[row] branch, and its modulation.  See pydiffuse.gate_residual_modulate."""
    op = "gate_residual_modulate"
    residual = floats(op, "residual", residual)
    branch = floats(op, "branch", branch, like=residual)
    if branch.dtype != residual.dtype:
        raise TypeError(f"{op}: branch is {describe(branch)}; accepted: residual's {residual.dtype}")
    return _modulated(op, residual, branch, table, rows, norm, eps, weight, bias, out)


def embed_t(
    t: Array,
    dim: int,
    *,
    max_period: float = 10000.0,
    scale: float = 1.0,
    max_distinct: int | None = None,
) -> tuple[Array, Array]:
    """The sinusoidal embedding of the distinct values of t, (K, dim), and the row of each t among them.

    See pydiffuse.embed_t.
    """
    op = "embed_t"
    t = array_of(op, "t", t)
    if t.dtype.kind != "f" and t.dtype.name != "bfloat16":
        raise TypeError(f"{op}: t is {describe(t)}; accepted: a float array of any shape")
    dim = count(op, "dim", dim, 1)
    K = t.size if max_distinct is None else count(op, "max_distinct", max_distinct, 1)
    if not finite(op, "max_period", max_period) > 0:
        raise ValueError(f"{op}: max_period is {max_period!r}; accepted: a number > 0")
    distinct, rows = np.unique(t.astype(np.float64), return_inverse=True)
    if len(distinct) > K:
        raise ValueError(f"{op}: t has {len(distinct)} distinct values; accepted: max_distinct, {K}")
    values = np.zeros(K)
    values[: len(distinct)] = distinct
    values[len(distinct) :] = distinct[-1] if len(distinct) else 0
    half = dim // 2
    exponent = np.arange(half) / max(half, 1)
    angle = finite(op, "scale", scale) * values[:, None] * np.exp(-math.log(max_period) * exponent)
    table = np.concatenate([np.cos(angle), np.sin(angle), np.zeros((K, dim % 2))], 1)
    wide = np.float64 if t.dtype.name == "float64" else np.float32
    return table.astype(wide), rows.astype(np.int64).reshape(t.shape)


def _modulated(
    op: str,
    x: Array,
    branch: Array | None,
    table: Any,
    rows: Any,
    norm: str | None,
    eps: float,
    weight: Any,
    bias: Any,
    out: Any,
) -> Any:
    D, columns = x.shape[-1], 2 if branch is None else 3
    table = floats(op, "table", table)
    if table.ndim != 3 or table.shape[1:] != (columns, D):
        names = "shift, scale" if branch is None else "shift, scale, gate"
        raise ValueError(
            f"{op}: table is {describe(table)}; accepted: [K, {columns}, D] ({names}), here D = {D}"
        )
    code = name(op, "norm", norm, NORMS)
    if not finite(op, "eps", eps) >= 0:
        raise ValueError(f"{op}: eps is {eps!r}; accepted: a number, 0 or more")
    tokens = x.shape[:-1]
    row = integers(op, "rows", rows)
    within(op, "rows", row if x.size else row[:0], len(table), "the rows of table")
    row = broadcasts(op, "rows", row, tokens, "a row of table for each token")
    table, affine = table.astype(np.float32, copy=False), weight is not None or bias is not None
    if affine:
        table = _folded(table, _features(op, "weight", weight, D), _features(op, "bias", bias, D))
    likes = [(x.shape, x.dtype)] * (columns - 1)
    outs = Outputs(op, out, likes, same=(x, branch), read=(table, row))
    if x.size:
        flat = (-1, D)
        y, r = outs.arrays[-1].reshape(flat), None if branch is None else outs.arrays[0].reshape(flat)
        branch = None if branch is None else branch.reshape(flat)
        row = as_int32(row).reshape(-1)
        _host.modulate(y, r, x.reshape(flat), branch, table, row, code, float(eps), affine)
    return outs.results()


def _features(op: str, argument: str, value: Any, D: int) -> Array | None:
    if value is None:
        return None
    given = floats(op, argument, value)
    if given.shape != (D,):
        raise ValueError(f"{op}: {argument} has shape {given.shape}; accepted: ({D},)")
    return given.astype(np.float32, copy=False)


def _folded(table: Array, weight: Array | None, bias: Array | None) -> Array:
    """The affine part of the norm inside: (n w + b) (1 + s) + shift is n f + shift' with f = w (1 + s),
    shift' = shift + b (1 + s)."""
    table = table.copy()
    factor = 1 + table[:, 1]
    if bias is not None:
        table[:, 0] += bias * factor
    table[:, 1] = factor if weight is None else weight * factor
    return table
