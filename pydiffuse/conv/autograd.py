"""The gradients of the causal convolution.

With g_l = dy_l act'(pre_l), pre computed again:
    dx_l = sum_w weight_w g_(l + W - 1 - w);  dweight_w = sum_l g_l x_(l - W + 1 + w);  dbias = sum_l g_l.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Operation, derive, run, second_derivative, vmap_batches
from pydiffuse._core.layouts import dense, new_tokens, of_gradient


class CausalConv1d(Operation):
    """(op, x [B, L, D], weight [D, W], bias [D] or None, order, offsets, silu) -> (y [B, L, D],)."""

    @staticmethod
    def forward(op: str, x: Tensor, *args: Any) -> tuple[Tensor]:  # type: ignore[override]
        out = new_tokens(x, x.shape)
        run(ops_for(op, x).causal_conv1d.default, out, x, *args)
        return (out,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        gradients = derive(CausalConv1dBackward, ctx.op, dy, *ctx.saved_tensors, ctx.silu)
        return None, *gradients, None, None, None

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_batches(apply, info, in_dims, args, parameters=(2, 3, 4, 5))


class CausalConv1dBackward(Operation):
    """(op, dy, x, weight, bias, order, offsets, silu) -> dx, dweight, dbias or None."""

    @staticmethod
    def forward(  # type: ignore[override]
        op: str, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dx, dweight = new_tokens(x, x.shape), torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        ops_for(op, x).causal_conv1d_backward.default(
            dx, dweight, dbias, of_gradient(dense, dy), x, weight, bias, *args
        )
        return dx, dweight, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative(ctx.op)

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_batches(apply, info, in_dims, args, parameters=None)
