"""The plan of a tile attention: which tiles of keys every tile of queries sees.

Queries and keys are cut into tiles with boundaries of any length (frames, sentences, cubes of a video).
A row of tiles keeps some tiles of keys: whole (full), or the elements that a mask of bits keeps. Heads
share one row of tiles or have their own. Where a plan has an `order`, tiles are of positions and position
p holds token order[p]; the kernels address tokens through it, nothing is gathered.

What kernels walk is derived here once: full neighbours are one span of keys, long tiles are blocks of at
most BLOCK rows, heavy ones first; and the same from the keys' side, for the backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""Rows of a block of work at most: queries in the forward, queries or keys in the backward."""
FULL = -1
"""In the place of a mask: every element is kept."""


class Spans(NamedTuple):
    """One side's tiles and what they see of the other side."""

    bounds: Tensor  # int32 [T + 1]: tile t is rows bounds[t] .. bounds[t + 1]
    starts: Tensor  # int32 [P, T + 1]: tile t of head p sees spans starts[p, t] .. starts[p, t + 1]
    spans: Tensor  # int32 [n, 3]: begin and end along the other side, ascending; a mask, or FULL
    blocks: Tensor  # int32 [P, blocks, 3]: tile, first row, end; what sees most comes first


class PlanTensors(NamedTuple):
    """A plan as the ops take it. P is 1, or a plan for each head."""

    bounds: Tensor
    starts: Tensor
    spans: Tensor
    blocks: Tensor
    k_bounds: Tensor
    k_starts: Tensor
    k_spans: Tensor
    k_blocks: Tensor
    words: Tensor  # int32: the masks' bits; a row of queries is cdiv(keys of the tile, 32) words
    mask_at: Tensor  # int64 [masks]: a mask's first word
    order: Tensor | None  # int32 [S]: position p is token order[p]


class Tiles(NamedTuple):
    """The kept tiles as compressed rows, NumPy arrays."""

    starts: np.ndarray  # int64 [P, Tq + 1]: row (p, t) is entries starts[p, t] .. starts[p, t + 1]
    tiles: np.ndarray  # int32 [n]: tiles of keys, ascending in each row
    masks: np.ndarray  # int32 [n]: FULL, or an index of `bits`
    bits: tuple[np.ndarray, ...] = ()  # masks: bool [queries of the tile, keys of the tile]


