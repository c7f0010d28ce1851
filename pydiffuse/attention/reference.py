"""The definition of tile attention in plain PyTorch: same name, same signature, any device.

Computed in float32, or in float64 for float64 inputs (the oracle of the tests), rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """out_i = sum_j p_ij v_j, p_ij = exp(s_ij - lse_i), s_ij = scale <q_i, k_j>, lse_i = log sum_j exp(s_ij),
    sums over the keys j that the plan lets query i see. A query that sees none: out 0, lse -inf.

    Efficient-vDiT, arXiv 2502.06155, section 3; Sliding Tile Attention, arXiv 2502.04507.
    """
    dtype, groups = q.dtype, q.shape[1] // k.shape[1] if k.shape[1] else 1
    q, k, v = (t if t.dtype is torch.float64 else t.float() for t in (q, k, v))
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        scale = scale.to(q.dtype).reshape(-1, 1, 1)
    seen = plan.to_dense().to(q.device)  # [P, Sq, Sk]
    if not _known_finite(q, k, v) and not seen.all():
        return _seen_alone(q, k, v, seen, scale, return_lse, dtype)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    some = (scores != -math.inf).any(-1)
    # A row of -inf has no softmax and no gradient: it is taken out before and put back after.
    lse = scores.masked_fill(~some[..., None], 0.0).logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    out = (p @ v).to(dtype)
    return (out, lse.masked_fill(~some, -math.inf)) if return_lse else out


def _known_finite(*tensors: Tensor) -> bool:
    """Also where a trace, a mode or a transform has no values to look at."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._len_torch_dispatch_stack() or tensors[0].is_meta:
        return True
    return all(bool(t.isfinite().all()) for t in tensors)


def _seen_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | Tensor,
    return_lse: bool,
    dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same sums without a single product of what is not seen, where 0 times a NaN would be one."""
    scale = scale.reshape(-1, 1) if isinstance(scale, Tensor) else scale
    outs, lses = [], []
    for i in range(q.shape[2]):
        sees = seen[:, i, :, None]  # [P, Sk, 1]
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        scores = (q[:, :, i, None] * torch.where(sees, k, zero)).sum(-1) * scale
        scores = scores.masked_fill(~sees[..., 0], -math.inf)
        some = (scores != -math.inf).any(-1)
        lse = scores.masked_fill(~some[..., None], 0.0).logsumexp(-1)
        p = (scores - lse[..., None]).exp()
        outs.append((p[..., None] * torch.where(sees, v, zero)).sum(-2))
        lses.append(lse.masked_fill(~some, -math.inf))
    out = torch.stack(outs, 2).to(dtype)
    return (out, torch.stack(lses, 2)) if return_lse else out
