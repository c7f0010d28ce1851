"""What the ranks of a group tell each other: counted in bytes, and with an error in place of a wait for ever.

Before the first exchange of a call, and once for the same facts (shapes, dtypes, whose gradient is due), every
rank lays what it was given into the group's store and reads what the others were given. That costs a set and
a read of a few hundred bytes over TCP, and nothing in later calls: facts that are alike on every rank are new
on every rank at the same call.
"""

from __future__ import annotations

import datetime
import json
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
"""A process group, a mesh of one dimension, or None for the world."""

_timeout = 600.0
_sent: Counter[str] | None = None
"""Of the process: a backward runs in threads of its own."""


class _State:
    """What is known of a group: how often its ranks compared facts, and those they agreed on."""

    def __init__(self) -> None:
        self.compared = 0
        self.agreed: set[tuple[str, str]] = set()


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, _State] = weakref.WeakKeyDictionary()


def set_timeout(seconds: float) -> None:
    """How long a call waits for the other ranks before it raises; 600 s by default. On GPUs the exchanges
    themselves follow the group's own timeout, the comparison of shapes before them this one."""
    global _timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e9:
        raise ValueError(f"set_timeout: seconds is {seconds!r}; accepted: a number > 0")
    _timeout = float(seconds)


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank hands over inside the `with` block, by op; those of the backward, too, if
    it runs inside. An all-reduce counts its tensor once and an all-gather this rank's part once, whatever
    the algorithm; an all-to-all what leaves the rank."""
    global _sent
    before, _sent = _sent, Counter()
    try:
        yield _sent
    finally:
        _sent = before


def _count(op: str, *tensors: Tensor) -> None:
    if _sent is not None:
        _sent[op] += sum(t.nbytes for t in tensors)


class Ranks:
    """The ranks of a group as one call of an op sees them. Tensors are on one device per rank."""

    def __init__(self, op: str, group: Group) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{op}: torch.distributed has no process group; call torch.distributed.init_process_group"
                " first, in processes started by torchrun"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"{op}: group is a mesh of {group.ndim} dimensions; accepted: one, such as mesh['name']"
                )
            group = group.get_group()
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{op}: group is {'none of this rank' if group is dist.GroupMember.NON_GROUP_MEMBER else group!r};"
                " accepted: a process group that this rank is in, a mesh of one dimension, or None"
            )
        self.op, self.group = op, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._state = _states.setdefault(group, _State())

    # Ranks in the order of what is split; from the last one on where it runs in reverse.

    def position(self, reverse: bool) -> int:
        return self.size - 1 - self.rank if reverse else self.rank

    def end(self, reverse: bool) -> int:
        """The rank of the last part."""
        return 0 if reverse else self.size - 1

    def neighbours(self, reverse: bool) -> tuple[int | None, int | None]:
        """The rank before this one and the one after it; None at the ends."""
        step = -1 if reverse else 1
        before, after = self.rank - step, self.rank + step
        return before if 0 <= before < self.size else None, after if 0 <= after < self.size else None

    def in_order(self, every: list[Tensor], reverse: bool) -> list[Tensor]:
        return every[::-1] if reverse else every

    # Facts.

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Tells the others of an error in this rank's arguments, so that they raise, too."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if self.size > 1:
                self._tell({"refused": str(error)})
            raise

    def agree(self, **facts: Any) -> None:
        """Raises on every rank unless all of them call this op with equal facts."""
        if self.size == 1:
            return
        mine = {name: _words(value) for name, value in facts.items()}
        key = self.op, json.dumps(mine)
        if key in self._state.agreed:
            return
        every = self._compare({"op": self.op, **mine})
        for rank, theirs in enumerate(every):
            if "refused" in theirs:
                raise RuntimeError(f"{self.op}: rank {rank} refused its arguments: {theirs['refused']}")
        for rank, theirs in enumerate(every):
            if theirs.get("op") != self.op:
                raise RuntimeError(
                    f"{self.op}: rank {rank} calls {theirs.get('op')}; accepted: the same op on every rank"
                )
            for name, value in mine.items():
                if theirs.get(name) != value:
                    raise RuntimeError(
                        f"{self.op}: {name} is {value} on rank {self.rank} and {theirs.get(name)} on rank {rank};"
                        " accepted: the same on every rank"
                    )
        self._state.agreed.add(key)

    def _store(self) -> dist.Store:
        return dist.PrefixStore("pydiffuse", distributed_c10d._get_process_group_store(self.group))

    def _tell(self, facts: dict[str, str]) -> int:
        number = self._state.compared
        self._state.compared += 1
        self._store().set(f"{number}/{self.rank}", json.dumps(facts))
        return number

    def _compare(self, mine: dict[str, str]) -> list[dict[str, str]]:
        number, store = self._tell(mine), self._store()
        keys = [f"{number}/{rank}" for rank in range(self.size)]
        try:
            store.wait(keys, datetime.timedelta(seconds=_timeout))
        except RuntimeError as error:
            raise self._late("the comparison of arguments", keys) from error
        return [json.loads(store.get(key)) for key in keys]

    def _late(self, what: str, keys: Sequence[str]) -> RuntimeError:
        store = self._store()
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        who = f"rank {', '.join(missing)} did not come" if missing else "every rank came"
        return RuntimeError(f"{self.op}: {what} of {self.size} ranks: {who} within {_timeout:g} s")

    # Exchanges.

    def _wait(self, works: Sequence[Any], what: str) -> None:
        try:
            for work in works:
                # A wait with a timeout blocks the host, which a GPU's queue must not do.
                if dist.get_backend(self.group) == "gloo":
                    work.wait(datetime.timedelta(seconds=_timeout))
                else:
                    work.wait()
        except RuntimeError as error:
            store = self._store()
            keys = [f"late/{self._state.compared}/{rank}" for rank in range(self.size)]
            store.set(keys[self.rank], "")
            time.sleep(min(1.0, _timeout))  # for others to say that they wait, too
            raise self._late(what, keys) from error

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1 and t.numel():
            _count(self.op, t)
            self._wait([dist.all_reduce(t, group=self.group, async_op=True)], "an all-reduce")
        return t

    def all_gather(self, t: Tensor) -> list[Tensor]:
        """This tensor of every rank, alike in shape."""
        if self.size == 1:
            return [t]
        t = t.contiguous()
        every = [torch.empty_like(t) for _ in range(self.size)]
        _count(self.op, t)
        self._wait([dist.all_gather(every, t, group=self.group, async_op=True)], "an all-gather")
        return every

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Part r goes to rank r; what rank r sends here has shapes[r]."""
        if self.size == 1:
            return [parts[0].contiguous()]
        flat = torch.cat([p.reshape(-1) for p in parts])
        sizes = [torch.Size(s).numel() for s in shapes]
        out = flat.new_empty(sum(sizes))
        _count(self.op, *(p for r, p in enumerate(parts) if r != self.rank))
        work = dist.all_to_all_single(
            out, flat, sizes, [p.numel() for p in parts], group=self.group, async_op=True
        )
        self._wait([work], "an all-to-all")
        return [piece.view(*shape) for piece, shape in zip(out.split(sizes), shapes, strict=True)]

    def start(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> tuple[list[Any], list[Tensor]]:
        """Sends tensors to ranks and receives into tensors from ranks; `finish` waits. Empty ones are no
        message."""
        sends = [(rank, t.contiguous()) for rank, t in sends if t.numel()]
        _count(self.op, *(t for _, t in sends))
        ops = [
            dist.P2POp(do, _bytes(t), group=self.group, group_peer=rank)
            for do, given in ((dist.isend, sends), (dist.irecv, receives))
            for rank, t in given
            if t.numel()
        ]
        # The tensors stay alive until they have left.
        return (dist.batch_isend_irecv(ops) if ops else []), [t for _, t in sends]

    def finish(self, started: tuple[list[Any], list[Tensor]]) -> None:
        self._wait(started[0], "a transfer")

    def broadcast(self, t: Tensor, source: int) -> Tensor:
        """t of a rank, in place."""
        if self.size > 1 and t.numel():
            if self.rank == source:
                _count(self.op, t)
            work = dist.broadcast(t, group=self.group, group_src=source, async_op=True)
            self._wait([work], "a broadcast")
        return t

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        self.finish(self.start(sends, receives))


def _bytes(t: Tensor) -> Tensor:
    """Gloo sends some dtypes only; bytes are bytes."""
    return t.view(torch.uint8) if t.device.type == "cpu" else t


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return str(value)


class AllReduce(Function):
    """(ranks, t) -> the sum of t over the ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, t: Tensor) -> Tensor:  # type: ignore[override]
        ctx.ranks = ranks
        return ranks.all_reduce(t.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, AllReduce.apply(ctx.ranks, grad.contiguous())


class Exchange(Function):
    """(ranks, shapes, *parts): an all-to-all, part r to rank r; what rank r sent here, of shapes[r]."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: Any, *parts: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.ranks, ctx.shapes = ranks, [p.shape for p in parts]
        return tuple(ranks.all_to_all(parts, shapes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return None, None, *Exchange.apply(ctx.ranks, ctx.shapes, *grads)


def sum_gradients(parameters: Iterable[Tensor], group: Group = None) -> None:
    """Adds up the gradients of parameters that every rank holds over the group, in place: one all-reduce for
    each dtype, in float32 or wider. A parameter without a gradient on this rank counts as zeros."""
    ranks = Ranks("sum_gradients", group)
    given = [p for p in parameters if p.requires_grad]
    for p in given:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for dtype in dict.fromkeys(p.dtype for p in given):
        grads = [p.grad for p in given if p.dtype is dtype and p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]).to(torch.promote_types(dtype, torch.float32))
        total = ranks.all_reduce(flat)
        for g, t in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(t.view_as(g))
