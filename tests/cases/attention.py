"""The cases of tile attention: plans of every kind, and queries, keys and values for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pydiffuse import plans
from pydiffuse.plans import TilePlan
from pydiffuse.plans.plan import make_plan
from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # Sums of a few hundred float32 products, their exponentials to an ulp or two.
    torch.float32: Tolerance(2e-6, 4e-6),
    # The output's rounding, 2^-9 relative in the mean, and the rounding of probabilities, and in the
    # backward of their gradients, to what matrix units multiply.
    torch.bfloat16: Tolerance(6e-3, 1.2e-2),
    torch.float16: Tolerance(1e-3, 2e-3),
}


class Size(NamedTuple):
    B: int
    H: int
    Hk: int
    D: int


@functools.cache
def ragged(heads: int) -> TilePlan:
    """47 queries, 71 keys in uneven tiles, full, partial and missing ones; query 5 sees no key."""
    generator = torch.Generator().manual_seed(heads)
    mask = torch.rand(heads, 47, 71, generator=generator) < 0.2
    mask[:, 10:29, :40] = True
    mask[:, :10, 40:] = False
    mask[:, 5] = False
    return plans.from_mask(mask, [10, 19, 1, 17], [40, 17, 14])


@functools.cache
def ordered() -> TilePlan:
    """Tiles of positions that are a permutation of 39 tokens, a few of them masked."""
    order = np.random.default_rng(0).permutation(39)
    rows = plans.from_mask(torch.rand(39, 39, generator=torch.Generator().manual_seed(1)) < 0.7, 13).rows
    return make_plan("ordered", (), [13] * 3, [13] * 3, rows, order)


@dataclass
class Maker(Draws):
    size: Size
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def randn(self, *shape: int) -> Tensor:
        return self._randn(*shape).to(self.dtype).to(self.device)

    def call(self, plan: TilePlan, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        B, H, Hk, D = self.size
        q = self.randn(B, H, plan.q_length, D)
        k, v = (self.randn(B, Hk, plan.k_length, D) for _ in range(2))
        return (*map(self.layout, (q, k, v)), plan), options

    def scales(self) -> Tensor:
        """One for each head."""
        return 0.1 + 0.4 * torch.rand(self.size.H, generator=self.generator).to(self.device)


OP = "tile_attention"
CASES = [
    Case(OP, "frames", lambda t: t.call(plans.frames(3, 13, 1))),
    Case(OP, "text", lambda t: t.call(plans.frames(4, 9, 1, text=5), return_lse=True)),
    Case(OP, "ragged", lambda t: t.call(ragged(1), return_lse=True)),
    Case(OP, "per_head", lambda t: t.call(ragged(t.size.H), scale=t.scales())),
    Case(OP, "ordered", lambda t: t.call(ordered(), scale=0.2, return_lse=True)),
    Case(OP, "blocks", lambda t: t.call(plans.frames(2, 131, 1))),
]
"""`blocks` has tiles of more than one block of work."""
