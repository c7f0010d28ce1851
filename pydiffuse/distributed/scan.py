"""The selective scan over tokens that are split over the ranks of a group, in path order.

    h_in of a rank = its predecessor's last state: last_r = S_r + P_r h_in_r, with S_r the last state of a scan
    from zero and P_r = exp(A sum_l delta_l), the product of the rank's decays.

Two methods. "pipeline": channels are independent, so a rank scans a block of them from the state that the rank
before it has left there, and hands its own last state on while it scans the next block. One scan, B D N numbers
to the next rank, the bits of one process; of R ranks and K blocks the last one begins R - 1 blocks late.
"gather": every rank scans from zero, one all-gather of (P_r, S_r), 2 B D N numbers, and a second scan from h_in
on all ranks but the first. Nobody waits for a chain of ranks, which pays for many ranks and short parts.

The second scan is the correction y_l += <C_l, prod_(k<=l) a_k h_in>: it has the same exponentials, which are what
a scan takes its time for. The backward runs the other way round: the gradient of h_in is that of the
predecessor's last state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pydiffuse._core import dispatch
from pydiffuse._core.functions import needs_function
from pydiffuse._core.layouts import dense, new_tokens
from pydiffuse._core.structs import ScanArguments
from pydiffuse.distributed.comm import Group, Ranks
from pydiffuse.distributed.conv import causal_conv1d, check_one_sequence
from pydiffuse.paths import ScanPath
from pydiffuse.paths.steps import PathLike
from pydiffuse.scan import selective_scan as on_one_rank
from pydiffuse.scan import zigzag_mamba_inner as inner_on_one_rank
from pydiffuse.scan.arguments import scan_arguments
from pydiffuse.scan.autograd import chunk_count

OP = "selective_scan"
METHODS = ("auto", "pipeline", "gather")
BLOCK = 64
"""Channels of a block of the pipeline: a multiple of what the kernels take at once."""
BLOCKS_PER_RANK = 4
"""The last of R ranks begins R - 1 blocks late, of at least 4 (R - 1) where there are channels enough."""
PIPELINE_RANKS = 8


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, *, path: PathLike = None, reverse: bool = False,
    initial_state: Tensor | None = None, cu_seqlens: None = None, layout: str = "bdl", group: Group = None,
    method: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`pydiffuse.selective_scan` of tokens in path order, rank after rank.

    u, delta, z, B, C: this rank's tokens, whose number may differ from rank to rank, and be 0. path: the order
    of this rank's tokens, if they do not lie in path order. reverse: from the last rank's last token to the
    first. A, D, delta_bias, constant B or C and initial_state, before the first step of all: the same on every
    rank. method: "pipeline", "gather" (see the module), or "auto": the pipeline for up to 8 ranks.

    Returns y like u, with return_last_state also the state after the last step of all, on every rank.
    """
    ranks = Ranks(OP, group)
    with ranks.checking():
        if method not in METHODS:
            raise ValueError(f"{OP}: method is {method!r}; accepted: {', '.join(map(repr, METHODS))}")
        check_one_sequence(OP, cu_seqlens)
        if isinstance(path, list | tuple) and path and isinstance(path[0], ScanPath):
            raise TypeError(f"{OP}: path is a list of paths; accepted over ranks: one path")
        if dispatch.forced_reference() and ranks.size > 1:
            raise ValueError(
                f"{OP}: backend 'reference' was asked for; over ranks it has cpu, cuda, triton"
            )
        args, _ = scan_arguments(
            OP, u, delta, A, B, C, D, z, delta_bias, delta_softplus, path, reverse, initial_state, None, layout
        )  # fmt: skip
    if ranks.size == 1:
        return on_one_rank(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, path=path,
            reverse=reverse, initial_state=initial_state, layout=layout,
        )  # fmt: skip
    due = needs_function(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if method == "auto":
        method = "pipeline" if ranks.size <= PIPELINE_RANKS else "gather"
    batch, _, channels = args.u.shape
    ranks.agree(
        batch=batch, channels=channels, states=args.A.shape[2], groups=_groups(args), method=method,
        initial=args.initial is not None, last=bool(return_last_state), reverse=reverse, gradient=due,
    )  # fmt: skip
    how = How(ranks, bool(reverse), method == "pipeline", bool(return_last_state))
    y, *last = Scan.apply(how, *args) if due else _forward(how, args)[:2]
    y = y.transpose(1, 2) if layout == "bdl" else y
    return (y, last[0][:, 0, 0]) if return_last_state else y


def zigzag_mamba_inner(*args: Any, group: Group = None, **options: Any) -> Tensor:
    """`pydiffuse.zigzag_mamba_inner`, xz [B, 2 D, L] or [B, L, 2 D] this rank's tokens in path order, or in the order
    of path: `causal_conv1d` and `selective_scan` over the ranks, projections of each rank's own tokens."""
    conv, scan = (functools.partial(op, group=group) for op in (causal_conv1d, selective_scan))  # type: ignore[operator]
    return inner_on_one_rank(*args, ops=(conv, scan), **options)


class How(NamedTuple):
    ranks: Ranks
    reverse: bool
    pipeline: bool
    with_last: bool


class Block(NamedTuple):
    """Some channels of one group, or all channels."""

    channels: slice
    groups: slice


def _groups(args: ScanArguments) -> int:
    return next((t.shape[2] for t in (args.B, args.C) if t.dim() == 5), 1)


def _blocks(args: ScanArguments, ranks: int) -> list[Block]:
    channels, groups = args.u.shape[2], _groups(args)
    each = channels // groups
    wanted = BLOCKS_PER_RANK * (ranks - 1)
    width = max(BLOCK, -(-channels // wanted // BLOCK) * BLOCK)
    return [
        Block(slice(g * each + c, g * each + min(c + width, each)), slice(g, g + 1))
        for g in range(groups)
        for c in range(0, each, width)
    ]


def _of(args: ScanArguments, block: Block, initial: Tensor | None) -> ScanArguments:
    c = block.channels

    def weights(t: Tensor) -> Tensor:
        return t[:, c] if t.dim() == 3 else t[:, :, block.groups]

    return args._replace(
        u=args.u[..., c],
        delta=args.delta[..., c],
        A=args.A[:, c],
        B=weights(args.B),
        C=weights(args.C),
        D=None if args.D is None else args.D[:, c],
        z=None if args.z is None else args.z[..., c],
        delta_bias=None if args.delta_bias is None else args.delta_bias[:, c],
        initial=initial,
    )


def _scan(args: ScanArguments, out: Tensor, with_chunks: bool) -> tuple[Tensor, Tensor | None]:
    batch, L, channels = args.u.shape
    last = args.A.new_empty(batch, 1, 1, channels, args.A.shape[2])
    chunks = None
    if with_chunks:
        chunks = args.A.new_empty(batch, 1, chunk_count(L), channels, args.A.shape[2])
    dispatch.ops_for(OP, args.u).selective_scan.default(out, last, chunks, *args)
    return last, chunks


Saved = tuple[list[Tensor | None], list[Tensor | None], Tensor | None]
"""Of every block the state it began from and its chunks' states; the product of the rank's decays."""


def _forward(how: How, args: ScanArguments, with_chunks: bool = False) -> tuple[Tensor, Tensor, Saved]:
    """y [B, L, D]; the last state of all [B, 1, 1, D, N] (this rank's own where it is not asked for)."""
    out = new_tokens(args.u, args.u.shape)
    last, saved = (_pipelined if how.pipeline else _gathered)(how, args, out, with_chunks)
    return out, last, saved


class Coming:
    """The states that a rank sends, block by block. On a CPU all of them may come while this rank computes; a GPU's
    transfers are one queue, in which a block must not wait for what comes after it."""

    def __init__(self, ranks: Ranks, source: int | None, states: list[Tensor | None]) -> None:
        self.ranks, self.source, self.states = ranks, source, states
        self.started: list[Any] = []
        here = states[0] is not None and states[0].device.type == "cpu"
        for _ in range(len(states) if here else 1):
            self.post()

    def post(self) -> None:
        i = len(self.started)
        if self.source is not None and i < len(self.states):
            self.started.append(self.ranks.start([], [(self.source, self.states[i])]))  # type: ignore[list-item]

    def wait(self, i: int) -> None:
        if self.source is not None:
            self.ranks.finish(self.started[i])


def _pipelined(how: How, args: ScanArguments, out: Tensor, with_chunks: bool) -> tuple[Tensor, Saved]:
    ranks = how.ranks
    before, after = ranks.neighbours(how.reverse)
    batch, N = len(args.u), args.A.shape[2]
    blocks = _blocks(args, ranks.size)
    begins: list[Tensor | None] = []
    for block in blocks:
        if before is None:
            begins.append(
                None if args.initial is None else args.initial[..., block.channels, :].contiguous()
            )
        else:
            d = block.channels.stop - block.channels.start
            begins.append(args.A.new_empty(batch, 1, 1, d, N))
    coming = Coming(ranks, before, begins)
    lasts, chunks, sent = [], [], []
    for i, block in enumerate(blocks):
        coming.wait(i)
        last, states = _scan(_of(args, block, begins[i]), out[..., block.channels], with_chunks)
        if after is not None:
            sent.append(ranks.start([(after, last)], []))
        coming.post()
        lasts.append(last)
        chunks.append(states)
    for each in sent:
        ranks.finish(each)
    last = torch.cat(lasts, 3)
    if how.with_last:
        ranks.broadcast(last, ranks.end(how.reverse))
    return last, (begins, chunks, None)


def _gathered(how: How, args: ScanArguments, out: Tensor, with_chunks: bool) -> tuple[Tensor, Saved]:
    ranks = how.ranks
    first = ranks.neighbours(how.reverse)[0] is None
    start = args._replace(initial=args.initial if first else None)
    last, chunks = _scan(start, out, with_chunks)
    decay = _decay(args)
    every = ranks.all_gather(torch.stack([decay, last]))
    states = [torch.zeros_like(last)]
    for P, S in ranks.in_order(every, how.reverse):
        states.append(P * states[-1] + S)
    begin = start.initial
    if not first:
        begin = states[ranks.position(how.reverse)]
        _, chunks = _scan(args._replace(initial=begin), out, with_chunks)
    return states[-1], ([begin], [chunks], decay)


def _decay(args: ScanArguments) -> Tensor:
    """exp(A sum_l delta_l), [B, 1, 1, D, N]."""
    delta = args.delta.float()
    if args.delta_bias is not None:
        delta = delta + args.delta_bias[:, None]
    if args.softplus:
        delta = F.softplus(delta, threshold=20.0)
    return (args.A * delta.sum(2)[..., None]).exp()[:, None]


class Scan(Function):
    """(how, *ScanArguments of one path) -> y, and the last state of all if asked for."""

    @staticmethod
    def forward(ctx: Any, how: How, *given: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        args = ScanArguments(*given)
        y, last, (begins, chunks, decay) = _forward(how, args, with_chunks=True)
        ctx.how, ctx.softplus, ctx.blocks = how, args.softplus, len(begins)
        ctx.save_for_backward(*args[:-1], *begins, *chunks, decay)
        return (y, last) if how.with_last else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor | None = None) -> Any:  # type: ignore[override]
        saved, n = ctx.saved_tensors, ctx.blocks
        args = ScanArguments(*saved[:11], ctx.softplus)  # type: ignore[call-arg]
        kept = saved[11 : 11 + n], saved[11 + n : 11 + 2 * n], saved[-1]
        # Every rank has the last state of all, and its part of that state's gradient.
        end = None if dlast is None else ctx.how.ranks.all_reduce(dlast.float().contiguous())
        grads = Gradients.like(args)
        back = _pipelined_back if ctx.how.pipeline else _gathered_back
        back(ctx.how, args, kept, dense(dy), end, grads)
        return None, *grads.finished(args), None, None, None


class Gradients(NamedTuple):
    """As the arguments; dB and dC in float32."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    initial: Tensor

    @classmethod
    def like(cls, args: ScanArguments) -> Gradients:
        def wide(t: Tensor) -> Tensor:
            return torch.zeros(t.shape, dtype=torch.float32, device=t.device)

        def maybe(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

        batch, _, channels = args.u.shape
        return cls(
            new_tokens(args.u, args.u.shape), new_tokens(args.delta, args.delta.shape),
            torch.empty_like(args.A), wide(args.B), wide(args.C), maybe(args.D),
            None if args.z is None else new_tokens(args.z, args.z.shape), maybe(args.delta_bias),
            args.A.new_zeros(batch, 1, 1, channels, args.A.shape[2]),
        )  # fmt: skip

    def finished(self, args: ScanArguments) -> tuple[Tensor | None, ...]:
        initial = None if args.initial is None else self.initial
        B, C = self.B.to(args.B.dtype), self.C.to(args.C.dtype)
        return self.u, self.delta, self.A, B, C, self.D, self.z, self.bias, initial


def _back(
    block: Block,
    args: ScanArguments,
    chunks: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    to: Gradients,
) -> Tensor | None:
    """The gradients of a block of channels; returns that of the state it began from."""
    c = block.channels
    dB, dC = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (args.B, args.C))
    dbegin = None if args.initial is None else torch.empty_like(args.initial)
    dispatch.scan_backward_ops(OP, args.u, args.A.shape[-1]).selective_scan_backward.default(
        to.u[..., c], to.delta[..., c], to.A[:, c], dB, dC, None if to.D is None else to.D[:, c],
        None if to.z is None else to.z[..., c], None if to.bias is None else to.bias[:, c], dbegin,
        dy[..., c], dlast, chunks, *args,
    )  # fmt: skip
    for whole, part in ((to.B, dB), (to.C, dC)):
        if whole.dim() == 3:
            whole[:, c] = part
        else:
            whole[:, :, block.groups] += part
    return dbegin


def _pipelined_back(
    how: How, args: ScanArguments, saved: Saved, dy: Tensor, end: Tensor | None, to: Gradients
) -> None:
    ranks, (begins, chunks, _) = how.ranks, saved
    before, after = ranks.neighbours(how.reverse)
    blocks = _blocks(args, ranks.size)
    given: list[Tensor | None] = []
    sent = []
    for block in blocks:
        c = block.channels
        if after is None:
            given.append(None if end is None else end[..., c, :].contiguous())
        else:
            given.append(torch.empty_like(to.initial[..., c, :], memory_format=torch.contiguous_format))
    coming = Coming(ranks, after, given)
    for i, block in enumerate(blocks):
        coming.wait(i)
        dbegin = _back(block, _of(args, block, begins[i]), chunks[i], dy, given[i], to)
        if before is not None:
            assert dbegin is not None
            sent.append(ranks.start([(before, dbegin)], []))
        elif dbegin is not None:
            to.initial[..., block.channels, :] = dbegin
        coming.post()
    for each in sent:
        ranks.finish(each)


def _gathered_back(
    how: How, args: ScanArguments, saved: Saved, dy: Tensor, end: Tensor | None, to: Gradients
) -> None:
    ranks, (begins, chunks, decay) = how.ranks, saved
    before, after = ranks.neighbours(how.reverse)
    everything = Block(slice(0, args.u.shape[2]), slice(0, _groups(args)))
    args = args._replace(initial=torch.zeros_like(to.initial) if begins[0] is None else begins[0])
    own = _back(everything, args, chunks[0], dy, end if after is None else None, to)
    assert own is not None and decay is not None
    every = ranks.in_order(ranks.all_gather(torch.stack([decay, own])), how.reverse)
    if after is not None:
        # What the ranks behind make of this rank's last state.
        position = ranks.position(how.reverse)
        behind = every[-1][1]
        for P, g in reversed(every[position + 1 : -1]):
            behind = P * behind + g
        to.B.zero_()
        to.C.zero_()
        own = _back(everything, args, chunks[0], dy, behind.contiguous(), to)
    if before is None and begins[0] is not None:
        assert own is not None
        to.initial.copy_(own)
