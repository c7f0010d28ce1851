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


class Entries(NamedTuple):
    """The kept tiles one by one, in any order; each (head, tile_q, tile_k) at most once."""

    head: np.ndarray  # int [n]
    tile_q: np.ndarray  # int [n]
    tile_k: np.ndarray  # int [n]
    masks: np.ndarray  # int [n]: FULL, or an index of `bits`
    bits: tuple[np.ndarray, ...] = ()


def entries_of(rows: Tiles) -> Entries:
    heads, ends = rows.starts.shape
    row = np.repeat(np.arange(heads * (ends - 1)), np.diff(rows.starts).ravel())
    head, tile_q = np.divmod(row, ends - 1)
    return Entries(head, tile_q, rows.tiles, rows.masks, rows.bits)


def tiles_of(entries: Entries, heads: int, q_tiles: int) -> Tiles:
    """q_tiles: how many tiles of queries there are."""
    sequence = np.lexsort((entries.tile_k, entries.tile_q, entries.head))
    row = entries.head[sequence].astype(np.int64) * q_tiles + entries.tile_q[sequence]
    starts = row_starts(np.bincount(row, minlength=heads * q_tiles).reshape(heads, q_tiles))
    kept = entries.tile_k[sequence].astype(np.int32), entries.masks[sequence].astype(np.int32)
    return Tiles(starts, *kept, entries.bits)


def row_starts(per_row: np.ndarray) -> np.ndarray:
    """per_row: int [P, T] entries -> int64 [P, T + 1] where each row starts, and where the last one ends."""
    ends = np.cumsum(per_row, dtype=np.int64).reshape(per_row.shape)
    return np.concatenate([ends[:, :1] - per_row[:, :1], ends], 1)


def ranges(first: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """first[i], first[i] + 1, ..., number[i] of them, for all i in a row; and beside each the i it is of."""
    which = np.repeat(np.arange(len(number)), number)
    within = np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number)
    return first[which] + within, which


def transposed(rows: Tiles, k_tiles: int) -> Tiles:
    """Queries and keys swapped. k_tiles: how many tiles of keys there are."""
    head, tile_q, tile_k, masks, bits = entries_of(rows)
    swapped = Entries(head, tile_k, tile_q, masks, tuple(frozen(b.T) for b in bits))
    return tiles_of(swapped, len(rows.starts), k_tiles)


def frozen(mask: np.ndarray) -> np.ndarray:
    """A plan's own copy, which nobody writes to: masks come as views of what users have."""
    if mask.base is None and not mask.flags.writeable and mask.flags.c_contiguous:
        return mask
    own = np.array(mask, order="C")
    own.flags.writeable = False
    return own


def simplified(rows: Tiles) -> Tiles:
    """Masks of ones are full tiles, masks of zeros none, and equal masks one, numbered as they come up."""
    if not rows.bits:
        return Tiles(np.asarray(rows.starts), np.asarray(rows.tiles), np.asarray(rows.masks))
    distinct: dict[Any, int] = {}
    bits: list[np.ndarray] = []
    code = np.empty(len(rows.bits) + 1, np.int32)
    code[FULL] = FULL  # the last one, at which an index of -1 looks
    used, first = np.unique(rows.masks[rows.masks != FULL], return_index=True)
    for i in used[np.argsort(first)]:
        mask = rows.bits[i]
        if mask.all():
            code[i] = FULL
        elif not mask.any():
            code[i] = FULL - 1
        else:
            key = mask.shape, np.packbits(mask).tobytes()
            code[i] = distinct.setdefault(key, len(bits))
            if code[i] == len(bits):
                bits.append(frozen(mask))
    masks = code[rows.masks]
    stays = masks >= FULL
    kept_before = np.concatenate([[0], np.cumsum(stays)])
    return Tiles(kept_before[rows.starts], rows.tiles[stays], masks[stays], tuple(bits))


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
    pieces_q, pieces_k = np.diff(first_q)[entries.tile_q], np.diff(first_k)[entries.tile_k]
    within, which = ranges(np.zeros(len(pieces_q), np.int64), pieces_q * pieces_k)
    rows, columns = np.divmod(within, pieces_k[which])
    tile_q, tile_k = first_q[entries.tile_q][which] + rows, first_k[entries.tile_k][which] + columns
    masks = entries.masks[which].astype(np.int64)
    partial = np.flatnonzero(masks != FULL)
    if not len(partial):
        return Entries(entries.head[which], tile_q, tile_k, masks)
    # A piece of a mask is told by the mask and by where in its tile the piece begins and ends.
    q, k = tile_q[partial], tile_k[partial]
    from_q = old_q[entries.tile_q][which[partial]].astype(np.int64)
    from_k = old_k[entries.tile_k][which[partial]].astype(np.int64)
    edges = (new_q[q] - from_q, new_q[q + 1] - from_q, new_k[k] - from_k, new_k[k + 1] - from_k)
    cuts, piece = np.unique(np.stack([masks[partial], *edges], 1), axis=0, return_inverse=True)
    masks[partial] = piece.ravel()
    bits = tuple(entries.bits[m][q0:q1, k0:k1] for m, q0, q1, k0, k1 in cuts)
    return Entries(entries.head[which], tile_q, tile_k, masks, bits)


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
