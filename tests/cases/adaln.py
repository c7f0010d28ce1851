"""The cases of adaptive layer norm: tokens [..., D], tables of a few rows, a row for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # A mean and a variance of D float32 numbers, a handful of roundings of 6e-8 on top; gradients of
    # the table add up as many tokens as there are.
    torch.float32: Tolerance(1e-6, 4e-6),
    # The output's rounding alone, 2^-9 relative in the mean: accumulation is in float32 and better.
    torch.bfloat16: Tolerance(4e-3, 6e-3),
    torch.float16: Tolerance(5e-4, 8e-4),
}

SHAPES = {
    "odd": (2, 3, 9, 67),  # no multiple of any vector
    "one": (3, 1),  # one feature: its norm is 0
    "vector": (5, 64),  # whole vectors only
    "empty": (0, 5, 16),
    "hollow": (2, 3, 0),  # tokens without features
}


@dataclass
class Maker(Draws):
    """Draws a case's tensors for tokens of one shape, dtype and memory layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def tokens(self, mean: float = 0.3) -> Tensor:
        t = self._randn(*self.shape) + mean
        return self.layout(t.to(self.dtype).to(self.device))

    def table(self, K: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (0.5 * self._randn(K, columns, self.shape[-1])).to(dtype).to(self.device)

    def features(self, mean: float = 0.0) -> Tensor:
        return (mean + 0.3 * self._randn(self.shape[-1])).float().to(self.device)

    def rows(self, K: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A row for each token; the last of the table is nobody's."""
        top = max(K - 1, 1)
        return torch.randint(0, top, self.shape[:-1], generator=self.generator).to(dtype).to(self.device)

    def row_per_sample(self) -> Tensor:
        B = self.shape[0]
        return torch.arange(B, device=self.device).reshape(-1, *[1] * (len(self.shape) - 2))

    def times(self) -> Tensor:
        t = torch.randint(0, 4, self.shape[:-1], generator=self.generator)
        return (t / 7).to(self.device)


CASES = [
    Case("modulate", "layer", lambda t: ((t.tokens(), t.table(4, 2), t.rows(4)), {}), 1),
    Case(
        "modulate",
        "rms_affine",
        lambda t: (
            (t.tokens(), t.table(5, 2), t.rows(5, torch.int32)),
            {"norm": "rms", "weight": t.features(1), "bias": t.features(), "eps": 1e-5},
        ),
        1,
    ),
    Case(
        "modulate",
        "layer_weight_row_per_sample",
        lambda t: (
            (t.tokens(3.0), t.table(max(t.shape[0], 1), 2), t.row_per_sample()),
            {"weight": t.features(1), "eps": 1e-3},
        ),
        1,
    ),
    Case(
        "modulate",
        "none_narrow_table",
        lambda t: ((t.tokens(), t.table(1, 2, t.dtype), t.rows(1)), {"norm": None}),
        1,
    ),
    Case(
        "gate_residual_modulate",
        "layer",
        lambda t: ((t.tokens(), t.tokens(), t.table(4, 3), t.rows(4)), {"eps": 1e-4}),
        2,
        2,
    ),
    Case(
        "gate_residual_modulate",
        "rms_affine",
        lambda t: (
            (t.tokens(), t.tokens(), t.table(3, 3, t.dtype), t.rows(3)),
            {"norm": "rms", "weight": t.features(1), "bias": t.features(), "eps": 1e-4},
        ),
        2,
        2,
    ),
    Case(
        "gate_residual_modulate",
        "none",
        lambda t: ((t.tokens(), t.tokens(), t.table(2, 3), t.rows(2)), {"norm": None}),
        2,
        2,
    ),
    Case("embed_t", "bounded", lambda t: ((t.times(), 12), {"scale": 1000.0, "max_distinct": 5}), 0),
    Case("embed_t", "odd", lambda t: ((t.times(), 7), {"max_period": 100.0}), 0),
]
