"""Attention masks that a plan can hold: which keys of a sample count, as texts of several lengths have them."""

from __future__ import annotations

import functools
import weakref

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.checks import describe
from pydiffuse.plans import TilePlan
from pydiffuse.plans.combine import without_keys


def kept_keys(op: str, mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """bool [1 or B, Sk] on the CPU from a mask as scaled_dot_product_attention takes it, or [B, Sk]; None
    where all count. ValueError where it depends on the query or the head, or adds a bias."""
    counts = mask if mask.dtype is torch.bool else mask == 0
    fits = mask.dtype is torch.bool
    if mask.is_floating_point():
        fits = bool((counts | (mask <= torch.finfo(mask.dtype).min)).all())
    if fits and counts.all():
        return None
    wide = counts[:, None, None] if counts.shape == (batch, keys) else counts
    wide = wide.reshape((1,) * (4 - wide.dim()) + wide.shape)
    row = wide[:, :1, :1]
    if not fits or wide.dim() != 4 or wide.shape[3] != keys or not (wide == row).all():
        raise ValueError(
            f"{op}: attn_mask is {describe(mask)}, which leaves out pairs of a query and a key; accepted: one"
            " that leaves out keys of a sample, [B, 1, 1, keys], or nothing; the rest is the plan's to say"
        )
    return row[:, 0, 0].cpu()


class Masks:
    """The plans of samples under a mask; layers of a model get the same mask one after the other."""

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[Tensor], int, Tensor | None] | None = None

    def plans(
        self, op: str, plan: TilePlan, mask: Tensor | None, batch: int
    ) -> TilePlan | list[TilePlan]:
        """One plan for all samples, or one for each."""
        keys = None if mask is None else self._keys(op, mask, batch, plan.k_length)
        if keys is None:
            return plan
        each = [_masked(plan, row.numpy().tobytes()) for row in keys.expand(batch, -1)]
        return each[0] if len(set(each)) == 1 else each

    def _keys(self, op: str, mask: Tensor, batch: int, keys: int) -> Tensor | None:
        if mask.is_inference():
            return kept_keys(op, mask, batch, keys)
        last = self.last
        if last is None or last[0]() is not mask or last[1] != mask._version:
            last = self.last = weakref.ref(mask), mask._version, kept_keys(op, mask, batch, keys)
        return last[2]


@functools.lru_cache(maxsize=256)
def _masked(plan: TilePlan, keys: bytes) -> TilePlan:
    kept = np.frombuffer(keys, bool)
    return plan if kept.all() else without_keys(plan, kept)
