"""A plan of every kind, and what a plan must be: as a mask, and for the kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pydiffuse import plans
from pydiffuse._core.structs import BLOCK
from pydiffuse.plans import TilePlan
from pydiffuse.plans.rows import FULL

EXAMPLES = {
    "dense": lambda: plans.dense(9, 5),
    "frames": lambda: plans.frames(4, 9, 2, text=3),
    "sliding_tile": lambda: plans.sliding_tile((5, 7), (2, 3), (2, 3), text=2),
    "block_causal": lambda: plans.block_causal(3, [2, 5, 1], window=1, sinks=1, clean=True),
    "local": lambda: plans.local(21, 4, causal=True, tile=8),
    "joint": lambda: plans.joint(
        {"video": plans.frames(3, 4, 1), "audio": 9, "text": plans.local(5, 1)},
        {"text": ()},
        local={("video", "audio"): 1},
        steps=3,
    ),
    "groups": lambda: plans.groups([3, 0, 4], [2, 2, 1]),
    "per_head": lambda: plans.per_head([plans.local(12, 3, tile=5), plans.frames(3, 4, 1)]),
    "union": lambda: plans.union([plans.local(12, 3, tile=5), plans.frames(3, 4, 1)]),
    "from_mask": lambda: plans.from_mask(torch.ones(2, 9, 7, dtype=torch.bool).tril(1), 4, 3),
    "from_blocks": lambda: plans.from_blocks(
        torch.tensor([[[True, False, True], [False, True, True]], [[False, True, False], [True] * 3]]),
        [2, 3],
        [1, 4, 2],
    ),
    "from_block_mask": lambda: plans.from_block_mask(
        create_block_mask(lambda b, h, q, k: q >= k, None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
    ),
}
KINDS = list(EXAMPLES)


def dense_of(rule, queries, keys=None):
    """bool [queries, keys] from rule(i, j)."""
    return torch.tensor([[bool(rule(i, j)) for j in range(keys or queries)] for i in range(queries)])


def draws(name, count):
    """The same random numbers in every run."""
    rng = np.random.default_rng(sum(map(ord, name)))
    for _ in range(count):
        yield lambda low, high: int(rng.integers(low, high + 1))


def check_sense(plan: TilePlan, mask: torch.Tensor) -> None:
    """The plan keeps what the mask does, and its tensors say so to both sides."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    assert torch.equal(plan.to_dense(), mask)
    assert plan.heads == len(mask)
    assert plan.kept.tolist() == mask.sum((1, 2)).tolist()
    assert plan.density == pytest.approx(mask.double().mean().item())
    assert (plan.kept <= plan.computed).all()
    order = slice(None) if plan.order is None else plan.order.long()
    places = mask[:, order][:, :, order] if plan.order is not None else mask
    t = plan.tensors
    masks = t.words.numpy(), t.mask_at.numpy()
    check_side(*(a.numpy() for a in t[:4]), places.numpy(), *masks, queries=True)
    check_side(*(a.numpy() for a in t[4:8]), places.transpose(1, 2).numpy(), *masks, queries=False)


def check_side(bounds, starts, spans, blocks, seen, words, mask_at, queries):
    """seen: bool [P, rows, columns], what rows of this side see of the other. queries: rows are queries."""
    P, rows, columns = seen.shape
    for a in (bounds, starts, spans, blocks):
        assert a.dtype == np.int32 and a.flags.c_contiguous
    assert bounds[0] == 0 and bounds[-1] == rows and (np.diff(bounds) > 0).all()
    assert starts.shape == (P, len(bounds)) and spans.shape[1] == 3
    flat = starts.ravel()
    assert flat[0] == 0 and flat[-1] == len(spans) and (np.diff(flat) >= 0).all()
    drawn = np.zeros_like(seen)
    for p, tile in itertools.product(range(P), range(len(bounds) - 1)):
        own = spans[starts[p, tile] : starts[p, tile + 1]]
        assert (own[:, 0] < own[:, 1]).all() and (own[:, 0] >= 0).all() and (own[:, 1] <= columns).all()
        assert (own[1:, 0] >= own[:-1, 1]).all(), "ascending and disjoint"
        full = own[:, 2] == FULL
        touching = (own[1:, 0] == own[:-1, 1]) & full[1:] & full[:-1]
        assert not touching.any(), "full neighbours are one span"
        row = slice(bounds[tile], bounds[tile + 1])
        for begin, end, mask in own:
            part = np.ones((bounds[tile + 1] - bounds[tile], end - begin), bool)
            if mask != FULL:
                q, k = part.shape if queries else part.shape[::-1]
                per_row = -(-k // 32)
                bits = words[mask_at[mask] : mask_at[mask] + q * per_row].view(np.uint32)
                bits = bits.reshape(q, per_row, 1) >> np.arange(32, dtype=np.uint32) & 1
                bits = bits.reshape(q, -1)
                assert not bits[:, k:].any(), "bits beyond the tile are zeros"
                part = bits[:, :k].astype(bool)
                part = part if queries else part.T
                assert part.any() and not part.all()
            drawn[p, row, begin:end] |= part
    assert (drawn == seen).all()
    assert blocks.shape[0] == P and blocks.shape[2] == 3
    for p in range(P):
        covered = np.zeros(rows, int)
        work = []
        for tile, begin, end in blocks[p]:
            assert bounds[tile] <= begin < end <= bounds[tile + 1] and end - begin <= BLOCK
            covered[begin:end] += 1
            own = spans[starts[p, tile] : starts[p, tile + 1]]
            work.append((own[:, 1] - own[:, 0]).sum() * (end - begin))
        assert (covered == 1).all()
        assert work == sorted(work, reverse=True), "what sees most comes first"
