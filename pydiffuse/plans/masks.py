"""Plans from masks that someone has already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pydiffuse._core.modes import is_tensor, real_tensors
from pydiffuse._core.words import describe
from pydiffuse.plans.arguments import check_eager, count, counts
from pydiffuse.plans.plan import TilePlan, given_plan
from pydiffuse.plans.rows import FULL, Entries, Tiles, row_starts, sorted_runs

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**22
"""Elements of a mask_mod that are evaluated at once."""


def from_mask(
    mask: Tensor | np.ndarray,
    q_tiles: int | Sequence[int] = 128,
    k_tiles: int | Sequence[int] | None = None,
) -> TilePlan:
    """The tiles in which a mask keeps anything; where it keeps some elements only, with those elements.

    mask: bool [queries, keys], or [H, queries, keys] for a plan per head, or [B, H, queries, keys] of samples
    with one mask; where they differ, `[from_mask(m) for m in mask]` has a plan for each, with which
    tile_attention is called sample by sample. q_tiles, k_tiles: a tile's length, the last one may be shorter,
    or the length of every tile; k_tiles is q_tiles by default.
    """
    check_eager("from_mask")
    array = _bools("from_mask", mask, "[queries, keys] or [H, queries, keys]")
    q_lengths = tile_lengths("from_mask", "q_tiles", q_tiles, array.shape[1])
    k_lengths = tile_lengths(
        "from_mask", "k_tiles", q_tiles if k_tiles is None else k_tiles, array.shape[2]
    )
    q_bounds, k_bounds = (np.concatenate([[0], np.cumsum(n)]) for n in (q_lengths, k_lengths))
    some = np.add.reduceat(
        np.add.reduceat(array, q_bounds[:-1], 1, dtype=np.int64), k_bounds[:-1], 2, dtype=np.int64
    )
    head, tq, tk = np.nonzero(some)
    masks = np.full(len(tk), FULL, np.int32)
    partial = np.flatnonzero(some[head, tq, tk] < np.outer(q_lengths, k_lengths)[tq, tk])
    masks[partial] = np.arange(len(partial))
    bits = tuple(
        array[p, q_bounds[i] : q_bounds[i + 1], k_bounds[j] : k_bounds[j + 1]]
        for p, i, j in zip(head[partial], tq[partial], tk[partial], strict=True)
    )
    rows = Tiles(row_starts((some > 0).sum(2)), tk.astype(np.int32), masks, bits)
    return given_plan("from_mask", q_lengths, k_lengths, rows)


def from_blocks(
    mask: Tensor | np.ndarray, q_lengths: Sequence[int], k_lengths: Sequence[int] | None = None
) -> TilePlan:
    """The tiles that a matrix of blocks keeps, whole: what block-sparse attention such as VSA is given.

    mask: bool [Tq, Tk], or [H, Tq, Tk] for a plan per head, or [B, H, Tq, Tk] of samples with one matrix.
    q_lengths: the tokens of each of the Tq blocks, 1 or more. k_lengths: of the Tk; q_lengths by default.
    """
    op = "from_blocks"
    check_eager(op)
    array = _bools(op, mask, "[Tq, Tk] or [H, Tq, Tk], a bool for each pair of blocks")
    _, q_tiles, k_tiles = array.shape
    q = counts(op, "q_lengths", q_lengths, 1, (q_tiles,))
    k = (
        q
        if k_lengths is None and k_tiles == q_tiles
        else counts(op, "k_lengths", k_lengths, 1, (k_tiles,))
    )
    tiles = array.nonzero()[2].astype(np.int32)
    rows = Tiles(row_starts(array.sum(2)), tiles, np.full(len(tiles), FULL, np.int32))
    return given_plan(op, q, k, rows)


def _bools(op: str, mask: Any, names: str) -> np.ndarray:
    """bool [P, queries, keys] of a mask, or of the one that samples share."""
    if is_tensor(mask):
        with real_tensors():
            array = mask.detach().cpu().numpy()
    else:
        array = np.asarray(mask)
    if array.dtype != bool or array.ndim not in (2, 3, 4) or 0 in array.shape:
        given = describe(mask) if is_tensor(mask) else f"{array.dtype} {array.shape}"
        raise ValueError(f"{op}: mask is {given}; accepted: bool {names}")
    if array.ndim == 4:
        if (array != array[:1]).any():
            raise ValueError(
                f"{op}: mask is for {len(array)} samples with different masks; accepted: one for all; make a"
                f" plan for each, [{op}(m, ...) for m in mask], and call tile_attention sample by sample"
            )
        array = array[0]
    return array.reshape(-1, *array.shape[-2:])


def tile_lengths(op: str, argument: str, tiles: int | Sequence[int], total: int) -> list[int]:
    if isinstance(tiles, Sequence | np.ndarray):
        given = list(counts(op, argument, tiles))
        if sum(given) != total:
            raise ValueError(
                f"{op}: {argument} add up to {sum(given)}; accepted: lengths of {total} in all"
            )
        return given
    step = count(op, argument, tiles)
    return [min(step, total - at) for at in range(0, total, step)]


class Blocks(NamedTuple):
    """The kept blocks of a BlockMask, one by one."""

    batch: np.ndarray
    head: np.ndarray
    tile_q: np.ndarray
    tile_k: np.ndarray
    partial: np.ndarray  # bool: where mask_mod has its say


def from_block_mask(block_mask: Any) -> TilePlan:
    """From a BlockMask of torch.nn.attention.flex_attention: its blocks are the tiles.

    Its mask_mod is evaluated within partial blocks only. A mask per head gives a plan per head; samples of
    a batch must have the same mask.
    """
    op = "from_block_mask"
    check_eager(op)
    fields = ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths")
    if not all(hasattr(block_mask, name) for name in fields):
        raise TypeError(
            f"{op}: block_mask is {describe(block_mask)}; accepted: a BlockMask of"
            " torch.nn.attention.flex_attention"
        )
    batch, heads = block_mask.kv_indices.shape[:2]
    with real_tensors():
        blocks = _blocks(block_mask)
        bits = _evaluated(block_mask, blocks)
    samples = []
    for b in range(batch):
        mine = blocks.batch == b
        masks = np.full(mine.sum(), FULL, np.int64)
        masks[blocks.partial[mine]] = np.arange(blocks.partial[mine].sum())
        own = tuple(m for m, at in zip(bits, blocks.batch[blocks.partial], strict=True) if at == b)
        tile_k = blocks.tile_k[mine]
        samples.append(Entries(blocks.head[mine], blocks.tile_q[mine], tile_k, tile_k + 1, masks, own))
    q_lengths, k_lengths = (
        tile_lengths(op, "BLOCK_SIZE", int(size), int(total))
        for size, total in zip(block_mask.BLOCK_SIZE, block_mask.seq_lengths, strict=True)
    )
    rows = [sorted_runs(sample, heads, len(q_lengths)) for sample in samples]
    plans = [given_plan(op, q_lengths, k_lengths, r) for r in rows]
    if len(set(plans)) > 1:
        raise ValueError(
            f"{op}: block_mask is for {batch} samples with different masks; accepted: one mask for all; call"
            " tile_attention with a plan for each sample, or put them in one sequence with plans.groups"
        )
    return plans[0]


def _blocks(block_mask: Any) -> Blocks:
    kinds = [(block_mask.kv_num_blocks, block_mask.kv_indices, True)]
    if block_mask.full_kv_num_blocks is not None:
        kinds.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices, False))
    columns = []
    for number, indices, partial in kinds:
        number, indices = number.cpu().numpy(), indices.cpu().numpy()
        *place, slot = np.nonzero(np.arange(indices.shape[-1]) < number[..., None])
        columns.append((*place, indices[(*place, slot)], np.full(len(slot), partial)))
    batch, head, tile_q, tile_k, some = (np.concatenate(part) for part in zip(*columns, strict=True))
    return Blocks(batch, head, tile_q, tile_k, some)


def _evaluated(block_mask: Any, blocks: Blocks) -> list[np.ndarray]:
    """The bits of every partial block, cut at the ends of the sequences."""
    import torch
    from torch.nn.attention.flex_attention import create_mask

    (q_size, k_size), (q_length, k_length) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    device, mod = block_mask.kv_indices.device, block_mask.mask_mod
    if not blocks.partial.any():
        return []
    tile_q, tile_k = (part[blocks.partial] for part in (blocks.tile_q, blocks.tile_k))
    columns = blocks.batch[blocks.partial], blocks.head[blocks.partial], tile_q, tile_k
    places = torch.from_numpy(np.stack(columns, 1).astype(np.int64)).to(device)
    bits: list[np.ndarray] = []
    for some in places.split(max(1, CHUNK // (q_size * k_size))):
        inside = _within(mod, some, block_mask.BLOCK_SIZE, block_mask.seq_lengths)
        mask = create_mask(inside, len(some), 1, q_size, k_size, device=device)
        bits += list(mask[:, 0].cpu().numpy())
    ends = (
        (min(q_size, q_length - int(i) * q_size), min(k_size, k_length - int(j) * k_size))
        for i, j in zip(tile_q, tile_k, strict=True)
    )
    return [np.ascontiguousarray(b[:q, :k]) for b, (q, k) in zip(bits, ends, strict=True)]


def _within(
    mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    places: Tensor,  # int64 [n, 4]: batch, head, block of queries, block of keys
    sizes: Sequence[int],
    lengths: Sequence[int],
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A mask_mod over many blocks as if they were samples. What a block has beyond the end of a sequence
    is asked for at the end: a mask_mod may look into a table as long as the sequence."""
    batch, head, tile_q, tile_k = places.unbind(1)
    first_q, first_k = tile_q * sizes[0], tile_k * sizes[1]

    def inside(n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q = (first_q[n] + i).clamp(max=lengths[0] - 1)
        k = (first_k[n] + j).clamp(max=lengths[1] - 1)
        return mod(batch[n], head[n], q, k)

    return inside
