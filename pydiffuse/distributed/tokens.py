"""Tokens from one order to another, over the ranks that hold them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pydiffuse._core.checks import check_shape
from pydiffuse.distributed.comm import Group, Ranks
from pydiffuse.distributed.slices import bounds_of
from pydiffuse.paths import ScanPath


class Move(NamedTuple):
    """Which of a rank's tokens go where, in the order in which they are sent, and where those that come belong."""

    sends: Tensor  # int64: tokens of this rank, those for rank 0 first
    to: list[int]  # how many for each rank
    takes: Tensor  # int64: places of this rank, those that come from rank 0 first
    of: list[int]  # how many from each rank


def reorder(
    x: Tensor, source: ScanPath | None, target: ScanPath | None, lengths: Sequence[int], *, dim: int = 1,
    group: Group = None,
) -> Tensor:  # fmt: skip
    """x with its tokens in another order: one all-to-all, in which every token is sent once at most.

    x: any tensor with this rank's tokens in `dim`. source, target: the orders before and after, over the tokens
    of all ranks, None for their own; rank r holds lengths[r] of them, one rank after the other. What goes to
    which rank is worked out once per pair of paths. Differentiable.
    """
    ranks = Ranks("reorder", group)
    with ranks.checking():
        lengths = lengths_of(ranks.op, ranks.size, lengths)
        for name, path in (("source", source), ("target", target)):
            if path is not None and (not isinstance(path, ScanPath) or path.length != sum(lengths)):
                raise ValueError(
                    f"reorder: {name} is {path!r}; accepted: a ScanPath of {sum(lengths)} tokens, or None"
                )
        sizes: list[int | None] = [None] * x.dim()
        sizes[dim] = lengths[ranks.rank]
        check_shape("reorder", "x", x, sizes, "this rank's tokens")
    if source == target or (ranks.size == 1 and source is None and target is None):
        return x
    moved = x.movedim(dim, 0)
    sample = "x".join(str(s) for s in moved.shape[1:])
    due = torch.is_grad_enabled() and x.requires_grad
    ranks.agree(lengths=lengths, token=sample, source=source and _name(source), target=target and _name(target),
        gradient=due)  # fmt: skip
    forth = _move(source, target, lengths, ranks.rank)
    back = _move(target, source, lengths, ranks.rank)
    return Tokens.apply(ranks, forth, back, moved).movedim(0, dim)


def _name(path: ScanPath) -> str:
    return f"{path.name}{path.shape}{path.parameters}"


def lengths_of(op: str, size: int, lengths: Any, total: int | None = None) -> tuple[int, ...]:
    given = tuple(lengths) if isinstance(lengths, Sequence) else ()
    whole = all(type(n) is int and n >= 0 for n in given)
    if len(given) != size or not whole or total not in (None, sum(given)):
        of = "" if total is None else f", {total} in all"
        raise ValueError(
            f"{op}: lengths is {lengths!r}; accepted: {size} ints, the tokens of each rank{of}"
        )
    return given


@functools.lru_cache(maxsize=256)
def _move(source: ScanPath | None, target: ScanPath | None, lengths: tuple[int, ...], rank: int) -> Move:
    total, ends = sum(lengths), bounds_of(lengths)
    own = torch.arange(total)
    order, place = (
        (own, own) if source is None else (source.order.cpu().long(), source.inverse.cpu().long())
    )
    new_order, new_place = (
        (own, own) if target is None else (target.order.cpu().long(), target.inverse.cpu().long())
    )
    bounds = torch.tensor([last for _, last in ends])
    first, last = ends[rank]
    # Where this rank's tokens go, and where what it will hold comes from; both by sender, then by the new place.
    goes = new_place[order[first:last]]
    sends = torch.argsort(goes)
    comes = place[new_order[first:last]]
    owner = torch.bucketize(comes, bounds, right=True)
    takes = torch.argsort(owner, stable=True)
    to = torch.bucketize(goes, bounds, right=True)
    counts = [torch.bincount(t, minlength=len(lengths)).tolist() for t in (to, owner)]
    return Move(sends, counts[0], takes, counts[1])


class Tokens(Function):
    """(ranks, the move, the move back, x [L, ...]) -> [L, ...]."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, forth: Move, back: Move, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks, ctx.forth, ctx.back = ranks, forth, back
        parts = x.index_select(0, forth.sends.to(x.device)).split(forth.to)
        found = ranks.all_to_all(parts, [(n, *x.shape[1:]) for n in forth.of])
        out = x.new_empty(x.shape)
        return out.index_copy_(0, forth.takes.to(x.device), torch.cat(found))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, None, Tokens.apply(ctx.ranks, ctx.back, ctx.forth, grad.contiguous())
