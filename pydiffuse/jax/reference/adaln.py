"""Adaptive layer norm in jax.numpy: see pydiffuse.reference.adaln."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def _up(a: Array) -> Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _normed(v: Array, norm: str | None, eps: float, weight: Array | None, bias: Array | None) -> Array:
    if norm == "layer":
        v = v - v.mean(-1, keepdims=True)
    if norm is not None:
        v = v * jax.lax.rsqrt((v * v).mean(-1, keepdims=True) + eps)
    v = v if weight is None else v * _up(weight)
    return v if bias is None else v + _up(bias)


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
    """norm(x) (1 + scale[row]) + shift[row], table = (shift, scale).  DiT, arXiv 2212.09748, 3.2."""
    shift, scale = jnp.moveaxis(_up(table)[rows], -2, 0)
    return (_normed(_up(x), norm, eps, weight, bias) * (1 + scale) + shift).astype(x.dtype)


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
    """r = residual + gate[row] branch, and modulate(r); table = (shift, scale, gate)."""
    shift, scale, gate = jnp.moveaxis(_up(table)[rows], -2, 0)
    r = _up(residual) + gate * _up(branch)
    y = _normed(r, norm, eps, weight, bias) * (1 + scale) + shift
    return r.astype(residual.dtype), y.astype(residual.dtype)
