"""Sliding tile attention: windows of whole tiles over images and videos."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from pydiffuse.plans.arguments import check_eager, check_tiles, check_tokens, count, counts
from pydiffuse.plans.plan import TilePlan, form, make_plan
from pydiffuse.plans.rows import FULL, Tiles, row_starts

OP = "sliding_tile"


@form
def sliding_tile(
    grid: Sequence[int], tile: Sequence[int], window: Sequence[int], *, text: int = 0
) -> TilePlan:
    """Sliding Tile Attention (arXiv 2502.04507): a tile of queries sees the tiles of keys in a window.

    grid: tokens along each axis, (T, H, W), (H, W) or (L,); q, k and v have them in raster order. tile: the
    tokens of a tile along each axis; where it does not divide the grid, the last tiles are smaller. window:
    tokens along each axis, a multiple of the tile, or the axis and more for all of it. It is centred on the
    query's tile (an even number of tiles reaches one further back than forward) and moved inwards at the
    borders, so that every tile sees the same number of tiles. text: so many tokens after the grid see and
    are seen by all.

    The plan has an order: tile by tile in raster order, and so the tokens within each.
    """
    check_eager(OP)
    sizes = counts(OP, "grid", grid, 1, (1, 2, 3))
    axes = (len(sizes),)
    tiles, windows = counts(OP, "tile", tile, 1, axes), counts(OP, "window", window, 1, axes)
    text = count(OP, "text", text, 0)
    check_tokens(OP, math.prod(sizes) + text)
    for extent, side, reach in zip(sizes, tiles, windows, strict=True):
        if reach % side and reach < extent:
            raise ValueError(
                f"{OP}: window is {windows}; accepted: along each axis a multiple of the tile, here {tiles},"
                f" or at least the grid, {sizes}"
            )
    tiles = tuple(min(t, n) for t, n in zip(tiles, sizes, strict=True))
    windows = tuple(min(w, n) for w, n in zip(windows, sizes, strict=True))
    return _sliding_tile(sizes, tiles, windows, text)


@functools.lru_cache(maxsize=256)
def _sliding_tile(
    grid: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...], text: int
) -> TilePlan:
    number = tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))
    width = tuple(-(-w // t) for w, t in zip(window, tile, strict=True))
    check_tiles(OP, math.prod(number) * math.prod(width), "larger tiles or smaller windows keep fewer")
    own = np.indices(number).reshape(len(grid), -1)  # [axes, tiles]
    steps = np.indices(width).reshape(len(grid), -1)  # [axes, tiles in a window]
    seen = []
    for at, step, n, w in zip(own, steps, number, width, strict=True):
        seen.append(np.clip(at - w // 2, 0, n - w)[:, None] + step)
    tiles = np.ravel_multi_index(tuple(seen), number)  # [tiles, tiles in a window], ascending
    lengths = np.ones(1, np.int64)
    for n, t in zip(grid, tile, strict=True):
        lengths = np.outer(lengths, [min(t, n - at) for at in range(0, n, t)]).ravel()
    rows = tiles.reshape(-1)
    per_row = np.full(len(tiles), tiles.shape[1])
    if text:
        every = np.full((len(tiles), 1), len(tiles))
        rows = np.concatenate([np.hstack([tiles, every]).reshape(-1), np.arange(len(tiles) + 1)])
        per_row = np.append(per_row + 1, len(tiles) + 1)
        lengths = np.append(lengths, text)
    kept = Tiles(row_starts(per_row[None]), rows.astype(np.int32), np.full(len(rows), FULL, np.int32))
    parameters = [("grid", grid), ("tile", tile), ("window", window), ("text", text)]
    return make_plan(OP, parameters, lengths, lengths, kept, _order(grid, tile, number, text))


def _order(
    grid: tuple[int, ...], tile: tuple[int, ...], number: tuple[int, ...], text: int
) -> np.ndarray | None:
    """int64 [S]: the tokens tile by tile; None where that is raster order."""
    of_token = np.zeros(1, np.int32)  # the tile of each token
    for n, t, many in zip(grid, tile, number, strict=True):
        along = np.arange(n, dtype=np.int32) // t
        of_token = (of_token[:, None] * many + along).ravel()
    if (np.diff(of_token) >= 0).all():
        return None
    order = np.argsort(of_token, kind="stable")
    return np.concatenate([order, len(order) + np.arange(text)])
