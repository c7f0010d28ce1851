"""Adaptive layer norm by rows of a table, on JAX arrays: see pydiffuse.adaln.

Tokens are arrays [..., D]; tables, weights and biases may have another float dtype.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse.jax.arrays import describe, floats, integers, like, no_second
from pydiffuse.jax.calls import alike, call

NORMS = (None, "layer", "rms")  # as in csrc/adaln.h
BRANCH, DR = 1, 2


class Form(NamedTuple):
    op: str
    norm: int
    eps: float
    factors: bool  # the table holds 1 + scale


def modulate(
    x: Array,
    table: Array,
    rows: Array,
    *,
    norm: str | None = "layer",
    eps: float = 1e-6,
    weight: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """norm(x) (1 + scale[row]) + shift[row].  See pydiffuse.modulate."""
    return _modulated("modulate", x, None, table, rows, norm, eps, weight, bias)[0]


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
) -> tuple[Array, Array]:
    """(r, y): r = residual + gate[row] branch, and its modulation.  See pydiffuse.gate_residual_modulate."""
    op = "gate_residual_modulate"
    r, y = _modulated(op, residual, branch, table, rows, norm, eps, weight, bias)
    return r, y


def _modulated(
    op: str, x: Any, branch: Any, table: Any, rows: Any, norm: Any, eps: Any, weight: Any, bias: Any
) -> tuple[Array, ...]:
    x = floats(op, "x" if branch is None else "residual", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no features; accepted: [..., D]")
    if branch is not None:
        branch = floats(op, "branch", branch)
        if branch.shape != x.shape or branch.dtype != x.dtype:
            raise ValueError(
                f"{op}: branch is {describe(branch)}; accepted: {describe(x)}, as residual is"
            )
    D, columns = x.shape[-1], 2 if branch is None else 3
    table = floats(op, "table", table)
    if table.ndim != 3 or table.shape[1:] != (columns, D):
        names = "shift, scale" if branch is None else "shift, scale, gate"
        raise ValueError(
            f"{op}: table is {describe(table)}; accepted: [K, {columns}, D] ({names}), here D = {D}"
        )
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}; accepted: {', '.join(map(repr, NORMS))}")
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps!r}; accepted: a number, 0 or more")
    row, tokens = integers(op, "rows", rows, len(table)), x.shape[:-1]
    try:
        row = jnp.broadcast_to(row, tokens)
    except ValueError:
        raise ValueError(
            f"{op}: rows has shape {row.shape}; accepted: what broadcasts to {tokens}, a row of table for"
            " each token"
        ) from None
    table = table.astype(jnp.float32)
    factors = weight is not None or bias is not None
    if factors:
        table = _folded(table, _features(op, "weight", weight, D), _features(op, "bias", bias, D))
    if not x.size:
        return (x,) if branch is None else (x, x)
    form = Form(op, NORMS.index(norm), float(eps), factors)
    flat = (math.prod(tokens), D)
    branch = None if branch is None else branch.reshape(flat)
    results = _modulate(form, *alike(x.reshape(flat), branch, table, row.reshape(-1)))
    return tuple(r.reshape(x.shape) for r in results)


def _features(op: str, argument: str, value: Any, D: int) -> Array | None:
    if value is None:
        return None
    given = floats(op, argument, value)
    if given.shape != (D,):
        raise ValueError(f"{op}: {argument} has shape {given.shape}; accepted: ({D},)")
    return given.astype(jnp.float32)


def _folded(table: Array, weight: Array | None, bias: Array | None) -> Array:
    """The affine part of the norm inside: (n w + b) (1 + s) + shift is n f + shift' with f = w (1 + s),
    shift' = shift + b (1 + s)."""
    factor = 1 + table[:, 1]
    shift = table[:, 0] if bias is None else table[:, 0] + bias * factor
    factor = factor if weight is None else weight * factor
    return jnp.concatenate([shift[:, None], factor[:, None], table[:, 2:]], 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _modulate(form: Form, x: Array, branch: Array | None, table: Array, rows: Array) -> Any:
    """x, branch [R, D], table [K, 2 or 3, D] float32, rows [R] int32 -> (y,), or r and y with a branch."""
    results = [like(x)] * (1 if branch is None else 2)
    inputs, attributes = _given(form, x, branch, table, rows)
    return tuple(call("modulate", results, inputs, **attributes))


def _given(form: Form, x: Array, branch: Array | None, table: Array, rows: Array) -> Any:
    inputs = [x, *([] if branch is None else [branch]), table, rows]
    has = 0 if branch is None else BRANCH
    return inputs, {"has": has, "norm": form.norm, "eps": form.eps, "factors": int(form.factors)}


def _backward(form: Form, saved: Any, grads: tuple[Array, ...]) -> Any:
    x, branch, table, rows = saved
    dr = None if branch is None else grads[0]
    return *_modulate_backward(form, grads[-1], dr, x, branch, table, rows), None


_modulate.defvjp(lambda form, *arrays: (_modulate(form, *arrays), arrays), _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _modulate_backward(
    form: Form, dy: Array, dr: Array | None, x: Array, branch: Array | None, table: Array, rows: Array
) -> Any:
    """-> dx, dbranch or None, dtable."""
    inputs, attributes = _given(form, x, branch, table, rows)
    inputs = [*inputs, dy, *([] if dr is None else [dr])]
    attributes["has"] |= 0 if dr is None else DR
    results = [like(x), like(table), *([] if branch is None else [like(x)])]
    dx, dtable, *dbranch = call("modulate_backward", results, inputs, **attributes)
    return dx, dbranch[0] if dbranch else None, dtable


_modulate_backward.defvjp(no_second, lambda form, saved, grads: ())