@dataclass(frozen=True, repr=False)
class TilePlan:
    """Which query tiles see which key tiles. Equal and hashed by name and parameters.

    The constructors stand in `pydiffuse.plans`. The arrays belong to every user of the plan: read them,
    do not write to them.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...]
    """What beside the name tells plans apart, as (keyword, value) pairs."""
    q_bounds: np.ndarray = field(compare=False)
    """int32 [Tq + 1]: the boundaries of the query tiles."""
    k_bounds: np.ndarray = field(compare=False)
    rows: Tiles = field(compare=False)
    tensors: PlanTensors = field(compare=False)
    """What the kernels walk, on one device."""
    _kin: dict[torch.device, TilePlan] = field(default_factory=dict, compare=False)
    """This plan on every device it was asked for."""

    def __post_init__(self) -> None:
        self._kin[self.device] = self

    @property
    def device(self) -> torch.device:
        return self.tensors.spans.device

    @property
    def q_length(self) -> int:
        return int(self.q_bounds[-1])

    @property
    def k_length(self) -> int:
        return int(self.k_bounds[-1])

    @property
    def heads(self) -> int:
        """1 where all heads share the plan, else the number of heads it is for."""
        return self.rows.starts.shape[0]

    @property
    def order(self) -> Tensor | None:
        """int32 [S]: position p of the tiles holds token order[p]; None where they are the same."""
        return self.tensors.order

    def to(self, device: torch.device | str | int) -> TilePlan:
        """The same plan with its tensors on `device`: copied once, then the same object again."""
        device = torch.device(device)
        if device.index is None and device.type != "cpu":
            device = torch.empty(0, device=device).device
        found = self._kin.get(device)
        if found is None:
            moved = (None if t is None else t.to(device) for t in self.tensors)
            tensors = PlanTensors(*moved)  # type: ignore[arg-type]
            found = TilePlan(
                self.name, self.parameters, self.q_bounds, self.k_bounds, self.rows, tensors, self._kin
            )
        return found

    @property
    def kept(self) -> np.ndarray:
        """int64 [P]: the elements that each head computes."""
        starts, tiles, masks, bits = self.rows
        row = np.repeat(np.arange(starts[:, :-1].size), np.diff(starts).ravel())
        tile_q = row % (len(self.q_bounds) - 1)
        counts = np.diff(self.q_bounds)[tile_q].astype(np.int64) * np.diff(self.k_bounds)[tiles]
        if bits:
            ones = np.array([b.sum() for b in bits], np.int64)
            counts = np.where(masks == FULL, counts, ones[masks])
        head = row // (len(self.q_bounds) - 1)
        return np.bincount(head, counts, self.heads).astype(np.int64)

    @property
    def density(self) -> float:
        """The share of query-key pairs that are computed, the mean over heads."""
        return float(self.kept.mean()) / (self.q_length * self.k_length)

    def to_dense(self) -> Tensor:
        """bool [P, queries, keys], over tokens: True where a query sees a key. Grows with the square of
        the length; for tests and pictures."""
        dense = np.zeros((self.heads, self.q_length, self.k_length), bool)
        starts, tiles, masks, bits = self.rows
        for p in range(self.heads):
            for t, (q0, q1) in enumerate(zip(self.q_bounds, self.q_bounds[1:], strict=False)):
                for i in range(starts[p, t], starts[p, t + 1]):
                    k0, k1 = self.k_bounds[tiles[i] : tiles[i] + 2]
                    dense[p, q0:q1, k0:k1] = True if masks[i] == FULL else bits[masks[i]]
        if self.order is not None:
            place = np.empty(self.q_length, np.int64)
            place[self.order.cpu().numpy()] = np.arange(self.q_length)
            dense = dense[:, place][:, :, place]
        return torch.from_numpy(dense)

    def __repr__(self) -> str:
        given = "".join(f", {k}={v!r}" for k, v in self.parameters)
        heads = f", {self.heads} heads" if self.heads > 1 else ""
        return f"TilePlan({self.name!r}{given}, {self.q_length} x {self.k_length}{heads})"


def make_plan(
    name: str,
    parameters: Sequence[tuple[str, Any]],
    q_lengths: Sequence[int] | np.ndarray,
    k_lengths: Sequence[int] | np.ndarray,
    rows: Tiles,
    order: np.ndarray | None = None,
) -> TilePlan:
    """A plan from its tiles' lengths (each 1 or more) and its rows of kept tiles.

    Every constructor ends here. Masks that keep all are made full and masks that keep nothing are left
    out; a plan that keeps nothing at all is refused.
    """
    q_bounds, k_bounds = _bounds(name, q_lengths), _bounds(name, k_lengths)
    rows = _simplified(rows)
    if not len(rows.tiles):
        raise ValueError(
            f"{name}: the plan is empty, no query would see a key; accepted: one kept tile or more"
        )
    words, mask_at = _words(rows.bits)
    row = np.repeat(np.arange(rows.starts[:, :-1].size), np.diff(rows.starts).ravel())
    head, tile_q = np.divmod(row, len(q_bounds) - 1)
    heads = len(rows.starts)
    by_q = _spans(heads, head, tile_q, rows.tiles, rows.masks, q_bounds, k_bounds)
    by_k = _spans(heads, head, rows.tiles, tile_q, rows.masks, k_bounds, q_bounds)
    tensors = PlanTensors(
        *by_q, *by_k, words, mask_at, None if order is None else torch.from_numpy(order.astype(np.int32))
    )
    return TilePlan(name, tuple(parameters), q_bounds, k_bounds, rows, tensors)


def digest(*arrays: np.ndarray) -> str:
    """What tells plans from given masks apart."""
    h = hashlib.blake2b(digest_size=16)
    for a in arrays:
        h.update(repr(a.shape).encode())
        h.update(np.ascontiguousarray(a).tobytes())
    return h.hexdigest()


def _bounds(name: str, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    sizes = np.asarray(lengths, np.int64)
    if sizes.ndim != 1 or not len(sizes) or (sizes < 1).any():
        raise ValueError(f"{name}: tiles have lengths {sizes.tolist()}; accepted: one or more, each >= 1")
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    if bounds[-1] >= 2**31:
        raise ValueError(f"{name}: {bounds[-1]} tokens; accepted: below 2^31")
    return bounds.astype(np.int32)


def _simplified(rows: Tiles) -> Tiles:
    """Masks of ones are full tiles, masks of zeros none, and equal masks one."""
    if not rows.bits:
        return Tiles(np.asarray(rows.starts), np.asarray(rows.tiles), np.asarray(rows.masks))
    distinct: dict[Any, int] = {}
    bits: list[np.ndarray] = []
    code = np.empty(len(rows.bits) + 1, np.int32)
    code[FULL] = FULL  # the last one, at which an index of -1 looks
    for i, mask in enumerate(rows.bits):
        if mask.all():
            code[i] = FULL
        elif not mask.any():
            code[i] = FULL - 1
        else:
            key = mask.shape, np.packbits(mask).tobytes()
            code[i] = distinct.setdefault(key, len(bits))
            if code[i] == len(bits):
                bits.append(mask)
    masks = code[rows.masks]
    stays = masks >= FULL
    kept_before = np.concatenate([[0], np.cumsum(stays)])
    return Tiles(kept_before[rows.starts], rows.tiles[stays], masks[stays], tuple(bits))


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
    return torch.from_numpy(words.astype(np.int32)), torch.tensor(at, dtype=torch.int64)


def _spans(
    heads: int,
    head: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    masks: np.ndarray,
    bounds: np.ndarray,
    other_bounds: np.ndarray,
) -> Spans:
    """The entries (head, own tile, other tile, mask) as spans over the other side."""
    count = len(bounds) - 1
    row = head.astype(np.int64) * count + own
    by_row = np.lexsort((other, row))
    row, other, masks = row[by_row], other[by_row], masks[by_row]
    # An entry goes on with the span before it if both are full and neighbours in one row.
    joins = (row[1:] == row[:-1]) & (other[1:] == other[:-1] + 1)
    joins &= (masks[1:] == FULL) & (masks[:-1] == FULL)
    first = np.concatenate([[True], ~joins])
    last = np.concatenate([~joins, [True]])
    spans = np.stack([other_bounds[other[first]], other_bounds[other[last] + 1], masks[first]], 1)
    per_row = np.bincount(row[first], minlength=heads * count)
    ends = np.cumsum(per_row).reshape(heads, count)
    starts = np.concatenate([ends[:, :1] - per_row.reshape(heads, count)[:, :1], ends], 1)
    seen = np.bincount(row[first], spans[:, 1] - spans[:, 0], heads * count).reshape(heads, count)
    return Spans(
        torch.from_numpy(bounds),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(spans.astype(np.int32)),
        torch.from_numpy(_blocks(bounds, seen)),
    )


def _blocks(bounds: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[P, blocks, 3]: every tile cut into rows of at most BLOCK; by what they see, most first."""
    lengths = np.diff(bounds)
    per_tile = -(-lengths // BLOCK)
    tile = np.repeat(np.arange(len(lengths)), per_tile)
    within = np.arange(len(tile)) - np.repeat(np.cumsum(per_tile) - per_tile, per_tile)
    begin = bounds[tile] + within * BLOCK
    end = np.minimum(begin + BLOCK, bounds[tile + 1])
    blocks = np.stack([tile, begin, end], 1).astype(np.int32)
    work = seen[:, tile] * (end - begin)
    return np.ascontiguousarray(blocks[np.argsort(-work, axis=1, kind="stable")])
