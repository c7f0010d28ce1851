"""The cases of token routing: tokens [B, N, D...] and which of them take the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # Copies are exact; a gate is two roundings of 6e-8, a linear layer a sum of products.
    torch.float32: Tolerance(2e-6, 4e-6),
    torch.bfloat16: Tolerance(8e-3, 1e-2),  # a linear layer's output, gradient and bias are rounded
    torch.float16: Tolerance(1e-3, 2e-3),
}

SHAPES = {
    "odd": (3, 11, 37),  # no multiple of any vector
    "one": (2, 1, 1),
    "deep": (2, 6, 3, 5),  # tokens of several dimensions
    "lines": (2, 8, 64),  # whole cache lines
    "empty": (0, 4, 8),
    "hollow": (2, 5, 0),  # tokens without features
}


@dataclass
class Maker(Draws):
    """Draws a case's tensors for tokens of one shape, dtype and memory layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = (self.shape[1] + 1) // 2

    def tokens(self) -> Tensor:
        return self.layout(self._randn(*self.shape).to(self.dtype).to(self.device))

    def routed(self) -> Tensor:
        t = self._randn(self.shape[0], self.keep, *self.shape[2:])
        return self.layout(t.to(self.dtype).to(self.device))

    def ids(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """Unique, in no order."""
        keys = torch.rand(self.shape[:2], generator=self.generator)
        return keys.argsort(1)[:, : self.keep].to(dtype).to(self.device)

    def gate(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def modality(self, M: int) -> Tensor:
        return torch.randint(0, M, self.shape[:2], generator=self.generator).to(self.device)

    def weights(self, *shape: int) -> Tensor:
        return (0.3 * self._randn(*shape)).to(self.dtype).to(self.device)


CASES = [
    Case("gather_tokens", "half", lambda t: ((t.tokens(), t.ids()), {}), 1),
    Case("gather_tokens", "int32", lambda t: ((t.tokens(), t.ids(torch.int32)), {}), 1),
    Case("scatter_tokens", "half", lambda t: ((t.tokens(), t.routed(), t.ids()), {}), 1),
    Case("scatter_tokens", "number", lambda t: ((t.tokens(), t.routed(), t.ids(), 0.25), {}), 2),
    Case(
        "scatter_tokens",
        "gate",
        lambda t: ((t.tokens(), t.routed(), t.ids(), t.gate(t.shape[0], t.keep)), {}),
        2,
    ),
    Case(
        "scatter_tokens",
        "gate_per_sample",
        lambda t: ((t.tokens(), t.routed(), t.ids(), t.gate(t.shape[0], 1)), {}),
        2,
    ),
    Case(
        "routed_linear",
        "plain",
        lambda t: ((t.tokens(), t.weights(3, 5, t.shape[-1]), t.modality(3)), {}),
        1,
    ),
    Case(
        "routed_linear",
        "bias_unused_modality",
        lambda t: (
            (t.tokens(), t.weights(4, 6, t.shape[-1]), t.modality(3), t.weights(4, 6)),
            {},
        ),
        1,
    ),
    Case("route", "fraction", lambda t: ((t.shape[0], t.shape[1], 0.5), {}), 0),
    Case("channel_mask", "levels", lambda t: ((t.gate(4), 10), {"alpha": 2.0}), 0),
]
