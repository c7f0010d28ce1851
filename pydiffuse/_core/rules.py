"""The guidance rules by name: their codes in the kernels, their parameters and their predictions.

A call's parameters are one vector: the update's (a, b, h, s, p, q), then `original` and `rescale`,
then the rule's own, then a weight for each prediction where the rule takes weights. Each is one
number for the batch or a value per sample. csrc/guidance.h has the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

UPDATE = ("a", "b", "h", "s", "p", "q")
COMMON = ("original", "rescale")
MAX_PREDS = 16
EMIT_UPDATE, EMIT_PREDICT, EMIT_STATE = 1, 2, 4
"""What a call returns, bit by bit: x', the data prediction, APG's state."""


@dataclass(frozen=True)
class Rule:
    name: str
    code: int
    preds: tuple[str, ...]
    """The predictions in order; one that ends in "..." stands for any number of them."""
    parameters: tuple[str, ...] = ()
    weights: str = ""
    """The parameter that holds a weight for each of the "..." predictions, if any."""
    optional: int = 0
    """How many of the last predictions may be left out."""
    common: bool = True
    """Takes `original` and `rescale`."""
    defaults: tuple[tuple[str, float], ...] = ()

    @property
    def curved(self) -> bool:
        """The coefficients depend on the predictions, by their Gram matrix."""
        return self.name not in ("linear", "cfg", "compose")

    counts: range = field(init=False)
    """How many predictions it takes."""

    def __post_init__(self) -> None:
        many = any(name.endswith("...") for name in self.preds)
        least = len(self.preds) - self.optional - (many and len(self.preds) > 1)
        most = MAX_PREDS if many else len(self.preds)
        object.__setattr__(self, "counts", range(least, most + 1))


RULES = {
    rule.name: rule
    for rule in (
        Rule("linear", 0, ("preds...",), weights="weights"),
        Rule("cfg", 1, ("cond", "uncond"), ("scale",)),
        Rule("tcfg", 2, ("cond", "uncond"), ("scale",)),
        Rule("cfg_zero", 3, ("cond", "uncond"), ("scale",)),
        Rule(
            "apg",
            4,
            ("cond", "uncond", "state"),
            ("scale", "eta", "norm_threshold", "momentum"),
            optional=1,
            defaults=(("eta", 1.0), ("norm_threshold", 0.0), ("momentum", 0.0)),
        ),
        Rule("magnitude_aware", 5, ("cond", "uncond"), ("scale", "alpha"), defaults=(("alpha", 8.0),)),
        Rule("perp_neg", 6, ("cond", "negatives...", "uncond"), ("scale",), weights="weights"),
        Rule("compose", 7, ("conds...", "uncond"), weights="weights"),
        Rule("slerp", 8, ("a", "b"), ("weight",), common=False),
        Rule("rescale", 9, ("cond", "guided"), common=False),
    )
}


def own_values(
    row: Rule,
    preds: int,
    parameters: dict[str, Any],
    weights_of: Callable[[str, Any, int], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """A rule's own parameters in the kernels' order, from keywords. weights_of: a weight for each of a
    number of predictions."""
    defaults = dict(row.defaults)
    accepted = [*row.parameters, *([row.weights] if row.weights else [])]
    for name in parameters:
        if name not in accepted:
            raise TypeError(f"guide: rule {row.name!r} takes no {name!r}; accepted: {accepted}")
    values: list[Any] = []
    for name in row.parameters:
        value = parameters.get(name, defaults.get(name))
        if value is None and name == "momentum":
            value = 0.0
        if value is None:
            raise TypeError(f"guide: rule {row.name!r} needs {name}=; accepted: {accepted}")
        values.append(value)
    if row.weights:
        if row.weights not in parameters:
            raise TypeError(f"guide: rule {row.name!r} needs {row.weights}=; accepted: {accepted}")
        count = preds - sum(not name.endswith("...") for name in row.preds)
        values += weights_of("guide", parameters[row.weights], count)
    return tuple(values)
