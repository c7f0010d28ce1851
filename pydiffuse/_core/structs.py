"""Arguments that travel together from the public functions to the kernels; the kernels' limits, too."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pydiffuse._core.limits import BLOCK as BLOCK
from pydiffuse._core.limits import CHUNK as CHUNK
from pydiffuse._core.limits import MAX_HEAD_DIM as MAX_HEAD_DIM
from pydiffuse._core.limits import MAX_STATES as MAX_STATES
from pydiffuse._core.limits import MAX_WIDTH as MAX_WIDTH
from pydiffuse._core.spans import PlanTensors as PlanTensors
from pydiffuse._core.spans import Spans as Spans


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
