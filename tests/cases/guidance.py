"""The cases of guidance: predictions of a common signal, in one shape, dtype and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # float32 coefficients times float32 predictions: a few roundings of 6e-8, times the guidance
    # scale where c and u nearly cancel.
    torch.float32: Tolerance(2e-6, 1e-5),
    # The output's rounding alone, 2^-9 relative in the mean: accumulation is in float32 and better.
    torch.bfloat16: Tolerance(4e-3, 8e-3),
    torch.float16: Tolerance(5e-4, 1e-3),
}

SHAPES = {
    "odd": (3, 4, 9, 7),  # no multiple of any vector
    "one": (2, 1),  # a single element per sample
    "empty": (0, 4, 8, 8),
    "hollow": (2, 0, 8),  # samples without elements
    "chunks": (2, 20011),  # several work items per sample, a ragged last one
}


@dataclass
class Maker(Draws):
    """Draws a case's tensors: predictions of a common signal, so that their cosines are those of
    real ones, in one shape, dtype and memory layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    layout: Callable[[Tensor], Tensor] = lambda t: t
    tensors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.signal = self._randn(*self.shape)

    def _keep(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t

    def pred(self, noise: float = 0.4, mean: float = 0.1) -> Tensor:
        t = self.signal + noise * self._randn(*self.shape) + mean
        return self._keep(self.layout(t.to(self.dtype).to(self.device)))

    def preds(self, k: int) -> list[Tensor]:
        return [self.pred() for _ in range(k)]

    def wide(self) -> Tensor:
        """A tensor that stays float32 beside low-precision predictions: a latent x, a history."""
        t = self._randn(*self.shape).to(torch.float32).to(self.device)
        return self._keep(self.layout(t))

    def per_sample(self, low: float = 0.5, high: float = 2.0) -> Tensor:
        t = torch.rand(self.shape[0], generator=self.generator, dtype=torch.float64)
        return self._keep((low + (high - low) * t).to(torch.float32).to(self.device))

    def table(self, columns: int) -> Tensor:
        return self._keep(self._randn(self.shape[0], columns).to(torch.float32).to(self.device))


def _two(op: str, reads: int, *extra: Any) -> list[Case]:
    """The cases of a rule over (cond, uncond, scale, ...)."""
    return [
        Case(op, "number", lambda t: ((t.pred(), t.pred(), 7.5, *extra), {}), reads),
        Case(
            op,
            "per_sample",
            lambda t: ((t.pred(), t.pred(), t.per_sample(1, 9), *extra), {"original": True}),
            reads,
        ),
        Case(op, "rescaled", lambda t: ((t.pred(), t.pred(), 4.0, *extra), {"rescale": 0.7}), 4),
        Case(
            op,
            "rescaled_per_sample",
            lambda t: ((t.pred(), t.pred(), 4, *extra), {"rescale": t.per_sample(0.1, 1.0)}),
            4,
        ),
    ]


CASES = [
    *_two("cfg", 2),
    *_two("tcfg", 4),
    Case("tcfg", "many", lambda t: ((t.preds(3), t.pred(), [3.0, 2.0, t.per_sample()]), {}), 8),
    *_two("cfg_zero", 4),
    *_two("apg", 4),
    Case(
        "apg",
        "cut",
        lambda t: (
            (t.pred(), t.pred(), 7.5),
            {"eta": 0.3, "norm_threshold": 1.5, "original": True},
        ),
        4,
    ),
    Case("apg", "first", lambda t: ((t.pred(), t.pred(), 7.5), {"momentum": -0.5}), 4, 2),
    Case(
        "apg",
        "momentum",
        lambda t: (
            (t.pred(), t.pred(), 7.5),
            {
                "eta": t.per_sample(),
                "norm_threshold": 2.5,
                "momentum": t.per_sample(-0.7, -0.2),
                "state": t.pred(),
                "rescale": 0.5,
            },
        ),
        6,
        2,
    ),
    *_two("magnitude_aware", 4),
    Case(
        "magnitude_aware",
        "alpha",
        lambda t: ((t.pred(), t.pred(), 7.5), {"alpha": t.per_sample(), "original": True}),
        4,
    ),
    Case("perp_neg", "one", lambda t: ((t.pred(), t.pred(), [t.pred()], 7.5, [0.6]), {}), 6),
    Case(
        "perp_neg",
        "two",
        lambda t: (
            (t.pred(), t.pred(), t.preds(2), t.per_sample(), t.table(2)),
            {"rescale": 0.3, "original": True},
        ),
        8,
    ),
    Case("perp_neg", "none", lambda t: ((t.pred(), t.pred(), [], 7.5, []), {}), 4),
    Case("compose", "and_not", lambda t: ((t.preds(2), t.pred(), [5.0, -2.0]), {}), 3),
    Case("compose", "rescaled", lambda t: ((t.preds(3), t.pred(), t.table(3)), {"rescale": 0.5}), 8),
    Case("slerp", "number", lambda t: ((t.pred(), t.pred(), 0.3), {}), 4),
    Case("slerp", "per_sample", lambda t: ((t.pred(), t.pred(), t.per_sample(-0.5, 1.5)), {}), 4),
    Case("rescale", "number", lambda t: ((t.pred(mean=1.0), t.pred(noise=3.0), 0.7), {}), 3),
    Case("rescale", "per_sample", lambda t: ((t.pred(), t.pred(), t.per_sample()), {}), 3),
    Case("gram", "two", lambda t: ((t.preds(2),), {"sums": True}), 2, 0),
    Case("gram", "one", lambda t: ((t.preds(1),), {}), 1, 0),
    Case("gram", "seven", lambda t: ((t.preds(7),), {"sums": True}), 7, 0),
    Case("combine", "two", lambda t: ((t.preds(2), t.table(2)), {}), 2),
    Case("combine", "nine", lambda t: ((t.preds(9), t.table(9)), {}), 9),
    Case(
        "superpose",
        "or",
        lambda t: ((t.preds(2), t.table(2), 0.1), {"temperature": 0.5, "bias": 0.1}),
        4,
    ),
    Case(
        "superpose",
        "or_guided",
        lambda t: (
            (t.preds(3), t.table(3), t.per_sample(0.05, 0.2)),
            {"noise": t.pred(), "uncond": t.pred(), "scale": 3.0},
        ),
        9,
    ),
    Case(
        "superpose",
        "and",
        lambda t: ((t.preds(2), t.table(2), 0.1), {"kind": "and", "noise": t.pred()}),
        5,
    ),
    Case("guide", "euler", lambda t: ((t.preds(2), "tcfg"), {"scale": 7.5, "x": t.wide(), "b": 0.02}), 5),
    Case(
        "guide",
        "ancestral",
        lambda t: (
            (t.preds(2), "cfg"),
            {"scale": 3.0, "x": t.wide(), "a": 0.9, "b": t.per_sample(), "noise": t.pred(), "s": 0.3},
        ),
        4,
    ),
    Case(
        "guide",
        "multistep",
        lambda t: (
            (t.preds(2), "cfg_zero"),
            {
                "scale": t.per_sample(),
                "rescale": 0.4,
                "x": t.wide(),
                "a": t.per_sample(),
                "b": -0.3,
                "history": t.wide(),
                "h": 0.2,
                "predict": (1.1, -0.6),
            },
        ),
        6,
        2,
    ),
    Case(
        "guide",
        "momentum",
        lambda t: (
            (t.preds(3), "apg"),
            {
                "scale": 4.0,
                "eta": 0.2,
                "norm_threshold": 3.0,
                "momentum": -0.3,
                "x": t.wide(),
                "predict": (t.per_sample(), 0.5),
            },
        ),
        7,
        3,
    ),
    Case(
        "guide",
        "linear",
        lambda t: ((t.preds(3), "linear"), {"weights": t.table(3), "rescale": 0.5, "x": t.wide()}),
        7,
    ),
    Case(
        "guide",
        "compose",
        lambda t: ((t.preds(3), "compose"), {"weights": [2.0, -1.0], "x": t.wide(), "b": 0.1}),
        4,
    ),
    Case(
        "guide",
        "perp_neg",
        lambda t: ((t.preds(3), "perp_neg"), {"scale": 5.0, "weights": [0.7], "x": t.wide()}),
        7,
    ),
    Case("guide", "slerp", lambda t: ((t.preds(2), "slerp"), {"weight": 0.4, "x": t.wide()}), 5),
    Case("guide", "rescale", lambda t: ((t.preds(2), "rescale"), {"rescale": 0.4, "x": t.wide()}), 4),
]
