"""Plans from masks that someone has already."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pydiffuse.checks import describe
from pydiffuse.plans.plan import TilePlan, Tiles, digest, make_plan


def from_mask(
    mask: Tensor | np.ndarray,
    q_tiles: int | list[int] = 128,
    k_tiles: int | list[int] | None = None,
) -> TilePlan:
    """The tiles in which a mask keeps anything; where it keeps some elements only, with those elements.

    mask: bool [queries, keys], or [H, queries, keys] for a plan per head. q_tiles, k_tiles: a tile's
    length, the last one may be shorter, or the length of every tile; k_tiles is q_tiles by default.
    """
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.dtype != bool or array.ndim not in (2, 3) or 0 in array.shape:
        given = describe(mask) if isinstance(mask, Tensor) else f"{array.dtype} {array.shape}"
        raise ValueError(
            f"from_mask: mask is {given}; accepted: bool [queries, keys] or [H, queries, keys]"
        )
    array = array.reshape(-1, *array.shape[-2:])
    q_lengths = tile_lengths("from_mask", "q_tiles", q_tiles, array.shape[1])
    k_lengths = tile_lengths(
        "from_mask", "k_tiles", q_tiles if k_tiles is None else k_tiles, array.shape[2]
    )
    q_bounds, k_bounds = (np.concatenate([[0], np.cumsum(n)]) for n in (q_lengths, k_lengths))
    some = np.add.reduceat(
        np.add.reduceat(array, q_bounds[:-1], 1, dtype=np.int64), k_bounds[:-1], 2, dtype=np.int64
    )
    ends = (some > 0).sum(2).ravel().cumsum().reshape(some.shape[:2])
    starts = np.concatenate([[0], ends[:-1, -1]])[:, None]
    head, tq, tk = np.nonzero(some)
    bits = tuple(
        array[p, q_bounds[i] : q_bounds[i + 1], k_bounds[j] : k_bounds[j + 1]]
        for p, i, j in zip(head, tq, tk, strict=True)
    )
    rows = Tiles(np.concatenate([starts, ends], 1), tk.astype(np.int32), np.arange(len(tk)), bits)
    parameters: list[tuple[str, Any]] = [("digest", digest(array, q_bounds, k_bounds))]
    return make_plan("from_mask", parameters, q_lengths, k_lengths, rows)


def tile_lengths(op: str, argument: str, tiles: int | list[int], total: int) -> list[int]:
    if isinstance(tiles, int) and not isinstance(tiles, bool) and tiles > 0:
        return [min(tiles, total - at) for at in range(0, total, tiles)]
    given = list(tiles) if isinstance(tiles, list | tuple) else None
    if given is None or sum(given) != total or min(given) < 1:
        raise ValueError(
            f"{op}: {argument} is {tiles!r}; accepted: a length, or lengths >= 1 that add up to {total}"
        )
    return given
