"""Plans over a sequence, in closed form: none looks at all pairs of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pydiffuse._core.words import check_flag
from pydiffuse.plans.arguments import check_eager, check_tiles, check_tokens, count, counts
from pydiffuse.plans.plan import TilePlan, form, make_plan
from pydiffuse.plans.rows import FULL, Runs, Tiles, ranges, row_starts

BLOCKS = "larger blocks or a window keep fewer"


@form
def dense(length: int, k_length: int | None = None) -> TilePlan:
    """Every query sees every key: one tile."""
    check_eager("dense")
    length = count("dense", "length", length)
    k_length = length if k_length is None else count("dense", "k_length", k_length)
    check_tokens("dense", max(length, k_length))
    return _dense(length, k_length)


@functools.lru_cache(maxsize=256)
def _dense(length: int, k_length: int) -> TilePlan:
    parameters = [("length", length), ("k_length", k_length)]
    return make_plan("dense", parameters, [length], [k_length], _full_rows(np.ones(1, int), np.zeros(1)))


def _full_rows(per_row: np.ndarray, tiles: np.ndarray) -> Tiles:
    """per_row: int [T], the tiles of keys that each tile of queries keeps, whole, in `tiles` by row."""
    return Tiles(row_starts(per_row[None]), tiles.astype(np.int32), np.full(len(tiles), FULL, np.int32))


@form
def frames(num_frames: int, tokens_per_frame: int, references: int, text: int = 0) -> TilePlan:
    """Efficient-vDiT's attention tile (arXiv 2502.06155): a frame sees itself and the reference frames, and
    the reference frames see and are seen by all.

    `references` of the frames, spread evenly, are R = {floor(i num_frames / references)}. `text` tokens
    after the frames see and are seen by all.
    """
    check_eager("frames")
    num_frames = count("frames", "num_frames", num_frames)
    tokens_per_frame = count("frames", "tokens_per_frame", tokens_per_frame)
    references = count("frames", "references", references, 0, num_frames)
    text = count("frames", "text", text, 0)
    check_tokens("frames", num_frames * tokens_per_frame + text)
    by_all, tiles = references + (text > 0), num_frames + (text > 0)
    kept = by_all * tiles + (tiles - by_all) * (by_all + 1)
    check_tiles("frames", kept, "larger frames or fewer references keep fewer")
    return _frames(num_frames, tokens_per_frame, references, text)


@functools.lru_cache(maxsize=256)
def _frames(num_frames: int, tokens_per_frame: int, references: int, text: int) -> TilePlan:
    tiles = num_frames + (text > 0)
    seen = np.zeros(tiles, bool)
    seen[[i * num_frames // references for i in range(references)]] = True
    seen[num_frames:] = True
    # A row of a reference is all; another one is the runs of references and the frame itself.
    edge = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]])))
    own = np.flatnonzero(~seen)
    begin, end = (np.broadcast_to(at, (len(own), len(edge) // 2)) for at in (edge[::2], edge[1::2]))
    place = np.argsort(np.column_stack([begin, own]), 1, kind="stable")
    per_row = np.where(seen, 1, place.shape[1])
    whole = np.repeat(seen, per_row)
    ends = np.zeros((2, per_row.sum()), np.int32)
    ends[1, whole] = tiles
    for side, at, mine in zip(ends, (begin, end), (own, own + 1), strict=True):
        side[~whole] = np.take_along_axis(np.column_stack([at, mine]), place, 1).ravel()
    rows = Runs(row_starts(per_row[None]), ends[0], ends[1], np.full(ends.shape[1], FULL, np.int32))
    lengths = [tokens_per_frame] * num_frames + [text] * (text > 0)
    parameters = [
        ("num_frames", num_frames), ("tokens_per_frame", tokens_per_frame), ("references", references),
        ("text", text),
    ]  # fmt: skip
    return make_plan("frames", parameters, lengths, lengths, rows)


@form
def groups(lengths: Sequence[int], k_lengths: Sequence[int] | None = None) -> TilePlan:
    """Several sequences in one: queries of group i see the keys of group i and no others.

    lengths: tokens of every group, images or sentences one after the other. k_lengths: keys of every group,
    where they are not the queries (text for each image); lengths by default. A group may be empty.
    """
    check_eager("groups")
    given = counts("groups", "lengths", lengths, 0)
    k_given = given
    if k_lengths is not None:
        k_given = counts("groups", "k_lengths", k_lengths, 0, (len(given),))
    check_tokens("groups", max(sum(given), sum(k_given)))
    return _groups(given, k_given)


@functools.lru_cache(maxsize=256)
def _groups(lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> TilePlan:
    q, k = np.array(lengths), np.array(k_lengths)
    both = (q > 0) & (k > 0)
    rows = _full_rows(both[q > 0].astype(np.int64), (np.cumsum(k > 0, dtype=np.int64) - 1)[both])
    parameters = [("lengths", lengths), ("k_lengths", k_lengths)]
    return make_plan("groups", parameters, q[q > 0], k[k > 0], rows)


@form
def block_causal(
    num_blocks: int,
    block: int | Sequence[int],
    *,
    window: int | None = None,
    sinks: int = 0,
    clean: bool = False,
) -> TilePlan:
    """Block i sees itself and the blocks before it (Efficient-DLM, Diffusion Forcing).

    block: tokens of a block, or of each one. window: how many of the blocks before it a block sees, all by
    default. sinks: so many first blocks are seen by all that come after them, too.

    clean: the sequence is twice as long, the noisy blocks and then the clean ones, as block diffusion is
    trained (arXiv 2503.09573): a noisy block sees itself and the clean ones before it, a clean
    one itself and the clean ones before it.
    """
    check_eager("block_causal")
    num_blocks = count("block_causal", "num_blocks", num_blocks)
    check_tiles("block_causal", num_blocks, BLOCKS)
    if isinstance(block, Sequence | np.ndarray):
        lengths = counts("block_causal", "block", block, 1, (num_blocks,))
    else:
        lengths = (count("block_causal", "block", block),) * num_blocks
    # More than the blocks there are is all of them: equal plans, numbers that fit.
    window = None if window is None else min(count("block_causal", "window", window, 0), num_blocks)
    sinks = min(count("block_causal", "sinks", sinks, 0), num_blocks)
    check_flag("block_causal", "clean", clean)
    check_tokens("block_causal", sum(lengths) * (1 + clean))
    return _block_causal(lengths, window, sinks, clean)


@functools.lru_cache(maxsize=256)
def _block_causal(lengths: tuple[int, ...], window: int | None, sinks: int, clean: bool) -> TilePlan:
    n = len(lengths)
    block_of = np.arange(n)
    # Three runs of every row: the sinks, the window, the block itself.
    first = np.zeros(n, np.int64) if window is None else np.maximum(block_of - window, 0)
    runs_at = np.stack([np.zeros(n, np.int64), first, block_of], 1)
    runs = np.stack([np.minimum(sinks, first), block_of - first, np.ones(n, np.int64)], 1)
    if clean:  # a noisy block is itself and those of the clean blocks, a clean one all of the clean
        noisy_at = np.stack([block_of, n + runs_at[:, 0], n + runs_at[:, 1]], 1)
        runs_at, runs = (
            np.concatenate([noisy_at, n + runs_at]),
            np.concatenate([runs[:, [2, 0, 1]], runs]),
        )
    check_tiles("block_causal", int(runs.sum()), BLOCKS)
    begin = runs_at.ravel().astype(np.int32)
    end = (runs_at + runs).ravel().astype(np.int32)
    rows = Runs(3 * np.arange(len(runs) + 1)[None], begin, end, np.full(len(begin), FULL, np.int32))
    tiles = lengths * (1 + clean)
    block = lengths[0] if len(set(lengths)) == 1 else lengths
    parameters = [
        ("num_blocks", n), ("block", block), ("window", window), ("sinks", sinks), ("clean", clean),
    ]  # fmt: skip
    return make_plan("block_causal", parameters, tiles, tiles, rows)


@form
def local(
    length: int, window: int, *, causal: bool = False, tile: int = 128, k_length: int | None = None
) -> TilePlan:
    """Token i sees token j where |i - j| <= window; with `causal`, only where j <= i, too.

    Exact for every element. tile: tokens of a tile; smaller ones compute less of what the edges of the
    window leave out (`TilePlan.computed`), larger ones in longer runs. k_length: keys, where there are more
    or fewer of them than queries; both end together, so that query i is key i + k_length - length (the last
    tokens of a sequence whose keys are kept, say).
    """
    check_eager("local")
    length = count("local", "length", length)
    k_length = length if k_length is None else count("local", "k_length", k_length)
    longer = max(length, k_length)
    check_tokens("local", longer)
    check_flag("local", "causal", causal)
    # More than the sequence is the sequence, and so is a tile: equal plans, numbers that fit.
    window = min(count("local", "window", window, 0), longer - 1)
    tile = min(count("local", "tile", tile), longer)
    check_tiles("local", -(-longer // tile), "larger tiles keep fewer")
    return _local(length, window, causal, tile, k_length)


def causal(length: int, tile: int = 128, *, k_length: int | None = None) -> TilePlan:
    """Token i sees token j where j <= i, and where there are more keys, those before them, too:
    `local(length, longer, causal=True, tile=tile, k_length=k_length)`, the same object."""
    check_eager("causal")
    length, tile = count("causal", "length", length), count("causal", "tile", tile)
    k_length = length if k_length is None else count("causal", "k_length", k_length)
    check_tokens("causal", max(length, k_length))
    return local(length, max(length, k_length), causal=True, tile=tile, k_length=k_length)


@functools.lru_cache(maxsize=256)
def _local(length: int, window: int, causal: bool, tile: int, k_length: int | None = None) -> TilePlan:
    k_length = length if k_length is None else k_length
    begin, k_begin = (np.arange(0, n, tile, dtype=np.int64) for n in (length, k_length))
    lengths, k_lengths = np.minimum(tile, length - begin), np.minimum(tile, k_length - k_begin)
    at = begin + k_length - length  # the first query of a tile, as a key
    last, end = at + lengths - 1, k_length - 1
    ahead = 0 if causal else window

    def tiles_upto(key: np.ndarray) -> np.ndarray:
        """Whole tiles before and with a key."""
        return np.where(key >= end, len(k_begin), np.maximum(key + 1, 0) // tile)

    # Tiles that some query of the tile sees, and within them those that every query sees whole.
    first = np.maximum(at - window, 0) // tile
    stop = np.maximum(np.minimum(last + ahead, end) // tile + 1, first)
    full = np.maximum(-(-(last - window) // tile), first)
    full_stop = np.minimum(tiles_upto(at + ahead), stop)
    full = np.where(full < full_stop, full, stop)
    full_stop = np.maximum(full, full_stop)
    check_tiles("local", int((stop - first).sum()), "larger tiles keep fewer")
    before, after = (ranges(*e) for e in ((first, full - first), (full_stop, stop - full_stop)))
    some = np.flatnonzero(full_stop > full)
    row = np.concatenate([before[1], some, after[1]])
    tiles = np.concatenate([before[0], full[some], after[0]])
    ends = np.concatenate([before[0] + 1, full_stop[some], after[0] + 1])
    masks = np.full(len(row), FULL, np.int64)
    part = np.ones(len(row), bool)
    part[len(before[0]) : len(before[0]) + len(some)] = False
    q, k = row[part], tiles[part]
    shapes = np.stack([at[q] - k_begin[k], lengths[q], k_lengths[k]], 1)
    distinct, which = np.unique(shapes, axis=0, return_inverse=True)
    masks[part] = which.ravel()
    sequence = np.lexsort((tiles, row))
    bits = []
    for offset, queries, keys in distinct:
        back = offset + np.arange(queries)[:, None] - np.arange(keys)
        bits.append((back <= window) & (back >= -ahead))
    starts = row_starts(np.bincount(row, minlength=len(begin))[None])
    rows = Runs(starts, tiles[sequence], ends[sequence], masks[sequence], tuple(bits))
    parameters: list[tuple[str, Any]] = [
        ("length", length), ("window", window), ("causal", causal), ("tile", tile),
    ]  # fmt: skip
    parameters += [("k_length", k_length)] if k_length != length else []
    return make_plan("local", parameters, lengths, k_lengths, rows)
