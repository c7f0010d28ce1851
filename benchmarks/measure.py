"""Timing that can be trusted on a noisy machine.

Contenders take turns, call by call, so that a slow spell hits all of them alike; figures are medians,
comparisons are ratios of medians from one run. Every call takes the next set of buffers, so that with
sets beyond the last-level cache no contender finds what another has just read. Where a user's data
would be warm there is one set, or `prepare` rewrites, untimed, what a model would just have written.
Results are kept for one round of the sets, as a user keeps them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

COLD_BYTES = 192 << 20  # all buffer sets together: several times a last-level cache


@dataclass
class Contender:
    name: str
    call: Callable[[int], Any]
    """Takes the number of the buffer set."""
    check: Callable[[Any], float] | None = None
    """Relative error of its result for set 0; a contender above `bound` is not timed."""
    bound: float = 1e-4
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    prepare: Callable[[int], Any] | None = None
    """Run before each timed call, untimed."""
    capturable: bool = True
    """On a GPU: whether a CUDA graph can hold its calls, which then are what is timed."""
    kept: dict[int, Any] = field(default_factory=dict)

    def run(self, i: int) -> None:
        self.kept[i] = self.call(i)

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3 if self.seconds else float("nan")


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sets_for(bytes_per_set: int) -> int:
    return max(2, min(64, -(-COLD_BYTES // max(bytes_per_set, 1))))


def race(
    contenders: Sequence[Contender],
    sets: int,
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    least: int = 15,
) -> None:
    """Fill in each contender's error and times, in turns, for about `seconds` in all."""
    runners = []
    for c in contenders:
        result = c.call(0)
        if c.check is not None:
            c.error = c.check(result)
        if c.error is None or c.error <= c.bound:
            runners.append(c)
    for c in runners:  # warm-up
        for i in range(max(3, sets)):
            c.run(i % sets)
    sync(device)
    if device == "cuda":
        return _race_on_gpu(runners, sets, seconds, least)
    start, turn, used = time.perf_counter(), 0, 0
    inner = {c.name: _calls_per_sample(c, sets, device) for c in runners}
    while turn < least or time.perf_counter() - start < seconds:
        for c in runners:
            n = inner[c.name]
            if c.prepare is not None:
                c.prepare(used % sets)
            sync(device)
            begin = time.perf_counter()
            for j in range(n):
                c.run((used + j) % sets)
            sync(device)
            c.seconds.append((time.perf_counter() - begin) / n)
            used += n
        turn += 1
        if turn >= least and time.perf_counter() - start > 3 * seconds:
            break
    for c in contenders:
        c.kept.clear()


def _race_on_gpu(runners: Sequence[Contender], sets: int, seconds: float, least: int) -> None:
    from benchmarks.graphs import Timer

    seconds = min(seconds, 0.3)  # a GPU of one's own is quiet
    timers = [Timer(c, sets) for c in runners]
    start, turn = time.perf_counter(), 0
    while turn < least or time.perf_counter() - start < seconds:
        for timer in timers:
            timer.contender.seconds.append(timer.seconds(turn))
        turn += 1
        if turn >= least and time.perf_counter() - start > 3 * seconds:
            break
    for c in runners:
        c.kept.clear()


def _calls_per_sample(c: Contender, sets: int, device: str) -> int:
    """Enough calls for the clock: 200 microseconds a sample."""
    if c.prepare is not None:
        return 1
    begin = time.perf_counter()
    for i in range(3):
        c.call(i % sets)
    sync(device)
    once = (time.perf_counter() - begin) / 3
    return max(1, min(200, int(200e-6 / once)))


def copy_seconds(numel: int, dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """One torch copy of a tensor, read and written once: the bandwidth that floors are counted in."""
    sets = sets_for(2 * numel * dtype.itemsize)
    pairs = [
        (torch.randn(numel, device=device).to(dtype), torch.empty(numel, dtype=dtype, device=device))
        for _ in range(sets)
    ]
    c = Contender("copy", lambda i: pairs[i][1].copy_(pairs[i][0]))
    race([c], sets, device=device, seconds=seconds)
    return c.ms / 1e3
