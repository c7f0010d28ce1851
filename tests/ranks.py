"""Processes that are the ranks of one gloo group, started once for all tests: `run(ranks, function, ...)`."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pydiffuse import distributed

MOST = 4
TIMEOUT = 60.0
"""Seconds for one function on all ranks."""

spare: dict[int, list[Any]] = {}
"""Groups of each size for what leaves a group unusable."""


def _serve(rank: int, path: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    distributed.set_timeout(20)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, MOST)}
    for size in (2, MOST):
        spare[size] = [dist.new_group(list(range(size))) for _ in range(2)]
    while True:
        job = pipe.recv()
        if job is None:
            return
        size, function, args = job
        torch.manual_seed(0)
        try:
            result = (True, function(groups[size], *args) if rank < size else None)
        except Exception:
            result = (False, traceback.format_exc())
        pipe.send(result)


class Processes:
    """The ranks; started when they are needed, and anew after an error, which may leave some of them waiting."""

    def __init__(self) -> None:
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.cases.ranks"])  # imported once for all ranks
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        path = os.path.join(tempfile.mkdtemp(prefix="pydiffuse-ranks-"), "store")
        for rank in range(MOST):
            mine, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(rank, path, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(group, *args) on the first `ranks` processes: what each returns. Fails where one raises."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((ranks, function, args))
        results: dict[int, Any] = {}
        errors: list[str] = []
        end = time.monotonic() + TIMEOUT
        while len(results) < MOST and time.monotonic() < end:
            for rank, pipe in enumerate(self.pipes):
                if rank not in results and pipe.poll(0.01):
                    good, results[rank] = pipe.recv()
                    if not good:
                        errors.append(f"rank {rank}: {results[rank]}")
                        end = min(end, time.monotonic() + 3)  # others may wait for it
        if len(results) < MOST:
            for process in self.processes:  # where they are goes to stderr
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            waiting = [rank for rank in range(MOST) if rank not in results]
            errors.append(f"ranks {waiting} did not answer")
        if errors:
            self.stop()
            pytest.fail("\n".join(errors))
        return [results[rank] for rank in range(ranks)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []
