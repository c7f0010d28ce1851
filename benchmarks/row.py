"""A row of the benchmark: what was measured, its floor, its rivals, the bars it must clear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import Contender


@dataclass
class Bar:
    what: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def held(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.value:.3g} {self.what} ({sign} {self.bound:g}{'' if self.held else ', MISSED'})"


@dataclass
class Row:
    op: str
    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ms: float | None = None
    error: float | None = None
    bytes: int | None = None
    floor_ms: float | None = None
    rivals: list[Contender] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    headline: bool = False
    """Whether the README shows it."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "headline": self.headline,
            "what": self.what,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "ms": self.ms,
            "error": self.error,
            "bytes": self.bytes,
            "gb_per_s": self.bytes / self.ms / 1e6 if self.bytes and self.ms else None,
            "floor_ms": self.floor_ms,
            "share_of_floor": self.floor_ms / self.ms if self.floor_ms and self.ms else None,
            "rivals": [
                {
                    "name": r.name,
                    "ms": r.ms,
                    "ratio": r.ms / self.ms if self.ms else None,
                    "error": r.error,
                }
                for r in self.rivals
            ],
            "bars": [
                {"what": b.what, "value": b.value, "bound": b.bound, "at_most": b.at_most, "held": b.held}
                for b in self.bars
            ],
        }
