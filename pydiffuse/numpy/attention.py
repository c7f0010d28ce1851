"""Tile attention on arrays: see pydiffuse.attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydiffuse import _host
from pydiffuse._core.limits import MAX_HEAD_DIM
from pydiffuse.numpy.arrays import Array, Outputs, Scalar, describe, flag, numbers, shaped
from pydiffuse.numpy.steps import any_strides
from pydiffuse.plans import TilePlan

OP = "tile_attention"


def tile_attention(
    q: Array,
    k: Array,
    v: Array,
    plan: TilePlan,
    *,
    scale: Scalar | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """softmax(scale q k^T) v over the tiles of a plan, [B, H, S, D]; with return_lse also lse [B, H, S].

    See pydiffuse.tile_attention. Plans of pydiffuse.plans need no torch either.
    """
    names = "[B, H, S, D]"
    q = shaped(OP, "q", q, (None,) * 4, names)
    B, H, S, D = q.shape
    k = shaped(OP, "k", k, (B, None, None, D), names)
    v = shaped(OP, "v", v, k.shape, f"{names}, as k is")
    for name, a in (("k", k), ("v", v)):
        if a.dtype.name != q.dtype.name:
            raise TypeError(f"{OP}: {name} is {describe(a)}; accepted: {q.dtype}, as q is")
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        remedy = f"; pad q, k and v to {-(-D // 8) * 8}" if 0 < D < MAX_HEAD_DIM else ""
        raise ValueError(f"{OP}: head_dim {D} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}{remedy}")
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"{OP}: q has {H} heads and k and v have {k.shape[1]}; accepted: a divisor of q's heads"
        )
    _check_plan(plan, H, S, k.shape[2])
    number, scales = _scale(scale, H, D)
    lse = np.empty((B, H, S), np.float32) if flag(OP, "return_lse", return_lse) else None
    outs = Outputs(OP, out, [(q.shape, q.dtype)], read=(q, k, v))
    q, k, v = (_features_together(a) for a in (q, k, v))
    _host.tile_attention(outs.arrays[0], lse, q, k, v, scales, number, plan.packed_array)
    result = outs.results()
    return result if lse is None else (result, lse)


def _features_together(a: Array) -> Array:
    a = any_strides(a)
    return a if a.strides[-1] == a.itemsize or not a.size else a.copy(order="C")


def _check_plan(plan: Any, H: int, S: int, keys: int) -> None:
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
    given = numbers(OP, "scale", scale)
    if given.shape not in ((), (H,)) or not np.all(np.abs(given) < 3e38):
        raise ValueError(
            f"{OP}: scale is {describe(scale)}; accepted: a finite number, or ({H},), one for each head"
        )
    return (float(given), None) if given.ndim == 0 else (1.0, given.astype(np.float32))
