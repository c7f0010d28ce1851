"""The causal convolution over tokens that are split over the ranks of a group, in path order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pydiffuse import conv
from pydiffuse._core.checks import check_flag, check_shape
from pydiffuse._core.structs import MAX_WIDTH
from pydiffuse.distributed.comm import Group, Ranks
from pydiffuse.paths.steps import PathLike, check_layout, path_of


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
    path: PathLike = None, reverse: bool = False, cu_seqlens: None = None, layout: str = "bdl",
    group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.causal_conv1d` of tokens in path order, rank after rank; the same bits as one process.

    x: [B, D, L] or [B, L, D], this rank's tokens; L may differ from rank to rank, and be 0. path: the order of
    this rank's tokens, if they do not lie in path order. reverse: from the last rank's last token to the first.
    weight, bias: the same on every rank. Sends W - 1 tokens to the next rank, and back to it their gradients.
    """
    op = "causal_conv1d"
    ranks = Ranks(op, group)
    with ranks.checking():
        check_one_sequence(op, cu_seqlens)
        check_layout(op, layout)
        check_flag(op, "reverse", reverse)
        bdl = layout == "bdl"
        check_shape(op, "x", x, (None, None, None), "(B, D, L)" if bdl else "(B, L, D)")
        check_shape(op, "weight", weight, (x.shape[1 if bdl else 2], None), "(D, W)", like=x)
        W, dim = weight.shape[1], 2 if bdl else 1
        if not 1 <= W <= MAX_WIDTH:
            raise ValueError(f"{op}: weight has width {W}; accepted: 1 to {MAX_WIDTH}")
        L = x.shape[dim]
        own = None if path is None else path_of(op, path, L).to(x.device)
        y = conv.causal_conv1d(
            x, weight, bias, activation=activation, path=own, reverse=reverse, layout=layout
        )
    if ranks.size == 1 or W == 1:
        return y
    due = torch.is_grad_enabled() and x.requires_grad
    channels, dtype = weight.shape[0], str(x.dtype).removeprefix("torch.")
    ranks.agree(batch=len(x), channels=channels, width=W, dtype=dtype, reverse=reverse, gradient=due)
    n = min(L, W - 1)
    order = torch.arange(L, device=x.device) if own is None else own.order.long()
    order = order.flip(0) if reverse else order
    head, tail = order[:n], order[L - n :]
    steps = x if not bdl else x.transpose(1, 2)
    halo = Halo.apply(ranks, reverse, W - 1, steps.index_select(1, tail))
    # The first steps once more, with what stands before them.
    first = torch.cat([halo, steps.index_select(1, head)], 1)
    first = conv.causal_conv1d(first, weight, bias, activation=activation, layout="bld")[:, W - 1 :]
    first = first.transpose(1, 2) if bdl else first
    return (y.index_copy if y.requires_grad else y.index_copy_)(dim, head, first)


def check_one_sequence(op: str, cu_seqlens: object) -> None:
    if cu_seqlens is not None:
        raise ValueError(f"{op}: cu_seqlens is given; accepted over ranks: None, one sequence per sample")


class Halo(Function):
    """(ranks, reverse, width, tail [B, n, D], the last n <= width steps) -> what stands before a rank's first step,
    [B, width, D]; zeros before the first rank's."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, reverse: bool, width: int, tail: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks, ctx.reverse, ctx.short = ranks, reverse, width - tail.shape[1]
        before, after = ranks.neighbours(reverse)
        halo = tail.new_zeros(len(tail), width, tail.shape[2])
        receives = [] if before is None else [(before, halo)]
        if ctx.short:  # what goes on came from before
            ranks.exchange([], receives)
            receives = []
            tail = torch.cat([halo, tail], 1)[:, -width:]
        ranks.exchange([] if after is None else [(after, tail)], receives)
        return halo

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ranks, short = ctx.ranks, ctx.short
        before, after = ranks.neighbours(ctx.reverse)
        back = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        receives = [] if after is None else [(after, back)]
        if short:
            ranks.exchange([], receives)
            receives = []
            n = back.shape[1] - short
            grad = torch.cat([grad[:, :n], grad[:, n:] + back[:, :short]], 1)
        ranks.exchange([] if before is None else [(before, grad)], receives)
        return None, None, None, back[:, short:]
