"""Processes that are the ranks of one gloo group, started once for all tests: `run(ranks, function, ...)`."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4
TIMEOUT = 120.0
"""Seconds for one function on all ranks."""

spare: dict[int, list[Any]] = {}
"""Groups of each size for what leaves a group unusable."""


def _serve(rank: int, path: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, MOST)}
    for size in (2, MOST):
        spare[size] = [dist.new_group(list(range(size))) for _ in range(2)]
    while True:
        job = pipe.recv()
        if job is None:
            return
        size, function, args = job
        try:
            result = (True, function(groups[size], *args) if rank < size else None)
        except Exception:
            result = (False, traceback.format_exc())
        pipe.send(result)


class Processes:
    def __init__(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.cases.ranks"])  # imported once for all ranks
        self.path = os.path.join(tempfile.mkdtemp(prefix="pydiffuse-ranks-"), "store")
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.path, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(group, *args) on the first `ranks` processes: what each returns. Fails where one raises."""
        for pipe in self.pipes:
            pipe.send((ranks, function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.stop()
                pytest.fail(f"rank {rank} did not answer within {TIMEOUT:g} s")
            good, result = pipe.recv()
            if not good:
                errors.append(f"rank {rank}: {result}")
            elif rank < ranks:
                results.append(result)
        assert not errors, "\n".join(errors)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
