"""Kept tiles as NumPy arrays: compressed rows, lists of entries, and what is done with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FULL = -1
"""In the place of a mask: every element is kept."""


class Tiles(NamedTuple):
    """The kept tiles as compressed rows, NumPy arrays."""

    starts: np.ndarray  # int64 [P, Tq + 1]: row (p, t) is entries starts[p, t] .. starts[p, t + 1]
    tiles: np.ndarray  # int32 [n]: tiles of keys, ascending in each row
    masks: np.ndarray  # int32 [n]: FULL, or an index of `bits`
    bits: tuple[np.ndarray, ...] = ()  # masks: bool [queries of the tile, keys of the tile]


class Runs(NamedTuple):
    """The same in proportion to what changes along a row: neighbours that are kept whole are one run."""

    starts: np.ndarray  # int64 [P, Tq + 1]: row (p, t) is runs starts[p, t] .. starts[p, t + 1]
    begin: np.ndarray  # int32 [n]: a run is tiles of keys begin .. end, ascending in each row
    end: np.ndarray  # int32 [n]
    masks: np.ndarray  # int32 [n]: FULL, or an index of `bits`; a run with a mask is one tile
    bits: tuple[np.ndarray, ...] = ()


class Entries(NamedTuple):
    """Runs one by one, in any order; a tile is in one of them at most."""

    head: np.ndarray  # int [n]
    tile_q: np.ndarray  # int [n]
    begin: np.ndarray  # int [n]
    end: np.ndarray  # int [n]
    masks: np.ndarray  # int [n]: FULL, or an index of `bits`
    bits: tuple[np.ndarray, ...] = ()


def runs_of(rows: Tiles) -> Runs:
    """Each tile a run; `simplified` joins them."""
    tiles = np.asarray(rows.tiles)
    return Runs(np.asarray(rows.starts), tiles, tiles + 1, np.asarray(rows.masks), rows.bits)


def tiles_in(runs: Runs) -> Tiles:
    """Tile by tile."""
    number = (runs.end - runs.begin).astype(np.int64)
    tiles, which = ranges(runs.begin, number)
    before = np.concatenate([[0], np.cumsum(number)])
    return Tiles(before[runs.starts], tiles.astype(np.int32), runs.masks[which], runs.bits)


def row_of(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head and the tile of queries of everything in compressed rows."""
    heads, ends = starts.shape
    row = np.repeat(np.arange(heads * (ends - 1)), np.diff(starts).ravel())
    return np.divmod(row, ends - 1)


def entries_of(runs: Runs) -> Entries:
    starts, begin, end, masks, bits = runs
    return Entries(*row_of(starts), begin, end, masks, bits)


def sorted_runs(entries: Entries, heads: int, q_tiles: int) -> Runs:
    """q_tiles: how many tiles of queries there are."""
    row = entries.head.astype(np.int64) * q_tiles + entries.tile_q
    sequence = np.lexsort((entries.begin, row))
    starts = row_starts(np.bincount(row, minlength=heads * q_tiles).reshape(heads, q_tiles))
    begin, end, masks = (a[sequence] for a in (entries.begin, entries.end, entries.masks))
    return Runs(starts, begin, end, masks, entries.bits)


def overlaps(
    row: np.ndarray, begin: np.ndarray, end: np.ndarray, least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, begin and end of where `least` or more of the runs lie over each other, ascending."""
    width = int(end.max(initial=0)) + 1
    at = np.concatenate([row, row]).astype(np.int64) * width + np.concatenate([begin, end])
    sequence = ascending(at)
    at, depth = at[sequence], np.cumsum(np.repeat([1, -1], len(row))[sequence])
    last = np.append(at[1:] != at[:-1], True)[: len(at)]
    at, depth = at[last], depth[last]
    some = np.flatnonzero(depth >= least)
    found, first = np.divmod(at[some], width)
    return found, first, at[some + 1] % width


def row_starts(per_row: np.ndarray) -> np.ndarray:
    """per_row: int [P, T] entries -> int64 [P, T + 1] where each row starts, and where the last one ends."""
    ends = np.cumsum(per_row, dtype=np.int64).reshape(per_row.shape)
    return np.concatenate([ends[:, :1] - per_row[:, :1], ends], 1)


def ranges(first: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first[i], first[i] + 1, ..., number[i] of them, for all i in a row; and beside each the i it is of."""
    which = np.repeat(np.arange(len(number)), number)
    within = np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number)
    return first[which] + within, which


