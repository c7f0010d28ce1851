"""Attention that computes the tiles that a plan keeps, exactly, and no others.

    plan = pydiffuse.plans.frames(num_frames=16, tokens_per_frame=256, references=2)
    y = pydiffuse.tile_attention(q, k, v, plan)  # [B, H, 4096, D]

The work is in proportion to `plan.density`. The formulas stand in pydiffuse.reference.attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_flag
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse.attention import reference
from pydiffuse.attention.arguments import apart, autocast, check_attention, entropy_scale, fits, scale_of
from pydiffuse.attention.autograd import run_attention
from pydiffuse.plans import TilePlan


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TilePlan,
    *,
    scale: float | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the tiles of a plan.

    q: [B, H, S, D] of float32, bfloat16 or float16; k, v: [B, Hk, Sk, D] with Hk a divisor of H (grouped
    queries: heads h Hk / H share a key head). D: a multiple of 8 up to 256. Any strides; a transposed
    [B, S, H, D] costs no copy, and the result lies in memory as q does. plan: for S queries and Sk keys, one
    for all heads or one for each. scale: 1/sqrt(D) by default, a number, or a float tensor (H,), which takes
    no gradient; `entropy_scale` has the one for lengths other than the trained one.

    Returns out like q, and with return_lse also lse, float32 [B, H, S], the log of the sum of exp(scores),
    to join attentions over different keys. A query that sees no key gets 0 and -inf. Gradients for q, k and
    v, also through lse, once. What a query does not see has no influence on it, forward and backward, be it
    NaN or infinite (the reference's backward multiplies a NaN gradient of out by weights of 0,
    too). Under autocast q, k and v are cast as scaled_dot_product_attention casts them.

    Efficient-vDiT, arXiv 2502.06155; Sliding Tile Attention, arXiv 2502.04507.
    """
    op = "tile_attention"
    ops = dispatch.direct(op, q, k, v)
    if (
        ops
        and fits(q, k, plan, scale)
        and return_lse.__class__ is bool
        and not torch.is_autocast_enabled("cpu")
    ):
        number = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
        out, lse = ops.tile_attention.new(q, k, v, number, plan.packed, return_lse)
        if out is not None:
            return (out, lse) if return_lse else out
    q, k, v = autocast(q, k, v)
    check_attention(op, q, k, v, plan)
    check_flag(op, "return_lse", return_lse)
    scales = scale_of(op, scale, q)
    if dispatch.forced_reference():
        return reference.tile_attention(q, k, v, plan, scale=scale, return_lse=return_lse)
    given = apart(q, k, v)
    rest = (*scales, *plan.to(q.device).tensors)
    if needs_function(*given):
        out, lse = differentiable("attention.TileAttention", *given, *rest)
    else:
        out, lse = run_attention(*given, return_lse, *rest)
    return (out, lse) if return_lse else out


__all__ = ["entropy_scale", "tile_attention"]
