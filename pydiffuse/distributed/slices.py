"""Parts of a plan: what some ranks' queries see of some ranks' keys, and lengths of equal work.

Cut from the plan's runs of tiles, in proportion to them; no pair of tokens is looked at.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.checks import describe
from pydiffuse.plans import TilePlan
from pydiffuse.plans.arguments import count
from pydiffuse.plans.combine import entries_over
from pydiffuse.plans.plan import given_plan
from pydiffuse.plans.rows import FULL, Entries, sorted_runs


class Part(NamedTuple):
    """What the queries of one rank see of the keys of another."""

    plan: TilePlan
    keys: Tensor | None  # int64: the keys that are seen, of those that rank holds; None for all of them
    number: int  # how many


def split(plan: TilePlan, ranks: int) -> list[int]:
    """How many tokens each rank should hold, so that all have about the same number of query-key pairs.

    plan: with as many queries as keys. Returns `ranks` lengths that add up to the plan's, in the plan's order of
    tokens where it has one.
    """
    if not isinstance(plan, TilePlan):
        raise TypeError(f"split: plan is {describe(plan)}; accepted: a TilePlan of pydiffuse.plans")
    ranks = count("split", "ranks", ranks)
    work = np.concatenate([[0.0], np.cumsum(_pairs(plan))])
    if not work[-1]:
        work = np.arange(plan.q_length + 1, dtype=np.float64)
    # The token nearest to each equal share.
    share = work[-1] * np.arange(1, ranks) / ranks
    at = np.searchsorted(work, share)
    at -= (share - work[at - 1]) < (work[at] - share)
    return np.diff(np.concatenate([[0], at, [plan.q_length]])).tolist()


def _pairs(plan: TilePlan) -> np.ndarray:
    """Pairs of each query, over all heads, by position."""
    each = np.zeros(plan.q_length + 1)
    q, k = plan.q_bounds.astype(np.int64), plan.k_bounds.astype(np.int64)
    starts, begin, end, masks, bits = plan.runs
    tile = np.tile(np.arange(len(q) - 1), len(starts))
    tile = np.repeat(tile, np.diff(starts).ravel())
    whole = masks == FULL
    keys = (k[end] - k[begin])[whole]
    np.add.at(each, q[tile[whole]], keys)
    np.add.at(each, q[tile[whole] + 1], -keys)
    each = np.cumsum(each)[:-1]
    for t, m in zip(tile[~whole], masks[~whole], strict=True):
        each[q[t] : q[t + 1]] += bits[m].sum(1)
    return each


def without_order(plan: TilePlan) -> TilePlan:
    """The plan over positions: the same tiles, tokens in its order."""
    if plan.places() is None:
        return plan
    return given_plan("positions", np.diff(plan.q_bounds), np.diff(plan.k_bounds), plan.runs)


@functools.lru_cache(maxsize=4096)
def part(plan: TilePlan, queries: tuple[int, int], keys: tuple[int, int]) -> Part | None:
    """The part of queries [first, last) and keys [first, last), both by position; None where none is seen.

    Keys that no query sees are left out: they need not be sent.
    """
    if queries[0] == queries[1] or keys[0] == keys[1]:
        return None
    q_bounds, k_bounds = (
        np.union1d(bounds, ends) for bounds, ends in ((plan.q_bounds, queries), (plan.k_bounds, keys))
    )
    head, tile_q, begin, end, masks, bits = entries_over(plan, q_bounds, k_bounds)
    q0, q1 = np.searchsorted(q_bounds, queries)
    k0, k1 = np.searchsorted(k_bounds, keys)
    begin, end = np.maximum(begin, k0) - k0, np.minimum(end, k1) - k0
    some = np.array([m.any() for m in bits] + [True])  # FULL is -1: the last one
    inside = (tile_q >= q0) & (tile_q < q1) & (begin < end) & some[masks]
    if not inside.any():
        return None
    head, tile_q, begin, end, masks = (a[inside] for a in (head, tile_q - q0, begin, end, masks))
    q_lengths, k_lengths = np.diff(q_bounds[q0 : q1 + 1]), np.diff(k_bounds[k0 : k1 + 1])
    at = np.concatenate([[0], np.cumsum(k_lengths)])
    # Keys that are seen: those of whole tiles, +1 where runs begin, -1 where they end; and by masks.
    whole = masks == FULL
    step = np.bincount(begin[whole], minlength=k1 - k0 + 1) - np.bincount(
        end[whole], minlength=k1 - k0 + 1
    )
    seen = np.repeat(np.cumsum(step)[:-1] > 0, k_lengths)
    masked = np.flatnonzero(~whole)
    for i in masked:
        seen[at[begin[i]] : at[begin[i] + 1]] |= bits[masks[i]].any(0)
    narrow: dict[tuple[int, int], int] = {}
    cut_bits: list[np.ndarray] = []
    for i in masked:
        key = int(masks[i]), int(begin[i])
        if key not in narrow:
            narrow[key] = len(cut_bits)
            cut_bits.append(bits[key[0]][:, seen[at[begin[i]] : at[begin[i] + 1]]])
        masks[i] = narrow[key]
    left = np.add.reduceat(seen, at[:-1])
    place = np.concatenate([[0], np.cumsum(left > 0)])
    entries = Entries(head, tile_q, place[begin], place[end - 1] + 1, masks, tuple(cut_bits))
    runs = sorted_runs(entries, plan.heads, q1 - q0)
    cut = given_plan("part", q_lengths, left[left > 0], runs)
    return Part(cut, None if seen.all() else torch.from_numpy(np.flatnonzero(seen)), int(seen.sum()))


@functools.lru_cache(maxsize=64)
def of_heads(plan: TilePlan, heads: tuple[int, int]) -> TilePlan:
    """The plan of heads [first, last)."""
    if plan.heads == 1:
        return plan
    starts, begin, end, masks, bits = plan.runs
    first, last = heads
    a, b = int(starts[first, 0]), int(starts[last - 1, -1])
    runs = plan.runs._replace(
        starts=starts[first:last] - a, begin=begin[a:b], end=end[a:b], masks=masks[a:b], bits=bits
    )
    order = plan.places()
    return given_plan("heads", np.diff(plan.q_bounds), np.diff(plan.k_bounds), runs, order)


def bounds_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last) of every rank."""
    ends = np.cumsum([0, *lengths]).tolist()
    return list(itertools.pairwise(ends))
