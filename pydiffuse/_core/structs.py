"""Arguments that travel together from the public functions to the kernels; the kernels' limits, too."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.limits import BLOCK as BLOCK
from pydiffuse._core.limits import CHUNK as CHUNK
from pydiffuse._core.limits import MAX_HEAD_DIM as MAX_HEAD_DIM
from pydiffuse._core.limits import MAX_STATES as MAX_STATES
from pydiffuse._core.limits import MAX_WIDTH as MAX_WIDTH


@lru_cache(maxsize=1024)
def numbers(*values: float) -> Tensor:
    """The numbers of a direct call as a float64 tensor, the same one for the same numbers: to torch's
    dispatcher a tensor costs a fraction of what its numbers do."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class ScanArguments(NamedTuple):
    """The tensors of a scan as the ops take them. K paths, S sequences, G groups, N states."""

    u: Tensor  # [B, L, D]
    delta: Tensor  # [B, K, L, D]
    A: Tensor  # [K, D, N]
    B: Tensor  # [B, K, G, L, N] or [K, D, N]
    C: Tensor
    D: Tensor | None  # [K, D]
    z: Tensor | None  # [B, L, D]
    delta_bias: Tensor | None  # [K, D]
    initial: Tensor | None  # [B, S, K, D, N]
    order: Tensor | None  # [K, L]
    offsets: Tensor | None  # [S + 1]
    softplus: bool


class Spans(NamedTuple):
    """One side's tiles and what they see of the other side."""

    bounds: Tensor  # int32 [T + 1]: tile t is rows bounds[t] .. bounds[t + 1]
    starts: Tensor  # int32 [P, T + 1]: tile t of head p sees spans starts[p, t] .. starts[p, t + 1]
    spans: Tensor  # int32 [n, 3]: begin and end along the other side, ascending; a mask, or FULL
    blocks: Tensor  # int32 [P, blocks, 3]: tile, first row, end; what sees most comes first


class PlanTensors(NamedTuple):
    """A plan as the ops take it. P is 1, or a plan for each head."""

    bounds: Tensor
    starts: Tensor
    spans: Tensor
    blocks: Tensor
    k_bounds: Tensor
    k_starts: Tensor
    k_spans: Tensor
    k_blocks: Tensor
    words: Tensor  # int32: the masks' bits; a row of queries is cdiv(keys of the tile, 32) words
    mask_at: Tensor  # int64 [masks]: a mask's first word
    order: Tensor | None  # int32 [S]: position p is token order[p]

    def packed(self) -> Tensor:
        """All of it as one int32 tensor on the CPU: 12 sizes, then the arrays (csrc/torch/attention.cpp)."""

        def flat(t: Tensor | None) -> np.ndarray:
            return np.zeros(0, np.int32) if t is None else t.detach().cpu().numpy().view(np.int32).ravel()

        sides = (self[0:4], self[4:8])
        head = [self.starts.shape[0], len(self.mask_at), len(self.words)]
        head += [0 if self.order is None else len(self.order)]
        for bounds, _, spans, blocks in sides:  # type: ignore[misc]
            head += [len(bounds) - 1, len(spans), blocks.shape[1]]
        arrays = [self.mask_at, *sides[0], *sides[1], self.words, self.order]
        return torch.from_numpy(np.concatenate([np.array([*head, 0, 0], np.int32), *map(flat, arrays)]))
