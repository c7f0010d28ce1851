"""Which plan for which layer: the sparsest whose error stays below a threshold, on real q, k, v.

    def layers():  # one at a time in memory
        for block in model.blocks:
            yield recorded_qkv(block)  # (q, k, v), each [B, H, S, D]

    found = plans.search(layers, [plans.frames(24, 3600, r) for r in (3, 4, 6, 8, 12)], threshold=0.05)
    print(found)
    found.save("plans.json")

`found.plans` has a plan for every layer.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffuse._core.checks import check_flag, describe
from pydiffuse.attention import tile_attention
from pydiffuse.attention.arguments import check_attention
from pydiffuse.plans.combine import keeps_all
from pydiffuse.plans.combine import per_head as one_for_each_head
from pydiffuse.plans.patterns import dense
from pydiffuse.plans.plan import TilePlan
from pydiffuse.plans.results import LayerChoice, SearchResult, share, short

OP = "search"
RUNS = 3
"""Measured calls, after one that warms up; their median counts."""

END = object()
"""What comes after the last layer."""

Layer = tuple[Tensor, Tensor, Tensor]
Metric = Callable[[Tensor, Tensor], Any]


def search(
    layers: Iterable[Layer] | Callable[[], Iterable[Layer]],
    candidates: Sequence[TilePlan],
    threshold: float,
    *,
    per_head: bool = False,
    metric: Metric | None = None,
    measure: bool = False,
    scale: float | Tensor | None = None,
    progress: Callable[[int, LayerChoice], None] | None = None,
) -> SearchResult:
    """For every layer the cheapest candidate whose output is within `threshold` of dense attention's; the
    dense plan where none is (Efficient-vDiT, arXiv 2502.06155, layer-wise search).

    layers: (q, k, v) of every layer as tile_attention takes them, or a function that gives an iterator of
    them, of which one is held at a time. Give what a model really computes: B may be samples and time steps.
    candidates: plans for these lengths, in any order. threshold: of the error.

    per_head: a candidate for each head by itself, joined by `per_head`. metric: (out, dense_out) -> a number,
    of float32 tensors [B, H, S, D], H = 1 with per_head; ||out - dense|| / ||dense|| by default.
    measure: the cheapest is the fastest of candidates and dense, in a measured call of tile_attention with
    the layer's own dtype, and not the one with the fewest pairs. scale: as in tile_attention. progress: called
    as (layer's number, its choice).

    Errors are computed in float32: dense attention by torch's scaled_dot_product_attention, candidates by
    tile_attention, cheapest first until one passes.
    """
    check_flag(OP, "per_head", per_head)
    check_flag(OP, "measure", measure)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise ValueError(f"{OP}: threshold is {threshold!r}; accepted: a number, 0 or more")
    metric = relative_error if metric is None else metric
    one = _Search(_checked(candidates, per_head), float(threshold), per_head, metric, measure, scale)
    choices: list[LayerChoice] = []
    given = iter(layers() if callable(layers) else layers)
    with torch.no_grad():
        for i in itertools.count():
            layer: Any = next(given, END)
            if layer is END:
                break
            choices.append(one.choose(i, layer))
            del layer  # before the next one comes
            if progress is not None:
                progress(i, choices[-1])
    if not choices:
        raise ValueError(f"{OP}: layers is empty; accepted: (q, k, v) of one layer or more")
    return SearchResult(float(threshold), tuple(choices))


def relative_error(out: Tensor, dense_out: Tensor) -> float:
    """||out - dense_out|| / ||dense_out||."""
    norm = torch.linalg.vector_norm(dense_out.double()).item()
    error = torch.linalg.vector_norm(out.double() - dense_out.double()).item()
    return error / norm if norm else (math.inf if error else 0.0)


class Priced(NamedTuple):
    """A plan and what it costs: seconds, or its share of pairs."""

    plan: TilePlan
    cost: float


class Prices(NamedTuple):
    candidates: list[Priced]
    """What costs less than dense, cheapest first."""
    dense: Priced


@dataclass
class _Search:
    """The arguments of a search, and the costs of plans for the shapes that came."""

    candidates: tuple[TilePlan, ...]
    threshold: float
    per_head: bool
    metric: Metric
    measure: bool
    scale: float | Tensor | None
    known: dict[Any, Prices] = field(default_factory=dict)

    def choose(self, number: int, layer: Layer) -> LayerChoice:
        op = f"{OP}: layer {number}"
        if not isinstance(layer, Sequence) or len(layer) != 3:
            raise TypeError(f"{op} is {describe(layer)}; accepted: (q, k, v)")
        for plan in self.candidates:
            check_attention(op, *layer, plan)
        if not layer[0].numel():
            raise ValueError(f"{op} has q {describe(layer[0])}; accepted: one element or more")
        prices = self._prices(layer)
        q, k, v = (t.float() for t in layer)
        exact = self._dense(q, k, v)
        if not exact.isfinite().all():
            raise ValueError(f"{op} has a dense output that is not finite; accepted: finite ones")
        if not self.per_head:
            return self._choose(prices, (q, k, v), exact)
        choice = self._choose_by_head(prices, (q, k, v), exact)
        if not self.measure:
            return choice
        whole = prices.dense
        # What heads take together is not known before.
        seconds = whole.cost if choice.plan is whole.plan else self._cost(choice.plan, layer)
        if seconds > whole.cost:
            return self._choice(prices, whole.plan, 0.0, whole.cost, [])
        return replace(choice, seconds=seconds)

    def _choose(self, prices: Prices, layer: Layer, exact: Tensor) -> LayerChoice:
        rejected: list[tuple[str, float]] = []
        for plan, cost in prices.candidates:
            error = float(self.metric(self._tiles(layer, plan), exact))
            if error <= self.threshold:
                return self._choice(prices, plan, error, cost, rejected)
            rejected.append((short(plan), error))
        return self._choice(prices, prices.dense.plan, 0.0, prices.dense.cost, rejected)

    def _choose_by_head(self, prices: Prices, layer: Layer, exact: Tensor) -> LayerChoice:
        """Heads of a layer share one order of tokens: chosen is the order whose heads cost least together."""
        heads = exact.shape[1]
        # By order and head the first candidate, the cheapest, that passes, and its error.
        orders: dict[Any, dict[int, tuple[Priced, float]]] = {}
        for priced in prices.candidates:
            order = priced.plan.places()
            found = orders.setdefault(None if order is None else order.tobytes(), {})
            if len(found) == heads:
                continue
            out = self._tiles(layer, priced.plan)
            for h in set(range(heads)) - set(found):
                error = float(self.metric(out[:, h : h + 1], exact[:, h : h + 1]))
                if error <= self.threshold:
                    found[h] = priced, error
        last = prices.dense, 0.0
        options = [[found.get(h, last) for h in range(heads)] for found in (*orders.values(), {})]
        costs = [sum(priced.cost for priced, _ in option) / heads for option in options]
        cheapest = min(range(len(options)), key=costs.__getitem__)
        plan = one_for_each_head([priced.plan for priced, _ in options[cheapest]])
        error = max(error for _, error in options[cheapest])
        return self._choice(prices, plan, error, costs[cheapest], [])

    def _choice(
        self, prices: Prices, plan: TilePlan, error: float, cost: float, rejected: list[tuple[str, float]]
    ) -> LayerChoice:
        if not self.measure:
            return LayerChoice(plan, error, rejected=tuple(rejected))
        return LayerChoice(plan, error, cost, prices.dense.cost, tuple(rejected))

    def _prices(self, layer: Layer) -> Prices:
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in layer)
        if shapes not in self.known:
            whole = dense(layer[0].shape[2], layer[1].shape[2])
            last = Priced(whole, self._cost(whole, layer))
            priced = [Priced(p, self._cost(p, layer)) for p in self.candidates if not keeps_all(p)]
            cheaper = sorted((p for p in priced if p.cost <= last.cost), key=lambda p: p.cost)
            self.known[shapes] = Prices(cheaper, last)
        return self.known[shapes]

    def _cost(self, plan: TilePlan, layer: Layer) -> float:
        if not self.measure:
            return share(plan)
        times = []
        for _ in range(RUNS + 1):
            _wait(layer[0])
            start = time.perf_counter()
            self._tiles(layer, plan)
            _wait(layer[0])
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def _tiles(self, layer: Layer, plan: TilePlan) -> Tensor:
        out = tile_attention(*layer, plan, scale=self.scale)
        assert isinstance(out, Tensor)
        return out

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.scale
        if isinstance(scale, Tensor):
            q, scale = q * scale.to(q).reshape(-1, 1, 1), 1.0
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


def _checked(candidates: Any, per_head: bool) -> tuple[TilePlan, ...]:
    """Each once."""
    given = tuple(candidates) if isinstance(candidates, Sequence) else ()
    if not given:
        raise ValueError(f"{OP}: candidates is {candidates!r}; accepted: a list of one TilePlan or more")
    for plan in given:
        if not isinstance(plan, TilePlan):
            raise TypeError(f"{OP}: candidates hold {describe(plan)}; accepted: TilePlans")
        if per_head and plan.heads > 1:
            raise ValueError(f"{OP}: per_head and a candidate is {plan!r}; accepted: plans for one head")
    return tuple(dict.fromkeys(given))


def _wait(t: Tensor) -> None:
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
