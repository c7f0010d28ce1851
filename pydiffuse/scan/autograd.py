"""The gradients of the selective scan, by recomputation.

Saved are the inputs and the state before every 64th step. The backward walks the chunks from the last to
the first, computes the states of one again, and carries dh_l = C_l dy_l + a_(l+1) dh_(l+1) through it:
    dC_l = dy_l h_l;  dB_l = delta_l u_l dh_l;  du_l = delta_l <B_l, dh_l> + D dy_l;
    ddelta_l = u_l <B_l, dh_l> + <A, dh_l a_l h_(l-1)>;  dA = sum_l delta_l dh_l a_l h_(l-1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for, scan_backward_ops
from pydiffuse._core.functions import (
    Batched,
    Operation,
    derive,
    folded,
    run,
    second_derivative,
    unfolded,
    vmap_batches,
)
from pydiffuse._core.layouts import dense, new_tokens, of_gradient
from pydiffuse._core.structs import CHUNK, ScanArguments


def chunk_count(L: int) -> int:
    return -(-L // CHUNK)


def run_scan(
    op: str, args: ScanArguments, *, with_last: bool, with_chunks: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [B, L, D], the last states [B, S, K, D, N] and the chunk states [B, K, chunks, D, N]."""
    batch, L, channels = args.u.shape
    K, _, N = args.A.shape
    # The sum over several paths is rounded once.
    wide = torch.float32 if K > 1 else args.u.dtype
    out = new_tokens(args.u, (batch, L, channels), wide)
    sequences = 1 if args.offsets is None else args.offsets.numel() - 1
    last = args.A.new_empty(batch, sequences, K, channels, N) if with_last else None
    chunks = args.A.new_empty(batch, K, chunk_count(L), channels, N) if with_chunks else None
    run(ops_for(op, args.u).selective_scan.default, out, last, chunks, *args)
    # No `to` that changes nothing: Dynamo (torch 2.11) loses the gradient of an output that has been through it.
    return out if out.dtype == args.u.dtype else out.to(args.u.dtype), last, chunks


class SelectiveScan(Operation):
    """(op, with_last, *ScanArguments) -> y, chunk states, and the last states if asked for."""

    @staticmethod
    def forward(op: str, with_last: bool, *args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, last, chunks = run_scan(op, ScanArguments(*args), with_last=with_last, with_chunks=True)
        assert chunks is not None
        return (y, chunks) if last is None else (y, chunks, last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, _, *args = inputs
        chunks = output[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chunks)
        ctx.softplus = args[-1]
        ctx.save_for_backward(chunks, *args[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any, dlast: Tensor | None = None) -> Any:  # type: ignore[override]
        chunks, *args = ctx.saved_tensors
        if dy is None and dlast is None:
            return None, None, *[None] * 12
        u = args[0]
        dy = torch.zeros_like(u) if dy is None else dy
        gradients = derive(SelectiveScanBackward, ctx.op, dy, dlast, chunks, *args, ctx.softplus)
        return None, None, *gradients, None, None, None

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_batches(apply, info, in_dims, args, parameters=(4, 7, 9, 11, 12))


class SelectiveScanBackward(Operation):
    """(op, dy, dlast, chunks, *ScanArguments) -> the gradients of u .. initial, None for None."""

    @staticmethod
    def forward(  # type: ignore[override]
        op: str, dy: Tensor, dlast: Tensor | None, chunks: Tensor, *given: Any
    ) -> tuple[Tensor | None, ...]:
        args = ScanArguments(*given)
        u, K = args.u, args.A.shape[0]
        wide = torch.float32 if K > 1 else None  # sums over the paths

        def weights(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=torch.float32, device=t.device)

        def maybe(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

        du = new_tokens(u, u.shape, wide)
        ddelta = new_tokens(args.delta, args.delta.shape)
        dA, dB, dC = torch.empty_like(args.A), weights(args.B), weights(args.C)
        dD, dbias, dinitial = maybe(args.D), maybe(args.delta_bias), maybe(args.initial)
        dz = None if args.z is None else new_tokens(args.z, args.z.shape, wide)
        dlast = None if dlast is None else dlast.float().contiguous()
        scan_backward_ops(op, u, args.A.shape[-1]).selective_scan_backward.default(
            du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial, of_gradient(dense, dy), dlast, chunks, *args
        )
        dz = None if dz is None or args.z is None else dz.to(args.z.dtype)
        dB, dC = dB.to(args.B.dtype), dC.to(args.C.dtype)
        return du.to(u.dtype), ddelta, dA, dB, dC, dD, dz, dbias, dinitial

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative(ctx.op)

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        # Gradients of parameters belong to one sample of the vmap: nothing folds.
        return vmap_batches(apply, info, in_dims, args, parameters=None)


class StateUpdate(Batched):
    """(state [B, D, N], x, dt, A [D, N], B, C [B, G, N], D, z, dt_bias, softplus) -> y [B, D], the new state.

    All contiguous, the state and parameters float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        state: Tensor, x: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        out, state = torch.empty_like(x), state.clone()
        ops_for("selective_state_update", x).selective_state_update.default(out, state, x, *rest)
        return out, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "selective_state_update: it takes no part in autograd; accepted: calls under torch.no_grad()"
        )

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if any(in_dims[i] is not None for i in (3, 6, 8)):  # parameters
            return vmap_batches(apply, info, in_dims, args, parameters=None)
        flat = [t if i in (3, 6, 8) else folded(info, in_dims[i], t) for i, t in enumerate(args)]
        return unfolded(info, apply(*flat))
