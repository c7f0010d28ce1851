"""Times on a GPU: a contender's calls captured in CUDA graphs, so that what is timed is the device's work.

A user whose loop is captured, or long enough to keep the GPU busy, pays this; what a call costs Python
stands in rows of its own. A call that cannot be captured (it waits for the device) is timed by events
around the calls themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.measure import Contender

LEAST_SECONDS = 1e-3
"""Of one replay, where a call is shorter: events tick in half microseconds."""


class Timer:
    """One contender's graphs, or the calls themselves."""

    def __init__(self, contender: Contender, sets: int) -> None:
        self.contender = contender
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        once = self._elapsed(lambda: contender.run(0))
        if contender.prepare is not None:  # between any two calls something else runs
            self.rounds: list[Sequence[int]] = [[i] for i in range(sets)]
        else:
            calls = max(1, min(20 * sets, round(LEAST_SECONDS / max(once, 1e-6))))
            calls = -(-calls // sets) * sets
            self.rounds = [[i % sets for i in range(calls)]]
        self.graphs: list[Any] = []
        if not contender.capturable:
            return
        try:
            self.graphs = [self._captured(order) for order in self.rounds]
        except RuntimeError as error:
            warnings.warn(f"{contender.name}: timed call by call: {error}", stacklevel=2)
            self.graphs = []
            torch.cuda.synchronize()

    def _captured(self, order: Sequence[int]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.contender.run(order[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in order:
                self.contender.run(i)
        self.contender.kept.clear()
        return graph

    def _elapsed(self, work: Any) -> float:
        torch.cuda.synchronize()
        self.begin.record()
        work()
        self.end.record()
        torch.cuda.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3

    def seconds(self, turn: int) -> float:
        """Of one call, in the turn-th round."""
        which = turn % len(self.rounds)
        order = self.rounds[which]
        if self.contender.prepare is not None:
            self.contender.prepare(order[0])
        if self.graphs:
            return self._elapsed(self.graphs[which].replay) / len(order)

        def calls() -> None:
            for i in order:
                self.contender.run(i)

        return self._elapsed(calls) / len(order)
