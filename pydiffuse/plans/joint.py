"""Joint attention of several modalities, one after the other in one sequence."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pydiffuse.plans.arguments import check_eager, check_tiles, check_tokens, count
from pydiffuse.plans.combine import entries_over, for_heads, joined
from pydiffuse.plans.plan import TilePlan, form, make_plan
from pydiffuse.plans.rows import FULL, Entries, sorted_runs

OP = "joint"
FEWER = "fewer steps or larger tiles of the modalities keep fewer"


class Modality(NamedTuple):
    """One of them, with the tiles that it is cut into."""

    name: str
    plan: TilePlan | None
    """How it sees itself; None: all of itself, or through its own window."""
    q_bounds: np.ndarray
    k_bounds: np.ndarray


@form
def joint(
    modalities: Mapping[str, int | TilePlan],
    sees: Mapping[str, Sequence[str]] | None = None,
    *,
    local: Mapping[tuple[str, str], int] | None = None,
    steps: int | None = None,
) -> TilePlan:
    """Several modalities in one sequence, in the order of `modalities`: who sees whom, and how far in time.

        joint({"video": frames(16, 64, 2), "audio": 160, "text": 20}, {"text": ()},
              local={("video", "audio"): 1}, steps=16)

    modalities: by name the number of tokens, all of which see each other, or the plan by which they do.
    sees: by name the other modalities that it sees; what is left out sees all.

    local, steps: JAM-Flow's local joint attention (arXiv 2506.23552) between modalities that share a clock.
    Each of those is cut evenly into `steps` steps of time: of its n tokens step s has floor(s n / steps) up
    to floor((s + 1) n / steps). local: by pair of names a window: step s of the one sees only the steps of
    the other from s - window to s + window, and the other way round. A pair of a name with itself: the
    modality sees itself like that.

    A modality's plan may have an order, but then no clock.
    """
    check_eager(OP)
    names, plans = _modalities(modalities)
    check_tokens(OP, sum(map(_length, plans.values())))
    others = _sees(sees, names)
    windows = _local(local, names, plans, others)
    if windows:
        steps = most = count(OP, "steps", steps)
        check_tiles(OP, steps, FEWER)
        # A window of more than all steps is all of them: equal plans, numbers that fit.
        windows = tuple((a, b, min(window, most)) for a, b, window in windows)
    elif steps is not None:
        raise ValueError(f"{OP}: steps is {steps!r} and local is empty; accepted: both or none")
    for name in {name for pair in windows for name in pair[:2]}:
        length, plan = _length(plans[name]), plans[name]
        if steps is not None and length < steps:
            raise ValueError(
                f"{OP}: {name!r} has {length} tokens and steps is {steps}; accepted: 1 to {length}"
            )
        if isinstance(plan, TilePlan) and plan.places() is not None:
            raise ValueError(
                f"{OP}: {name!r} is {plan!r}, which has an order; accepted in local: modalities in order of time"
            )
    return _joint(tuple(plans.items()), others, windows, steps)


Pairs = tuple[tuple[str, tuple[str, ...]], ...]
Windows = tuple[tuple[str, str, int], ...]


@functools.lru_cache(maxsize=256)
def _joint(
    plans: tuple[tuple[str, int | TilePlan], ...], sees: Pairs, local: Windows, steps: int | None
) -> TilePlan:
    windows = {(a, b): w for x, y, w in local for a, b in ((x, y), (y, x))}
    heads = max((p.heads for _, p in plans if isinstance(p, TilePlan)), default=1)
    parts = []
    for name, plan in plans:
        timed = any(name in pair for pair in windows)
        clock = _clock(_length(plan), steps if timed and steps else 1)
        if isinstance(plan, TilePlan):
            parts.append(
                Modality(name, plan, np.union1d(plan.q_bounds, clock), np.union1d(plan.k_bounds, clock))
            )
        else:
            parts.append(Modality(name, None, clock, clock))
    seen = {name: {name, *others} for name, others in sees}
    pieces, tile_q = [], 0
    for a in parts:
        tile_k = 0
        for b in parts:
            if b.name in seen[a.name]:
                e = _block(a, b, windows.get((a.name, b.name)), steps, heads)
                pieces.append(
                    e._replace(tile_q=e.tile_q + tile_q, begin=e.begin + tile_k, end=e.end + tile_k)
                )
            tile_k += len(b.k_bounds) - 1
        tile_q += len(a.q_bounds) - 1
    parameters = [("modalities", plans), ("sees", sees), ("local", local), ("steps", steps)]
    rows = sorted_runs(joined(pieces), heads, tile_q)
    q_lengths = np.concatenate([np.diff(m.q_bounds) for m in parts])
    k_lengths = np.concatenate([np.diff(m.k_bounds) for m in parts])
    return make_plan(OP, parameters, q_lengths, k_lengths, rows, _order(plans))


def _block(a: Modality, b: Modality, window: int | None, steps: int | None, heads: int) -> Entries:
    """What a's queries see of b's keys, tiles numbered from the first of each."""
    if a is b and a.plan is not None:
        return for_heads(entries_over(a.plan, a.q_bounds, a.k_bounds), a.plan.heads, heads)
    first = np.zeros(len(a.q_bounds) - 1, np.int64)
    end = first + len(b.k_bounds) - 1
    if window is not None and steps is not None:
        of_q, of_k = (_step(bounds, steps) for bounds in (a.q_bounds, b.k_bounds))
        first = np.searchsorted(of_k, of_q - window)
        end = np.searchsorted(of_k, of_q + window, side="right")
    check_tiles(OP, int((end - first).sum()) * heads, FEWER)
    zeros = np.zeros(len(first), np.int64)
    return for_heads(Entries(zeros, np.arange(len(first)), first, end, zeros + FULL), 1, heads)


def _clock(length: int, steps: int) -> np.ndarray:
    return np.arange(steps + 1, dtype=np.int64) * length // steps


def _step(bounds: np.ndarray, steps: int) -> np.ndarray:
    """The step of time of every tile."""
    return np.searchsorted(_clock(int(bounds[-1]), steps), bounds[:-1], side="right") - 1


def _order(plans: tuple[tuple[str, int | TilePlan], ...]) -> np.ndarray | None:
    if all(isinstance(p, int) or p.places() is None for _, p in plans):
        return None
    orders, first = [], 0
    for _, plan in plans:
        given = None if isinstance(plan, int) else plan.places()
        orders.append(first + (np.arange(_length(plan)) if given is None else given))
        first += _length(plan)
    return np.concatenate(orders)


def _length(plan: int | TilePlan) -> int:
    return plan if isinstance(plan, int) else plan.q_length


def _modalities(given: Any) -> tuple[tuple[str, ...], dict[str, int | TilePlan]]:
    try:
        plans = dict(given)
    except (TypeError, ValueError):
        plans = {}
    if not plans or not all(isinstance(name, str) for name in plans):
        raise ValueError(
            f"{OP}: modalities is {given!r}; accepted: names with a number of tokens or a TilePlan each"
        )
    heads = set()
    for name, plan in plans.items():
        if not isinstance(plan, TilePlan):
            plans[name] = count(OP, f"the length of {name!r}", plan)
        elif plan.q_length != plan.k_length:
            raise ValueError(f"{OP}: {name!r} is {plan!r}; accepted: a plan with as many keys as queries")
        elif plan.heads > 1:
            heads.add(plan.heads)
    if len(heads) > 1:
        raise ValueError(
            f"{OP}: modalities are for {sorted(heads)} heads; accepted: 1 or the same number"
        )
    return tuple(plans), plans


def _sees(given: Any, names: tuple[str, ...]) -> Pairs:
    """Every modality with the others that it sees."""
    try:
        chosen = {
            a: tuple(others) for a, others in dict(given or {}).items() if not isinstance(others, str)
        }
    except (TypeError, ValueError):
        chosen = {"": ()}
    named = {*chosen, *(b for others in chosen.values() for b in others)}
    if not named <= set(names) or len(chosen) != len(given or {}):
        raise ValueError(
            f"{OP}: sees is {given!r}; accepted: by name a list of names, names being {', '.join(names)}"
        )
    return tuple((a, tuple(b for b in names if b != a and b in chosen.get(a, names))) for a in names)


def _local(
    given: Any, names: tuple[str, ...], plans: Mapping[str, int | TilePlan], sees: Pairs
) -> Windows:
    """Each pair once, as its names come up in `modalities`, with its window."""
    pairs: Any = given or ()
    if isinstance(given, Mapping):
        pairs = [(*key, w) if isinstance(key, tuple) else (key, w) for key, w in given.items()]
    triples = pairs if isinstance(pairs, Sequence) else [pairs]
    seen, found = dict(sees), {}
    for triple in triples:
        fits = isinstance(triple, Sequence) and len(triple) == 3
        if not fits or not all(name in names for name in triple[:2]):
            raise ValueError(
                f"{OP}: local is {given!r}; accepted: by pair of names a window in steps, names being"
                f" {', '.join(names)}"
            )
        a, b = sorted(triple[:2], key=names.index)
        if a == b and isinstance(plans[a], TilePlan):
            raise ValueError(f"{OP}: local has {(a, a)} and {a!r} has a plan; accepted: one or the other")
        if a != b and b not in seen[a] and a not in seen[b]:
            raise ValueError(
                f"{OP}: local has {(a, b)}, which do not see each other; accepted: pairs that do"
            )
        if (a, b) in found:
            raise ValueError(f"{OP}: local has {(a, b)} twice; accepted: a pair once, in either order")
        found[a, b] = count(OP, f"the window of {(a, b)}", triple[2], 0)
    return tuple(
        (*pair, found[pair]) for pair in sorted(found, key=lambda p: [names.index(n) for n in p])
    )
