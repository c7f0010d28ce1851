"""What kernels walk, derived from the runs of kept tiles: spans, blocks of work, masks as words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pydiffuse._core.limits import BLOCK
from pydiffuse._core.modes import real_tensors
from pydiffuse._core.spans import PlanTensors, Spans
from pydiffuse.plans.arguments import check_eager
from pydiffuse.plans.rows import Runs, ranges, row_of, transposed


def plan_arrays(
    runs: Runs, q_bounds: np.ndarray, k_bounds: np.ndarray, order: np.ndarray | None
) -> PlanTensors:
    """order: int32 [S] or None."""
    words, mask_at = _words(runs.bits)
    by_q = _spans(runs, q_bounds, k_bounds)
    by_k = _spans(transposed(runs, len(k_bounds) - 1), k_bounds, q_bounds)
    places = None if order is None else np.ascontiguousarray(order, np.int32)
    return PlanTensors(*by_q, *by_k, words, mask_at, places)


def plan_tensors(arrays: PlanTensors) -> PlanTensors:
    """On the CPU, of the arrays' memory."""
    check_eager("TilePlan")
    import torch

    with real_tensors():
        return PlanTensors(*(None if a is None else torch.from_numpy(a) for a in arrays))  # type: ignore[arg-type]


def _words(bits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The masks as int32 words, bit j of a word the key 32 w + j; and where each begins."""
    packed, at, total = [], [], 0
    for mask in bits:
        wide = np.zeros((mask.shape[0], -(-mask.shape[1] // 32) * 32), bool)
        wide[:, : mask.shape[1]] = mask
        packed.append(np.packbits(wide, axis=1, bitorder="little").view("<i4").ravel())
        at.append(total)
        total += packed[-1].size
    words = np.concatenate(packed) if packed else np.zeros(1, np.int32)
    return words.astype(np.int32), np.array(at, np.int64)


def _spans(runs: Runs, bounds: np.ndarray, other_bounds: np.ndarray) -> Spans:
    heads, count = len(runs.starts), len(bounds) - 1
    spans = np.stack([other_bounds[runs.begin], other_bounds[runs.end], runs.masks], 1)
    # Lengths add up as float64: exact below 2^53.
    head, tile = row_of(runs.starts)
    seen = np.bincount(head * count + tile, spans[:, 1] - spans[:, 0], heads * count)
    return Spans(
        bounds,
        runs.starts.astype(np.int32),
        spans.astype(np.int32),
        _blocks(bounds, seen.reshape(heads, count)),
    )


def _blocks(bounds: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[P, blocks, 3]: every tile cut into rows of at most BLOCK; by what they see, most first."""
    lengths = np.diff(bounds)
    within, tile = ranges(np.zeros(len(lengths), np.int64), -(-lengths // BLOCK))
    begin = bounds[tile] + within * BLOCK
    end = np.minimum(begin + BLOCK, bounds[tile + 1])
    blocks = np.stack([tile, begin, end], 1).astype(np.int32)
    work = seen[:, tile] * (end - begin)
    return np.ascontiguousarray(blocks[np.argsort(-work, axis=1, kind="stable")])
