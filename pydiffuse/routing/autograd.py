"""The gradients of gathering and scattering tokens: each is the other's.

    out = x[ids]:                              dx = scatter of dout into zeros
    out = base, at ids (1 - g) base + g y:     dbase = the same of dout with y = 0,  dy = g dout[ids],
                                               dg = <dout[ids], y - base[ids]>
ids are unique, so no two gradients meet in a token and nothing is ever added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Batched, derive, run
from pydiffuse._core.layouts import features_contiguous


def run_scatter(
    op: str, out: Tensor, base: Tensor | None, y: Tensor | None, ids: Tensor, gate: Tensor | None
) -> None:
    gate = None if gate is None else gate.contiguous()
    run(
        ops_for(op, out).scatter_tokens.default,
        out,
        None if base is None else features_contiguous(base),
        None if y is None else features_contiguous(y),
        ids.contiguous(),
        gate,
    )


class Gather(Batched):
    """(op, x [B, N, C], ids [B, keep] int32, gate [B, keep] float32 or None) -> ([B, keep, C],)."""

    @staticmethod
    def forward(op: str, x: Tensor, ids: Tensor, gate: Tensor | None) -> tuple[Tensor]:  # type: ignore[override]
        out = torch.empty(*ids.shape, x.shape[2], dtype=x.dtype, device=x.device)
        gate = None if gate is None else gate.contiguous()
        gather_tokens = ops_for(op, x).gather_tokens.default
        run(gather_tokens, out, features_contiguous(x), ids.contiguous(), gate)
        return (out,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, x, ids, gate = inputs
        ctx.N = x.shape[1]
        ctx.save_for_backward(x if gate is not None else None, ids, gate)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        x, ids, gate = ctx.saved_tensors
        dx = dgate = None
        if ctx.needs_input_grad[1]:
            (dx,) = derive(Scatter, ctx.op, ctx.N, None, dout, ids, gate)
        if gate is not None and ctx.needs_input_grad[3]:
            dgate = (dout.float() * derive(Gather, ctx.op, x, ids, None)[0].float()).sum(-1)
        return None, dx, None, dgate


class Scatter(Batched):
    """(op, N, base [B, N, C] or None, y [B, keep, C] or None, ids, gate or None) -> ([B, N, C],).

    What is None is zeros; not both are.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        op: str, N: int, base: Tensor | None, y: Tensor | None, ids: Tensor, gate: Tensor | None
    ) -> tuple[Tensor]:
        like = y if base is None else base
        assert like is not None
        out = torch.empty(ids.shape[0], N, like.shape[2], dtype=like.dtype, device=like.device)
        run_scatter(op, out, base, y, ids, gate)
        return (out,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.N, base, y, ids, gate = inputs
        own = (base, y) if gate is not None and gate.requires_grad else (None, None)
        ctx.save_for_backward(*own, ids, gate)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        base, y, ids, gate = ctx.saved_tensors
        dbase = dy = dgate = None
        if ctx.needs_input_grad[2]:
            (dbase,) = derive(Scatter, ctx.op, ctx.N, dout, None, ids, gate)
        if ctx.needs_input_grad[3]:
            (dy,) = derive(Gather, ctx.op, dout, ids, gate)
        if gate is not None and ctx.needs_input_grad[5]:
            there = derive(Gather, ctx.op, dout, ids, None)[0].float()
            dgate = torch.zeros_like(gate)
            if y is not None:
                dgate = dgate + (there * y.float()).sum(-1)
            if base is not None:
                dgate = dgate - (there * derive(Gather, ctx.op, base, ids, None)[0].float()).sum(-1)
        return None, None, dbase, dy, None, dgate
