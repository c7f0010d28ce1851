"""Tile attention of tokens that are split over the ranks of a group.

Two methods. "ulysses" (arXiv 2309.14509): one all-to-all gives each rank all tokens of some heads, which attend as
on one process, and a second one gives the tokens back: the bits of one process, but
for the order of sums in dk and dv. "ring": queries stay and keys
travel, from rank to rank those that its queries see by the plan and no others; a rank joins what its queries made
of each rank's keys by their log-sum-exp, its own keys first and then those of the ranks behind it, one after the
other, whatever arrives first. The next keys are on their way while it computes. The backward fetches them again
and sends their gradients back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from pydiffuse import attention
from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_flag
from pydiffuse._core.functions import needs_function
from pydiffuse.attention.arguments import Scale, apart, autocast, check_attention, scale_of
from pydiffuse.attention.autograd import TileAttentionBackward, run_attention
from pydiffuse.distributed.comm import Exchange, Group, Ranks
from pydiffuse.distributed.slices import Part, bounds_of, of_heads, part, without_order
from pydiffuse.distributed.tokens import lengths_of, reorder
from pydiffuse.paths import from_order
from pydiffuse.plans import TilePlan

OP = "tile_attention"
METHODS = ("auto", "ulysses", "ring")


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, *, scale: float | Tensor | None = None,
    return_lse: bool = False, lengths: Sequence[int] | None = None, group: Group = None,
    method: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`pydiffuse.tile_attention` of tokens that stand rank after rank.

    q: [B, H, S_r, D], k, v: [B, Hk, S_r, D], this rank's tokens. plan: the global one, for sum_r S_r queries and
    keys. lengths: S_r of every rank, such as `split(plan, ranks)`; by default even parts, the first ones one
    longer. scale: as on one process, the same on every rank. method: "ulysses", which needs a key head for
    every rank; "ring"; "auto": "ulysses" where that can be. A plan with an order costs the ring an
    all-to-all of q, k and v into it, and one of the result. group: a mesh of two dimensions does both, for more ranks
    than heads: heads along its second dimension, whose ranks hold neighbouring tokens, rings along its first.

    Returns out like q, and with return_lse lse, float32 [B, H, S_r].
    """
    across = None
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        across, group = Ranks(OP, group.get_group(0)), group.get_group(1)
    ranks = Ranks(OP, group)
    size, rank = ranks.size, ranks.rank
    if across is not None:
        size, rank = size * across.size, rank + across.rank * ranks.size
    q, k, v = autocast(q, k, v)
    with ranks.checking(), nullcontext() if across is None else across.checking():
        if method not in METHODS:
            raise ValueError(f"{OP}: method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
        if across is not None and method != "auto":
            raise ValueError(
                f"{OP}: method is {method!r}; accepted over a mesh of two dimensions: 'auto'"
            )
        check_flag(OP, "return_lse", return_lse)
        if isinstance(plan, TilePlan) and plan.q_length != plan.k_length:
            raise ValueError(f"{OP}: {plan!r}; accepted over ranks: as many queries as keys")
        parts = _lengths(size, plan, lengths)
        check_attention(OP, q, k, v, plan, parts[rank])
        scales = scale_of(OP, scale, q)
        if method == "auto":
            method = "ulysses" if across is not None or k.shape[1] >= ranks.size else "ring"
        if method == "ulysses" and k.shape[1] < ranks.size:
            raise ValueError(
                f"{OP}: {k.shape[1]} key heads over {ranks.size} ranks; 'ulysses' accepts a head or more for"
                " each, 'ring' any number"
            )
        if (method == "ring" or across is not None) and dispatch.forced_reference() and size > 1:
            raise ValueError(f"{OP}: backend 'reference' was asked for; it accepts method='ulysses'")
    if size == 1:
        return attention.tile_attention(q, k, v, plan, scale=scale, return_lse=return_lse)
    due = needs_function(q, k, v)
    dtype = str(q.dtype).removeprefix("torch.")
    facts = dict(
        batch=len(q), heads=q.shape[1], key_heads=k.shape[1], head_dim=q.shape[3], dtype=dtype, method=method,
        plan=repr(plan), lengths=parts, lse=return_lse, gradient=due,
    )  # fmt: skip
    ranks.agree(**facts)
    if across is not None:
        across.agree(**facts)
    if method == "ring":
        out, lse = _ring(ranks, q, k, v, plan, parts, scales, return_lse)
    else:
        out, lse = _ulysses(ranks, across, q, k, v, plan, parts, scales, return_lse)
    return out if lse is None else (out, lse)


def _lengths(size: int, plan: Any, lengths: Any) -> tuple[int, ...]:
    if lengths is None and isinstance(plan, TilePlan):
        each, more = divmod(plan.q_length, size)
        return tuple(each + (r < more) for r in range(size))
    return lengths_of(OP, size, lengths, plan.q_length if isinstance(plan, TilePlan) else None)


def _ulysses(
    ranks: Ranks, across: Ranks | None, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, parts: tuple[int, ...],
    scales: Scale, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """across: those who hold other tokens of the same heads, if ranks are a row of a mesh."""
    rows = [parts[i : i + ranks.size] for i in range(0, len(parts), ranks.size)]
    parts = rows[0 if across is None else across.rank]
    B, H, _, D = q.shape
    Hk = k.shape[1]
    each, more = divmod(Hk, ranks.size)
    k_heads = bounds_of([each + (r < more) for r in range(ranks.size)])
    heads = [(a * H // Hk, b * H // Hk) for a, b in k_heads]
    mine, tokens = ranks.rank, bounds_of(parts)
    (a, b), (ka, kb) = heads[mine], k_heads[mine]
    n, nk = b - a, kb - ka
    given = [
        torch.cat([q[:, i:j], k[:, ki:kj], v[:, ki:kj]], 1)
        for (i, j), (ki, kj) in zip(heads, k_heads, strict=True)
    ]
    found = Exchange.apply(ranks, [(B, n + 2 * nk, s, D) for s in parts], *given)
    mq, mk, mv = torch.cat(found, 2).split([n, nk, nk], 1)
    per_head = None if scales.per_head is None else scales.per_head[a:b]
    own = of_heads(plan, (a, b))
    if across is not None:
        of_rows = tuple(map(sum, rows))
        out, lse = _ring(across, mq, mk, mv, own, of_rows, Scale(per_head, scales.number), return_lse)
    else:
        scale = scales.number if per_head is None else per_head
        result = attention.tile_attention(mq, mk, mv, own, scale=scale, return_lse=return_lse)
        out, lse = result if isinstance(result, tuple) else (result, None)

    def back(t: Tensor) -> Tensor:
        pieces = [t[:, :, i:j] for i, j in tokens]
        shapes = [(B, j - i, parts[mine], *t.shape[3:]) for i, j in heads]
        return torch.cat(Exchange.apply(ranks, shapes, *pieces), 1)

    return back(out), None if lse is None else back(lse)


class Pairs(NamedTuple):
    """Who needs whose keys: what this rank's queries see of every rank's, and every rank's of its own."""

    seen: list[Part | None]
    shown: list[Part | None]


class Ring(NamedTuple):
    ranks: Ranks
    pairs: Pairs
    scales: Scale


def _ring(
    ranks: Ranks, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, parts: tuple[int, ...],
    scales: Scale, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    order = plan.places()
    path = None if order is None else from_order(torch.from_numpy(order))
    if path is not None:
        heads = [t.shape[1] for t in (q, k, v)]
        q, k, v = reorder(
            torch.cat([q, k, v], 1), None, path, parts, dim=2, group=ranks.group
        ).split(heads, 1)  # fmt: skip
        plan = without_order(plan)
    ends = bounds_of(parts)
    own = ends[ranks.rank]
    pairs = Pairs(
        [part(plan, own, keys) for keys in ends], [part(plan, queries, own) for queries in ends]
    )
    ring = Ring(ranks, pairs, scales)
    q, k, v = apart(q, k, v)
    out, lse = RingAttention.apply(ring, q, k, v) if needs_function(q, k, v) else _forward(ring, q, k, v)
    if path is not None:
        out = reorder(out, path, None, parts, dim=2, group=ranks.group)
        lse = reorder(lse, path, None, parts, dim=2, group=ranks.group) if return_lse else lse
    return out, lse if return_lse else None


def _shown(keys: Tensor, seen: Part) -> Tensor:
    """What is seen of [.., S_r, D]."""
    return keys if seen.keys is None else keys.index_select(-2, seen.keys.to(keys.device))


class _Keys:
    """The keys and values [2, B, Hk, n, D] that this rank needs, rank after rank; the next are on their way."""

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self.ring, self.kv = ring, torch.stack([k, v])
        self.at, self.coming = 0, self._start(0)

    def _start(self, step: int) -> tuple[Tensor | None, Any]:
        ranks, (seen, shown) = self.ring.ranks, self.ring.pairs
        if step >= ranks.size:
            return None, ([], [])
        source, target = (ranks.rank + step) % ranks.size, (ranks.rank - step) % ranks.size
        here, there = seen[source], shown[target]
        if step == 0:
            return None if here is None else _shown(self.kv, here), ([], [])
        found = None
        if here is not None:
            found = self.kv.new_empty(*self.kv.shape[:3], here.number, self.kv.shape[4])
        sends = [] if there is None else [(target, _shown(self.kv, there))]
        return found, ranks.start(sends, [] if found is None else [(source, found)])

    def next(self) -> tuple[int, Part | None, Tensor | None]:
        """The rank, what is seen of it, its keys and values."""
        ranks = self.ring.ranks
        source = (ranks.rank + self.at) % ranks.size
        found, transfer = self.coming
        self.at += 1
        following = self._start(self.at)
        ranks.finish(transfer)
        self.coming = following
        return source, self.ring.pairs.seen[source], found


def _forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    keys = _Keys(ring, k, v)
    for _ in range(ring.ranks.size):
        _, seen, kv = keys.next()
        if seen is None or kv is None:
            continue
        plan = seen.plan.to(q.device).tensors
        more, its = run_attention(q, kv[0], kv[1], True, *ring.scales, *plan)
        assert its is not None
        total = torch.logaddexp(lse, its)
        none = total == -torch.inf
        for t, at in ((out, lse), (more := more.float(), its)):
            t.mul_(torch.where(none, 0, (at - total).exp())[..., None])
        out += more
        lse = total
    return out.to(q.dtype), lse


class RingAttention(Function):
    """(ring, q, k, v) -> out, lse."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, lse = _forward(ring, q, k, v)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        ranks, shown = ring.ranks, ring.pairs.shown
        dout = torch.zeros_like(out) if dout is None else dout
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dkv = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)
        keys = _Keys(ring, k, v)
        for step in range(ranks.size):
            source, seen, kv = keys.next()
            grads = None
            if seen is not None and kv is not None:
                plan = seen.plan.to(q.device).tensors
                of_q, of_k, of_v = TileAttentionBackward.forward(
                    dout, dlse, out, lse, q, kv[0], kv[1], *ring.scales, *plan
                )
                dq += of_q
                grads = torch.stack([of_k, of_v])
            target = (ranks.rank - step) % ranks.size
            mine = shown[target]
            if step == 0:
                found = grads
            else:
                found = None
                if mine is not None:
                    found = k.new_empty(2, *k.shape[:2], mine.number, k.shape[3])
                ranks.exchange(
                    [] if grads is None else [(source, grads)], [] if found is None else [(target, found)]
                )
            if found is not None and mine is not None:
                if mine.keys is None:
                    dkv += found
                else:
                    dkv.index_add_(3, mine.keys.to(k.device), found.float())
        dk, dv = dkv.to(k.dtype)
        return None, dq.to(q.dtype), dk, dv
