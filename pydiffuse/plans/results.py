"""What a search for plans found: a choice for every layer, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeVar

from pydiffuse.plans.arguments import count
from pydiffuse.plans.files import DAMAGED, from_json, read, to_json, write
from pydiffuse.plans.plan import TilePlan, read_plan

FORMAT, VERSION = "pydiffuse.search", 1
T = TypeVar("T")


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer."""

    plan: TilePlan
    error: float
    """The metric of its output against dense attention, of the worst head with a plan for each; 0 for the
    dense plan, which is not computed."""
    seconds: float | None = None
    """A measured call of tile_attention with the plan; None where nothing was measured."""
    dense_seconds: float | None = None
    """The same with the dense plan."""
    rejected: tuple[tuple[str, float], ...] = ()
    """The plans that were tried before, with their errors, as text; not with a plan per head."""

    @property
    def density(self) -> float:
        return self.plan.density

    @property
    def speedup(self) -> float:
        """Over dense: as measured, or at best, by the share of pairs that are computed."""
        if self.seconds and self.dense_seconds:
            return self.dense_seconds / self.seconds
        return 1 / share(self.plan) if self.plan.computed.any() else math.inf


@dataclass(frozen=True)
class SearchResult:
    """The choices, layer by layer. As text it is a table."""

    threshold: float
    layers: tuple[LayerChoice, ...] = field(repr=False)

    @property
    def plans(self) -> list[TilePlan]:
        return [layer.plan for layer in self.layers]

    @property
    def density(self) -> float:
        """The mean over layers."""
        return sum(layer.density for layer in self.layers) / len(self.layers)

    @property
    def speedup(self) -> float:
        """Of all layers together, where each takes as long as the others when it is dense, or as measured."""
        costs = [(layer.seconds, layer.dense_seconds) for layer in self.layers]
        if all(a and b for a, b in costs):
            return sum(b or 0 for _, b in costs) / sum(a or 0 for a, _ in costs)
        return len(self.layers) / sum(1 / layer.speedup for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "error", "density", "speed-up", "ms", "plan")
        rows = [
            (
                str(i),
                f"{layer.error:.2e}",
                f"{layer.density:.1%}",
                f"{layer.speedup:.2f}x",
                "" if layer.seconds is None else f"{layer.seconds * 1e3:.2f}",
                short(layer.plan),
            )
            for i, layer in enumerate(self.layers)
        ]
        worst = max(layer.error for layer in self.layers)
        rows.append(("all", f"{worst:.2e}", f"{self.density:.1%}", f"{self.speedup:.2f}x", "", ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = (
            "  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False))
            for row in (head, *rows)
        )
        return "\n".join(
            f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, (head, *rows), strict=True)
        )

    def save(self, path: str | PathLike[str]) -> None:
        """As JSON, each plan once. Errors that are not finite are null, and infinite when loaded."""
        numbers = {plan: i for i, plan in enumerate(dict.fromkeys(self.plans))}
        layers = [
            {
                "plan": numbers[layer.plan],
                "error": _or_null(layer.error),
                "seconds": layer.seconds,
                "dense_seconds": layer.dense_seconds,
                "rejected": [[name, _or_null(error)] for name, error in layer.rejected],
            }
            for layer in self.layers
        ]
        content = {
            "threshold": _or_null(self.threshold),
            "plans": [to_json(p) for p in numbers],
            "layers": layers,
        }
        write(path, FORMAT, VERSION, content)

    @staticmethod
    def load(path: str | PathLike[str]) -> SearchResult:
        """What `save` wrote. ValueError where the file is something else, or damaged."""
        content = read(path, FORMAT, VERSION)
        try:
            plans = [from_json(given, read_plan) for given in content["plans"]]
            layers = [
                LayerChoice(
                    plans[count("a layer", "plan", given["plan"], 0, len(plans) - 1)],
                    _number("error", given["error"], math.inf),
                    _number("seconds", given["seconds"], None, 0.0),
                    _number("dense_seconds", given["dense_seconds"], None, 0.0),
                    tuple(
                        (str(name), _number("error", error, math.inf))
                        for name, error in given["rejected"]
                    ),
                )
                for given in content["layers"]
            ]
            if not layers:
                raise ValueError("layers is empty")
            return SearchResult(_number("threshold", content["threshold"], math.inf, 0.0), tuple(layers))
        except DAMAGED as error:
            raise ValueError(f"SearchResult.load: {path} holds no result: {error}") from error


def _or_null(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _number(name: str, value: Any, null: T, least: float = -math.inf) -> float | T:
    """null: what null stands for."""
    if value is None:
        return null
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < least:
        upto = "" if least == -math.inf else f", {least:g} or more,"
        raise ValueError(f"{name} is {value!r}; accepted: a finite number{upto} or null")
    return float(value)


def share(plan: TilePlan) -> float:
    """Of the query-key pairs, those in the plan's tiles."""
    return float(plan.computed.mean()) / (plan.q_length * plan.k_length)


def short(plan: TilePlan) -> str:
    """By name and parameters, as it was called; plans for heads by how many of them there are."""
    given = dict(plan.parameters)
    if plan.name == "per_head":
        names = [short(p) for p in given["plans"]]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{plan.name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