def transposed(runs: Runs, k_tiles: int) -> Runs:
    """Queries and keys swapped. k_tiles: how many tiles of keys there are."""
    bits = tuple(frozen(b.T) for b in runs.bits)
    tiles = int((runs.end - runs.begin).sum(dtype=np.int64))
    few = tiles <= 4 * len(runs.begin)
    row, begin, end, masks = (_swapped_tiles if few else _swapped_runs)(runs, k_tiles)
    heads = len(runs.starts)
    starts = row_starts(np.bincount(row, minlength=heads * k_tiles).reshape(heads, k_tiles))
    return _joined(Runs(starts, begin, end, masks, bits))


Swapped = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of every run the row (head k_tiles + tile of keys), begin and end in tiles of queries, mask: ascending."""


def _swapped_tiles(runs: Runs, k_tiles: int) -> Swapped:
    rows = tiles_in(runs)
    head, tile_q = row_of(rows.starts)
    row = head * k_tiles + rows.tiles
    sequence = ascending(row)
    tile_q = tile_q.astype(np.int32)[sequence]
    return row[sequence], tile_q, tile_q + np.int32(1), rows.masks[sequence]


def _swapped_runs(runs: Runs, k_tiles: int) -> Swapped:
    """From one row to the next some tiles of keys begin to be seen and some end, as many of both as there
    are runs in the result. Tiles within runs that stay are not looked at."""
    q_tiles = runs.starts.shape[1] - 1
    head, tile_q = row_of(runs.starts)
    whole = runs.masks == FULL
    row = head[whole] * (q_tiles + 1) + tile_q[whole]  # a row of nothing comes after each head's last
    begin, end = runs.begin[whole], runs.end[whole]
    # How the row differs from the one before it, +1 or -1, as steps along the keys.
    at = np.concatenate([row, row, row + 1, row + 1]) * (k_tiles + 1)
    at += np.concatenate([begin, end, begin, end])
    step = np.repeat(np.array([1, -1, -1, 1]), len(row))
    sequence = ascending(at)
    at, differs = at[sequence], np.cumsum(step[sequence])
    number = np.diff(at, append=at[-1:])
    sides = []
    for sign in (1, -1):
        some = np.flatnonzero((differs == sign) & (number > 0))
        line, first = np.divmod(at[some], k_tiles + 1)
        tile_k, which = ranges(first, number[some])
        side_head, side_q = np.divmod(line[which], q_tiles + 1)
        row = side_head * k_tiles + tile_k
        sequence = ascending(row)
        sides.append((row[sequence], side_q[sequence].astype(np.int32)))
    (row, first), (_, last) = sides
    masks = np.full(len(row), FULL, np.int32)
    part = np.flatnonzero(~whole)
    if len(part):
        row = np.concatenate([row, head[part] * k_tiles + runs.begin[part]])
        own = tile_q[part].astype(np.int32)
        first, last = np.concatenate([first, own]), np.concatenate([last, own + np.int32(1)])
        masks = np.concatenate([masks, runs.masks[part]])
        sequence = ascending(row * q_tiles + first)
        row, first, last, masks = (a[sequence] for a in (row, first, last, masks))
    return row, first, last, masks


def ascending(keys: np.ndarray) -> np.ndarray:
    """Where the keys, 0 or more, are in ascending order, equal ones as they come. NumPy sorts 16 bits in
    linear time, and wider integers not."""
    if (keys[1:] >= keys[:-1]).all():
        return np.arange(len(keys))
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max()).bit_length(), 16):
        order = order[np.argsort((keys >> shift).astype(np.uint16)[order], kind="stable")]
    return order


def frozen(mask: np.ndarray) -> np.ndarray:
    """A plan's own copy, which nobody writes to: masks come as views of what users have."""
    if mask.base is None and not mask.flags.writeable and mask.flags.c_contiguous:
        return mask
    own = np.array(mask, order="C")
    own.flags.writeable = False
    return own


def simplified(runs: Runs) -> Runs:
    """Masks of ones are full tiles, masks of zeros none, equal masks one, numbered as they come up, and full
    neighbours one run."""
    masks, bits = _distinct(runs.masks, runs.bits)
    stays = (masks >= FULL) & (runs.end > runs.begin)
    starts = np.concatenate([[0], np.cumsum(stays, dtype=np.int64)])[runs.starts]
    begin, end, masks = (a[stays].astype(np.int32) for a in (runs.begin, runs.end, masks))
    return _joined(Runs(starts, begin, end, masks, bits))


