"""Tile attention in jax.numpy: see pydiffuse.reference.attention."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from pydiffuse.plans import TilePlan


def tile_attention(
    q: Array, k: Array, v: Array, plan: TilePlan, *, scale: Any = None, return_lse: bool = False
) -> Any:
    """out_i = sum_j p_ij v_j, p_ij = exp(s_ij - lse_i), s_ij = scale <q_i, k_j>, lse_i = log sum_j exp(s_ij),
    sums over the keys j that the plan lets query i see. A query that sees none: out 0, lse -inf.

    Efficient-vDiT, arXiv 2502.06155, section 3; Sliding Tile Attention, arXiv 2502.04507.
    """
    dtype, groups = q.dtype, q.shape[1] // max(k.shape[1], 1)
    q, k, v = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (q, k, v))
    k, v = (jnp.repeat(a, groups, 1) for a in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else jnp.asarray(scale, q.dtype)
    scale = scale.reshape(-1, 1, 1) if hasattr(scale, "shape") else scale
    dense = plan.dense_array()
    seen, some = jnp.asarray(dense), jnp.asarray(dense.any(-1))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") * scale
    top = jnp.where(seen, scores, -jnp.inf).max(-1, initial=-jnp.inf)
    top = jnp.where(some, top, 0)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - top[..., None]), 0)
    total = jnp.where(some, p.sum(-1), 1)
    out = jnp.einsum("bhqk,bhkd->bhqd", p / total[..., None], v, precision="highest").astype(dtype)
    return (out, jnp.where(some, top + jnp.log(total), -jnp.inf)) if return_lse else out
