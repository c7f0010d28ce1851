"""States of many sequences in one tensor, of which a batch names its own: continuous batching."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse._core.checks import check_shape


def check_indices(op: str, argument: str, indices: Tensor, batch: int, like: Tensor) -> None:
    check_shape(op, argument, indices, (batch,), "(B,)", like=like, dtypes=(torch.int32, torch.int64))


def load(states: Tensor, indices: Tensor) -> Tensor:
    """A copy of states[i] for each i of `indices`; of some state where i < 0, which is padding."""
    return states[indices.long().clamp(min=0)]


def store(states: Tensor, indices: Tensor, new: Tensor) -> None:
    """states[i] = new, where i >= 0. Nothing looks at the indices on the host: padding writes again what a row
    that counts writes, or states[0] over itself where none counts."""
    if not len(indices):
        return
    counts = indices >= 0
    row = torch.where(counts, torch.arange(len(indices), device=indices.device), counts.int().argmax())
    values = torch.where(counts.any(), new[row].to(states.dtype), states[:1])
    states.index_copy_(0, indices.long().clamp(min=0)[row], values)


def without_padding(y: Tensor, indices: Tensor) -> Tensor:
    """y [B, ...] with zeros where the index is padding."""
    return y.masked_fill((indices < 0).view(-1, *[1] * (y.dim() - 1)), 0)