def _joined(runs: Runs) -> Runs:
    """Full neighbours as one run."""
    starts, begin, end, masks, bits = runs
    whole = masks == FULL
    joins = (begin[1:] == end[:-1]) & whole[1:] & whole[:-1]
    edges = starts[(starts > 0) & (starts < len(masks))]  # a row's first joins none before it
    joins[edges - 1] = False
    first, last = np.ones((2, len(masks)), bool)
    first[1:], last[:-1] = ~joins, ~joins
    starts = np.concatenate([[0], np.cumsum(first, dtype=np.int64)])[starts]
    return Runs(starts, begin[first], end[last], masks[first], bits)


def _distinct(
    masks: np.ndarray, given: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Masks of ones as FULL, masks of zeros as FULL - 1, and equal ones as one."""
    if not given:
        return masks, ()
    distinct: dict[Any, int] = {}
    bits: list[np.ndarray] = []
    code = np.empty(len(given) + 1, np.int32)
    code[FULL] = FULL  # the last one, at which an index of -1 looks
    used, first = np.unique(masks[masks != FULL], return_index=True)
    for i in used[np.argsort(first)]:
        mask = given[i]
        if mask.all():
            code[i] = FULL
        elif not mask.any():
            code[i] = FULL - 1
        else:
            key = mask.shape, np.packbits(mask).tobytes()
            code[i] = distinct.setdefault(key, len(bits))
            if code[i] == len(bits):
                bits.append(frozen(mask))
    return code[masks], tuple(bits)


def recut(
    entries: Entries,
    old: tuple[np.ndarray, np.ndarray],
    new: tuple[np.ndarray, np.ndarray],
) -> Entries:
    """The same elements over finer tiles. old, new: boundaries of query and of key tiles; new ones hold
    the old ones."""
    (old_q, old_k), (new_q, new_k) = old, new
    if len(old_q) == len(new_q) and len(old_k) == len(new_k):
        return entries
    first_q, first_k = np.searchsorted(new_q, old_q), np.searchsorted(new_k, old_k)
    head, own, begin, end, masks, _ = entries
    tile_q, which = ranges(first_q[own], np.diff(first_q)[own])
    begin, end, masks = first_k[begin[which]], first_k[end[which]], masks[which].astype(np.int64)
    if (masks == FULL).all():
        return Entries(head[which], tile_q, begin, end, masks)
    # Whole runs stay runs; tiles with masks come apart.
    number = np.where(masks == FULL, 1, end - begin)
    first, part = ranges(begin, number)
    whole = masks[part] == FULL
    tile_q, masks, which = tile_q[part], masks[part], which[part]
    end = np.where(whole, end[part], first + 1)
    # A piece of a mask is told by the mask and by where in its tile the piece begins and ends.
    some = np.flatnonzero(~whole)
    q, k = tile_q[some], first[some]
    from_q = old_q[own][which[some]].astype(np.int64)
    from_k = old_k[entries.begin][which[some]].astype(np.int64)
    edges = (new_q[q] - from_q, new_q[q + 1] - from_q, new_k[k] - from_k, new_k[k + 1] - from_k)
    cuts, piece = np.unique(np.stack([masks[some], *edges], 1), axis=0, return_inverse=True)
    masks[some] = piece.ravel()
    bits = tuple(entries.bits[m][q0:q1, k0:k1] for m, q0, q1, k0, k1 in cuts)
    return Entries(head[which], tile_q, first, end, masks, bits)


def digest(*arrays: np.ndarray) -> str:
    """What tells plans from given masks apart."""
    h = hashlib.blake2b(digest_size=16)
    for a in arrays:
        h.update(f"{a.dtype.str}{a.shape}".encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def digest_of(
    rows: Tiles, q_bounds: np.ndarray, k_bounds: np.ndarray, order: np.ndarray | None = None
) -> str:
    """rows: simplified."""
    given: Sequence[np.ndarray] = [rows.starts, rows.tiles, rows.masks]
    wide = [a.astype("<i8") for a in (q_bounds, k_bounds, *given, *(() if order is None else (order,)))]
    return digest(*wide, *(np.packbits(b) for b in rows.bits))
