"""What kernels walk, derived from the kept tiles: spans of neighbours, blocks of work, masks as words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.modes import real_tensors
from pydiffuse._core.structs import BLOCK, PlanTensors, Spans
from pydiffuse.plans.arguments import check_eager
from pydiffuse.plans.rows import FULL, Tiles, entries_of, ranges, row_starts


def plan_tensors(
    rows: Tiles, q_bounds: np.ndarray, k_bounds: np.ndarray, order: np.ndarray | None
) -> PlanTensors:
    """order: int32 [S] or None. On the CPU."""
    check_eager("TilePlan")
    head, tile_q, tile_k, masks, _ = entries_of(rows)
    heads = len(rows.starts)
    with real_tensors():
        words, mask_at = _words(rows.bits)
        by_q = _spans(heads, head, tile_q, tile_k, masks, q_bounds, k_bounds)
        by_k = _spans(heads, head, tile_k, tile_q, masks, k_bounds, q_bounds)
        places = None if order is None else torch.from_numpy(order.astype(np.int32))
        return PlanTensors(*by_q, *by_k, words, mask_at, places)


def _words(bits: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The masks as int32 words, bit j of a word the key 32 w + j; and where each begins."""
    packed, at, total = [], [], 0
    for mask in bits:
        wide = np.zeros((mask.shape[0], -(-mask.shape[1] // 32) * 32), bool)
        wide[:, : mask.shape[1]] = mask
        packed.append(np.packbits(wide, axis=1, bitorder="little").view("<i4").ravel())
        at.append(total)
        total += packed[-1].size
    words = np.concatenate(packed) if packed else np.zeros(1, np.int32)
    return torch.from_numpy(words.astype(np.int32)), torch.from_numpy(np.array(at, np.int64))


def _spans(
    heads: int,
    head: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    masks: np.ndarray,
    bounds: np.ndarray,
    other_bounds: np.ndarray,
) -> Spans:
    """The entries (head, own tile, other tile, mask) as spans over the other side. Those of a row come
    with the other tile ascending."""
    count = len(bounds) - 1
    row = head.astype(np.int64) * count + own
    if (row[1:] < row[:-1]).any():
        by_row = _ascending(row)
        row, other, masks = row[by_row], other[by_row], masks[by_row]
    # An entry goes on with the span before it if both are full and neighbours in one row.
    joins = (row[1:] == row[:-1]) & (other[1:] == other[:-1] + 1)
    joins &= (masks[1:] == FULL) & (masks[:-1] == FULL)
    first = np.concatenate([[True], ~joins])
    last = np.concatenate([~joins, [True]])
    spans = np.stack([other_bounds[other[first]], other_bounds[other[last] + 1], masks[first]], 1)
    per_row = np.bincount(row[first], minlength=heads * count)
    starts = row_starts(per_row.reshape(heads, count))
    seen = np.bincount(row[first], spans[:, 1] - spans[:, 0], heads * count).reshape(heads, count)
    return Spans(
        torch.from_numpy(bounds),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(spans.astype(np.int32)),
        torch.from_numpy(_blocks(bounds, seen)),
    )


def _ascending(keys: np.ndarray) -> np.ndarray:
    """Where the keys, 0 or more, are in ascending order, equal ones as they come. NumPy sorts 16 bits in
    linear time, and wider integers not."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max()).bit_length(), 16):
        order = order[np.argsort((keys >> shift).astype(np.uint16)[order], kind="stable")]
    return order


def _blocks(bounds: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[P, blocks, 3]: every tile cut into rows of at most BLOCK; by what they see, most first."""
    lengths = np.diff(bounds)
    within, tile = ranges(np.zeros(len(lengths), np.int64), -(-lengths // BLOCK))
    begin = bounds[tile] + within * BLOCK
    end = np.minimum(begin + BLOCK, bounds[tile + 1])
    blocks = np.stack([tile, begin, end], 1).astype(np.int32)
    work = seen[:, tile] * (end - begin)
    return np.ascontiguousarray(blocks[np.argsort(-work, axis=1, kind="stable")])
