"""Weights of predictions from their inner products, where a little linear algebra decides them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def tcfg_weights(gram: Array, scales: Array, original: bool) -> Array:
    """c [B, m + 1] of `tcfg` with m conditions, scales [B, m]: u_f = sum_j P_uj p_j, P the top projector."""
    u = top_projector(gram)[:, -1]
    total = scales.sum(1, keepdims=True)
    weights = jnp.concatenate([scales, jnp.zeros_like(total)], 1).astype(u.dtype) - total * u
    return weights + (jnp.eye(gram.shape[-1], dtype=u.dtype)[0] if original else u)


def top_projector(gram: Array) -> Array:
    """The projector [B, k, k] on the top eigenvector of G [B, k, k], by squaring it 60 times.

    Equal eigenvalues share; G = 0 gives I/k.
    """
    k = gram.shape[-1]

    def unit_trace(m: Array) -> Array:
        trace = jnp.trace(m, axis1=-2, axis2=-1)[..., None, None]
        even = jnp.eye(k, dtype=m.dtype) / k
        return jnp.where(trace == 0, even, m / jnp.where(trace == 0, 1, trace))

    def square(m: Array, _: None) -> tuple[Array, None]:
        return unit_trace(_product(m, m)), None

    return jax.lax.scan(square, unit_trace(gram), None, length=60)[0]


def superpose_weights(
    gram: Array,
    k: int,
    has_uncond: bool,
    has_noise: bool,
    log_density: Array,
    step: Any,
    scale: Any,
    kind: str,
    temperature: float,
    bias: Any,
) -> tuple[Array, Array]:
    """Weights of the predictions [B, k], or [B, k + 1] with the unconditional one, and the new l [B, k].

    gram: of the k predictions, the unconditional one and the noise.
    """
    batch = gram.shape[0]
    l = jnp.broadcast_to(jnp.asarray(log_density).astype(gram.dtype), (batch, k))
    r, w = (
        jnp.broadcast_to(jnp.asarray(v, gram.dtype), (batch,))[:, None]
        for v in (step, scale if has_uncond else 1.0)
    )
    inner = gram[:, :k, :k]
    diagonal = jnp.diagonal(inner, axis1=1, axis2=2)
    with_uncond = gram[:, :k, k] if has_uncond else jnp.zeros_like(diagonal)
    fixed = r * ((1 - w) * with_uncond - diagonal / 2)
    if has_noise:
        fixed = fixed - jnp.sqrt(r) * gram[:, :k, -1]
    if kind == "or":
        weights = jax.nn.softmax(temperature * l + bias, axis=1)
    else:
        weights = _balanced(inner, (fixed + bias) / (r * w))
    new = l + r * w * (inner * weights[:, None]).sum(-1) + fixed
    if has_uncond:
        weights = jnp.concatenate([w * weights, 1 - w], 1)
    return weights, new


def _balanced(inner: Array, f: Array) -> Array:
    """G k + f = lambda 1 and 1'k = 1, without the last weight, in units of the mean <p_i, p_i>; the diagonal
    lifted by some roundings of it, so that predictions that are equal share alike."""
    k = inner.shape[-1]
    unit = jnp.diagonal(inner, axis1=1, axis2=2).mean(1)[:, None]
    unit = jnp.where(unit == 0, 1, unit)
    lift = 1e-12 if inner.dtype == jnp.float64 else 1e-6
    G, f = inner / unit[..., None] + lift * jnp.eye(k, dtype=inner.dtype), f / unit
    across = G[:, :-1] - G[:, -1:]
    right = f[:, -1:] - f[:, :-1] - across[:, :, -1]
    y = _solve(across[:, :, :-1] - across[:, :, -1:], right)
    return jnp.concatenate([y, 1 - y.sum(1, keepdims=True)], 1)


def _solve(matrix: Array, right: Array) -> Array:
    """x with matrix x = right, [B, m, m] symmetric and positive definite: Gauss-Jordan without pivots."""
    m = matrix.shape[1]
    system, row = jnp.concatenate([matrix, right[..., None]], 2), jnp.arange(m)[:, None]
    for i in range(m):
        pivot = system[:, i : i + 1] / system[:, i : i + 1, i : i + 1]
        system = jnp.where(row == i, pivot, system - system[:, :, i : i + 1] * pivot)
    return system[..., -1]


def _product(a: Array, b: Array) -> Array:
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
