"""Plans made of plans: one for each head, and what any of several sees."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pydiffuse._core.words import describe
from pydiffuse.plans.arguments import check_eager
from pydiffuse.plans.plan import TilePlan, form, given_plan, make_plan
from pydiffuse.plans.rows import FULL, Entries, entries_of, overlaps, recut, sorted_runs


@form
def per_head(plans: Sequence[TilePlan]) -> TilePlan:
    """Head h follows plans[h]. Where all are equal, that plan itself, which serves any number of heads.

    Tiles are cut at the boundaries of all the plans: patterns over the same frames or cubes go together best.
    Plans with an order go with plans of the same order, and with those that keep everything.
    """
    check_eager("per_head")
    given = _plans("per_head", plans)
    for h, plan in enumerate(given):
        if plan.heads != 1:
            raise ValueError(f"per_head: plan {h} is {plan!r}; accepted: a plan for one head")
    return given[0] if len(set(given)) == 1 else _per_head(given)


@functools.lru_cache(maxsize=256)
def _per_head(plans: tuple[TilePlan, ...]) -> TilePlan:
    q_bounds, k_bounds, pieces = common_tiles(plans)
    head = np.concatenate([np.full(len(e.tile_q), h) for h, e in enumerate(pieces)])
    entries = joined(pieces)._replace(head=head)
    rows = sorted_runs(entries, len(plans), len(q_bounds) - 1)
    order = order_of("per_head", plans)
    return make_plan("per_head", [("plans", plans)], np.diff(q_bounds), np.diff(k_bounds), rows, order)


@form
def union(plans: Sequence[TilePlan]) -> TilePlan:
    """A query sees a key where one of the plans lets it: a local window and a few global tokens, say.

    Tiles are cut at the boundaries of all the plans. Plans for one head and for several go together.
    """
    check_eager("union")
    given = tuple(dict.fromkeys(_plans("union", plans)))
    heads = {plan.heads for plan in given if plan.heads > 1}
    if len(heads) > 1:
        raise ValueError(f"union: plans are for {sorted(heads)} heads; accepted: 1 or the same number")
    return given[0] if len(given) == 1 else _union(given)


@functools.lru_cache(maxsize=256)
def _union(plans: tuple[TilePlan, ...]) -> TilePlan:
    q_bounds, k_bounds, pieces = common_tiles(plans)
    heads, q_tiles = max(plan.heads for plan in plans), len(q_bounds) - 1
    every = joined([for_heads(e, plan.heads, heads) for e, plan in zip(pieces, plans, strict=True)])
    row, whole = every.head * q_tiles + every.tile_q, every.masks == FULL
    runs = overlaps(row[whole], every.begin[whole], every.end[whole], 1)
    # Tiles with masks count where no plan keeps them whole; where several do, they keep what any of them does.
    k_tiles = len(k_bounds) - 1
    place = row * k_tiles + every.begin
    inside = np.searchsorted(runs[0] * k_tiles + runs[1], place, side="right") - 1
    ends = np.append(runs[0] * k_tiles + runs[2], 0)
    part = np.flatnonzero(~whole & (place >= ends[inside]))
    place, first, which = np.unique(place[part], return_index=True, return_inverse=True)
    masks, bits = every.masks[part][first], list(every.bits)
    more = np.ones(len(part), bool)
    more[first] = False
    joins: dict[tuple[int, int], int] = {}
    for i in np.flatnonzero(more):
        pair = int(masks[which[i]]), int(every.masks[part[i]])
        if pair not in joins:
            joins[pair] = len(bits)
            bits.append(bits[pair[0]] | bits[pair[1]])
        masks[which[i]] = joins[pair]
    row, tile_k = np.divmod(place, k_tiles)
    row = np.concatenate([runs[0], row])
    begin, end = np.concatenate([runs[1], tile_k]), np.concatenate([runs[2], tile_k + 1])
    masks = np.concatenate([np.full(len(runs[0]), FULL), masks])
    kept = Entries(*np.divmod(row, q_tiles), begin, end, masks, tuple(bits))
    rows = sorted_runs(kept, heads, q_tiles)
    order = order_of("union", plans)
    return make_plan("union", [("plans", plans)], np.diff(q_bounds), np.diff(k_bounds), rows, order)


def without_keys(plan: TilePlan, keys: np.ndarray) -> TilePlan:
    """The plan less the keys that are False in `keys`, bool [k_length], over tokens."""
    order = plan.places()
    kept = keys if order is None else keys[order]
    cuts = np.flatnonzero(np.diff(kept)) + 1
    k_bounds, q_tiles = np.union1d(plan.k_bounds, cuts), len(plan.q_bounds) - 1
    head, tile_q, begin, end, masks, bits = entries_over(plan, plan.q_bounds, k_bounds)
    # A run that stays lies over a run of kept keys, which every row has.
    edge = np.flatnonzero(np.diff(np.concatenate([[False], kept[k_bounds[:-1]], [False]])))
    row, whole, every = head * q_tiles + tile_q, masks == FULL, np.arange(plan.heads * q_tiles)
    runs = overlaps(
        np.concatenate([row[whole], np.repeat(every, len(edge) // 2)]),
        np.concatenate([begin[whole], np.tile(edge[::2], len(every))]),
        np.concatenate([end[whole], np.tile(edge[1::2], len(every))]),
        2,
    )
    part = np.flatnonzero(~whole & kept[k_bounds[begin]])
    row, begin, end, masks = (
        np.concatenate([a, b[part]])
        for a, b in zip((*runs, np.full(len(runs[0]), FULL)), (row, begin, end, masks), strict=True)
    )
    rows = sorted_runs(Entries(*np.divmod(row, q_tiles), begin, end, masks, bits), plan.heads, q_tiles)
    return given_plan("without_keys", np.diff(plan.q_bounds), np.diff(k_bounds), rows, order)


def common_tiles(plans: Sequence[TilePlan]) -> tuple[np.ndarray, np.ndarray, list[Entries]]:
    """Boundaries of query and key tiles that hold those of all plans, and the plans' entries over them."""
    q_bounds, k_bounds = (
        functools.reduce(np.union1d, [getattr(plan, name) for plan in plans])
        for name in ("q_bounds", "k_bounds")
    )
    return q_bounds, k_bounds, [entries_over(plan, q_bounds, k_bounds) for plan in plans]


