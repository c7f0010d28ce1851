"""What kernels walk of a plan of tile attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Values = Any
"""A tensor, or an array of NumPy."""


class Spans(NamedTuple):
    """One side's tiles and what they see of the other side."""

    bounds: Values  # int32 [T + 1]: tile t is rows bounds[t] .. bounds[t + 1]
    starts: Values  # int32 [P, T + 1]: tile t of head p sees spans starts[p, t] .. starts[p, t + 1]
    spans: Values  # int32 [n, 3]: begin and end along the other side, ascending; a mask, or FULL
    blocks: Values  # int32 [P, blocks, 3]: tile, first row, end; what sees most comes first


class PlanTensors(NamedTuple):
    """A plan as the ops take it: tensors, or arrays of NumPy. P is 1, or a plan for each head."""

    bounds: Values
    starts: Values
    spans: Values
    blocks: Values
    k_bounds: Values
    k_starts: Values
    k_spans: Values
    k_blocks: Values
    words: Values  # int32: the masks' bits; a row of queries is cdiv(keys of the tile, 32) words
    mask_at: Values  # int64 [masks]: a mask's first word
    order: Values | None  # int32 [S]: position p is token order[p]


def packed(plan: PlanTensors) -> np.ndarray:
    """Arrays as one int32 array: 12 sizes, then the arrays (csrc/cpu/attention_plan.h)."""
    sides = (plan[0:4], plan[4:8])
    head = [plan.starts.shape[0], len(plan.mask_at), len(plan.words)]
    head += [0 if plan.order is None else len(plan.order)]
    for bounds, _, spans, blocks in sides:  # type: ignore[misc]
        head += [len(bounds) - 1, len(spans), blocks.shape[1]]
    parts = [plan.mask_at, *sides[0], *sides[1], plan.words, plan.order]
    flat = [np.ascontiguousarray(p).view(np.int32).ravel() for p in parts if p is not None]
    return np.concatenate([np.array([*head, 0, 0], np.int32), *flat])
