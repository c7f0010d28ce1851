"""Token routing in jax.numpy: see pydiffuse.reference.routing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from pydiffuse.jax.routing import route

__all__ = ["gather_tokens", "route", "scatter_tokens"]


def _rows(ids: Array) -> Array:
    return jnp.arange(len(ids))[:, None]


def gather_tokens(x: Array, ids: Array) -> Array:
    """x[b, ids[b, j]]."""
    return x[_rows(ids), ids]


def scatter_tokens(
    base: Array, y: Array, ids: Array, gate: Any = None, *, donate_base: bool = False
) -> Array:
    """base with token ids[b, j] replaced by y[b, j], or by (1 - gate) base + gate y."""
    if gate is not None:
        wide = jnp.promote_types(base.dtype, jnp.float32)
        g = jnp.broadcast_to(jnp.asarray(gate, wide), ids.shape)
        g = g.reshape(*ids.shape, *[1] * (base.ndim - 2))
        y = ((1 - g) * gather_tokens(base, ids).astype(wide) + g * y.astype(wide)).astype(base.dtype)
    return base.at[_rows(ids), ids].set(y)
