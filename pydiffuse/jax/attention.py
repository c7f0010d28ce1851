"""Tile attention on JAX arrays: see pydiffuse.attention.

Gradients recompute: saved are the inputs, the output and lse.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse._core.limits import MAX_HEAD_DIM
from pydiffuse._core.words import check_flag
from pydiffuse.jax.arrays import Scalar, describe, is_array, like, no_gradient, no_second
from pydiffuse.jax.calls import Like, alike, call
from pydiffuse.jax.steps import shaped
from pydiffuse.plans import TilePlan

OP = "tile_attention"
SCALES, LSE = 1, 2


class Form(NamedTuple):
    op: str
    scale: float
    with_lse: bool


def tile_attention(
    q: Array,
    k: Array,
    v: Array,
    plan: TilePlan,
    *,
    scale: Scalar | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale q k^T) v over the tiles of a plan, [B, H, S, D]; with return_lse also lse [B, H, S].

    See pydiffuse.tile_attention. The plan is static: an argument of a jitted function that jit is told of
    (static_argnames), or closed over. scale: a number, () or (H,), without a gradient.
    """
    names = "[B, H, S, D]"
    q = shaped(OP, "q", q, (None,) * 4, names)
    B, H, S, D = q.shape
    k = shaped(OP, "k", k, (B, None, None, D), names)
    v = shaped(OP, "v", v, k.shape, f"{names}, as k is")
    for name, a in (("k", k), ("v", v)):
        if a.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} is {describe(a)}; accepted: {q.dtype}, as q is")
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        remedy = f"; pad q, k and v to {-(-D // 8) * 8}" if 0 < D < MAX_HEAD_DIM else ""
        raise ValueError(f"{OP}: head_dim {D} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}{remedy}")
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"{OP}: q has {H} heads and k and v have {k.shape[1]}; accepted: a divisor of q's heads"
        )
    check_plan(plan, H, S, k.shape[2])
    check_flag(OP, "return_lse", return_lse)
    number, scales = _scale(scale, H, D)
    form = Form(OP, number, return_lse)
    results = _attention(form, *alike(q, k, v, scales, jnp.asarray(plan.packed_array)))
    return results if return_lse else results[0]


def check_plan(plan: Any, H: int, S: int, keys: int) -> None:
    if not isinstance(plan, TilePlan):
        raise TypeError(f"{OP}: plan is {describe(plan)}; accepted: a TilePlan of pydiffuse.plans")
    for name, tokens, length in (("q", S, plan.q_length), ("k", keys, plan.k_length)):
        if tokens != length:
            raise ValueError(
                f"{OP}: {name} has {tokens} tokens and {plan!r} is for {length}; accepted: a plan made for"
                " this length"
            )
    if plan.heads != 1 and plan.heads != H:
        raise ValueError(f"{OP}: {plan!r} is for {plan.heads} heads and q has {H}; accepted: 1 or {H}")


def _scale(scale: Any, H: int, D: int) -> tuple[float, Array | None]:
    """A number for all heads, or float32 [H]."""
    if scale is None:
        return 1 / math.sqrt(D), None
    if not is_array(scale):
        if not isinstance(scale, int | float) or not abs(scale) < 3e38:
            raise ValueError(f"{OP}: scale is {describe(scale)}; accepted: a finite number, () or ({H},)")
        return float(scale), None
    if scale.shape not in ((), (H,)):
        raise ValueError(f"{OP}: scale is {describe(scale)}; accepted: a finite number, () or ({H},)")
    scale = no_gradient(OP, "scale takes no gradient; multiply q by it and give scale=1", scale)
    return 1.0, jnp.broadcast_to(scale.astype(jnp.float32), (H,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: Form, q: Array, k: Array, v: Array, scales: Array | None, plan: Array) -> Any:
    """-> (out,), or out and lse."""
    return _run(form, form.with_lse, q, k, v, scales, plan)


def _run(form: Form, with_lse: bool, q: Array, k: Array, v: Array, scales: Any, plan: Array) -> Any:
    has = (SCALES if scales is not None else 0) | (LSE if with_lse else 0)
    results = [like(q), Like(q.shape[:3], jnp.float32)][: 2 if with_lse else 1]
    return tuple(
        call("tile_attention", results, _given(q, k, v, scales, plan), has=has, scale=form.scale)
    )


def _given(q: Array, k: Array, v: Array, scales: Array | None, plan: Array) -> list[Array]:
    return [q, k, v, *([] if scales is None else [scales]), plan]


def _forward(form: Form, *arrays: Any) -> Any:
    out, lse = _run(form, True, *arrays)
    return ((out, lse) if form.with_lse else (out,)), (arrays, out, lse)


def _backward(form: Form, saved: Any, grads: tuple[Array, ...]) -> Any:
    arrays, out, lse = saved
    dlse = grads[1] if form.with_lse else None
    return *_attention_backward(form, grads[0], dlse, out, lse, *arrays), None, None


_attention.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention_backward(form: Form, dout: Array, dlse: Any, out: Array, lse: Array, *arrays: Any) -> Any:
    """-> dq, dk, dv."""
    has = (SCALES if arrays[3] is not None else 0) | (LSE if dlse is not None else 0)
    inputs = [*_given(*arrays), out, lse, dout, *([] if dlse is None else [dlse])]
    results = [like(a) for a in arrays[:3]]
    return tuple(call("tile_attention_backward", results, inputs, has=has, scale=form.scale))


_attention_backward.defvjp(no_second, lambda form, saved, grads: ())
