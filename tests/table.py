"""A row of the table of ops and cases that tests and benchmarks share: nobody types a case twice.

The rows stand in tests/cases, a file per stem. A row builds its arguments from its family's maker,
which draws tensors of one shape and dtype; `bytes_moved` counts what a perfect kernel reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on ||out - ref|| / ||ref||, of values and of gradients."""

    value: float
    grad: float


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    """Maker -> (args, kwargs) of pydiffuse.<op>."""
    reads: int = 0
    """How often a tensor of N elements is read from memory, both passes counted."""
    writes: int = 1

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def bytes_moved(self, numel: int, itemsize: int) -> int:
        return (self.reads + self.writes) * numel * itemsize


class Draws:
    """A maker's generator: float64 draws that depend on its seed alone, whatever dtype and device follow."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)
