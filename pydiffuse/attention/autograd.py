"""The gradients of tile attention, by recomputation: saved are the inputs, the output and lse.

p_ij = exp(s_ij - lse_i);  dv_j = sum_i p_ij do_i;  dp_ij = <do_i, v_j>;
ds_ij = p_ij (dp_ij - delta_i), delta_i = <do_i, o_i> - dlse_i;
dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Operation, derive, folded, second_derivative, unfolded, vmap_batches
from pydiffuse._core.layouts import features_contiguous, new_heads, of_gradient

OP = "tile_attention"


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, with_lse: bool, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """rest: per-head scales, scale, and the plan's tensors."""
    out = new_heads(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if with_lse else None
    ops_for(OP, q).tile_attention.default(
        out, lse, features_contiguous(q), features_contiguous(k), features_contiguous(v), *rest
    )
    return out, lse


class TileAttention(Operation):
    """(q, k, v, scales, scale, *PlanTensors) -> out, lse."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, lse = run_attention(q, k, v, True, *rest)
        assert lse is not None
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, scales, ctx.scale, *plan = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, q, k, v, scales, *plan)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        out, lse, q, k, v, scales, *plan = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (5 + len(plan))
        dout = torch.zeros_like(out) if dout is None else dout
        given = (dout, dlse, out, lse, q, k, v, scales, ctx.scale, *plan)
        return *derive(TileAttentionBackward, *given), *[None] * (2 + len(plan))

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _more_samples(apply, 3, info, in_dims, args)


class TileAttentionBackward(Operation):
    """(dout, dlse or None, out, lse, *arguments of TileAttention) -> dq, dk, dv."""

    @staticmethod
    def forward(  # type: ignore[override]
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grads = tuple(new_heads(t) for t in (q, k, v))
        dlse = None if dlse is None else dlse.float().contiguous()
        ops_for(OP, q).tile_attention_backward.default(
            *grads,
            of_gradient(features_contiguous, dout),
            dlse,
            features_contiguous(out),
            lse,
            features_contiguous(q),
            features_contiguous(k),
            features_contiguous(v),
            *rest,
        )
        return grads  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative(OP)

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _more_samples(apply, 7, info, in_dims, args)


def _more_samples(
    apply: Any, batched: int, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Any:
    """vmap is more samples. batched: how many of the first arguments are [B, ...]; the others are the plan and
    per-head scales, with which, where they are mapped, it is call by call."""
    if all(dim is None for dim in in_dims[batched:]):
        flat = [folded(info, dim, t) for dim, t in zip(in_dims[:batched], args, strict=False)]
        return unfolded(info, apply(*flat, *args[batched:]))
    return vmap_batches(apply, info, in_dims, args, parameters=None)