def entries_over(plan: TilePlan, q_bounds: np.ndarray, k_bounds: np.ndarray) -> Entries:
    return recut(entries_of(plan.runs), (plan.q_bounds, plan.k_bounds), (q_bounds, k_bounds))


def joined(pieces: Sequence[Entries]) -> Entries:
    """One after the other, with one list of masks."""
    masks: list[np.ndarray] = []
    bits: list[np.ndarray] = []
    for e in pieces:
        masks.append(np.where(e.masks == FULL, FULL, e.masks + len(bits)))
        bits += e.bits
    head, tile_q, begin, end = (np.concatenate([e[i] for e in pieces]) for i in range(4))
    return Entries(head, tile_q, begin, end, np.concatenate(masks), tuple(bits))


def for_heads(entries: Entries, given: int, heads: int) -> Entries:
    """The entries of a plan that `given` heads have, for `heads` of them."""
    if given == heads:
        return entries
    tile_q, begin, end, masks = (np.tile(part, heads) for part in entries[1:5])
    head = np.repeat(np.arange(heads), len(entries.head))
    return Entries(head, tile_q, begin, end, masks, entries.bits)


def keeps_all(plan: TilePlan) -> bool:
    return bool((plan.kept == plan.q_length * plan.k_length).all())


def order_of(op: str, plans: Iterable[TilePlan]) -> np.ndarray | None:
    """The order that the plans have in common; one that keeps everything goes along with any."""
    orders = [
        np.arange(plan.q_length) if (order := plan.places()) is None else order
        for plan in plans
        if not keeps_all(plan)
    ]
    for order in orders[1:]:
        if not np.array_equal(order, orders[0]):
            raise ValueError(
                f"{op}: the plans have different orders of tokens; accepted: plans of one order, such as"
                " sliding_tile over the same grid and tile, and dense ones"
            )
    return None if not orders or (np.diff(orders[0]) == 1).all() else orders[0]


def _plans(op: str, plans: Any) -> tuple[TilePlan, ...]:
    given = tuple(plans) if isinstance(plans, Sequence) else ()
    if not given:
        raise ValueError(f"{op}: plans is {plans!r}; accepted: a list of one TilePlan or more")
    for i, plan in enumerate(given):
        if not isinstance(plan, TilePlan):
            raise TypeError(f"{op}: plan {i} is {describe(plan)}; accepted: a TilePlan")
        first = given[0]
        if (plan.q_length, plan.k_length) != (first.q_length, first.k_length):
            raise ValueError(
                f"{op}: plan {i} is {plan!r} and plan 0 is {first!r}; accepted: plans of equal lengths"
            )
    return given
