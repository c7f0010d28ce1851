"""Which layer of a model an attention belongs to, and what it attends to.

Both are read from the calls of modules that are on the stack when the attention is computed: neither
depends on how often it was called before, so early exits, skipped blocks and recomputation change nothing.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

CALL = nn.Module._call_impl.__code__
SOURCES = re.compile(r"encoder_(hidden|x)|context|memory|^(key|kv|source|cond|conditions?)(_|$)")
"""Names of the argument that keys and values are made from where it is not the queries' own."""
NO_SOURCE = re.compile(r"mask|length|emb|ids|pos")


class Attention(NamedTuple):
    """An attention that is being computed: the modules it is within, the innermost first."""

    modules: tuple[nn.Module, ...]
    hidden: Tensor | None
    """What the innermost one was called with,"""
    source: Tensor | None
    """and the other sequence it was given."""

    @property
    def layer(self) -> nn.Module | None:
        return self.modules[0] if self.modules else None

    def is_cross(self, queries: int) -> bool:
        """Keys and values come from elsewhere. Joint attention has the other sequence among its queries."""
        if self.source is None or self.source is self.hidden or self.hidden is None:
            return False
        of_hidden = self.hidden.shape[1:2] if self.hidden.dim() == 3 else self.hidden.shape[2:]
        return queries <= math.prod(of_hidden)


def current_attention() -> Attention:
    """By the caller's stack."""
    modules: list[nn.Module] = []
    given: tuple[Tensor | None, Tensor | None] = None, None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL:
            call = frame.f_locals
            if not modules:
                given = _sequences(call["self"], call["args"], call["kwargs"])
            modules.append(call["self"])
        frame = frame.f_back
    return Attention(tuple(modules), *given)


def _sequences(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """The first sequence among a call's arguments, and the one of another source."""
    hidden, source = None, None
    for name, value in (*zip(_names(type(module).forward), args, strict=False), *kwargs.items()):
        first = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(first, Tensor) or first.dim() < 3 or not first.is_floating_point():
            continue
        if hidden is None and not SOURCES.search(name):
            hidden = first
        elif source is None and SOURCES.search(name) and not NO_SOURCE.search(name):
            source = first
    return hidden, source


@lru_cache(maxsize=1024)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


class Model:
    """The self-attentions of one model, numbered as it calls them.

    Layers with one path but for its numbers (`blocks.3.attn1`, `blocks.4.attn1`) play one role. When the
    first of them is called, all are known; those that are registered before it and were not called have been
    skipped, and have their numbers, too.
    """

    def __init__(self, root: nn.Module, first: int) -> None:
        self.first = first
        self.place: dict[nn.Module, int] = {}  # where a module is registered
        self.role: dict[nn.Module, Any] = {}
        for i, (path, module) in enumerate(root.named_modules()):
            cross = getattr(module, "is_cross_attention", None)
            self.place[module] = i
            self.role[module] = (re.sub(r"\d+", "*", path), type(module), cross)
        self.numbers: dict[nn.Module, int] = {}
        self.others: set[Any] = set()  # roles of attention that plans are not for
        self.known: list[nn.Module] = []  # layers of the roles that were called
        self.guessed = -1  # up to where numbers were given to layers that were skipped

    def number(self, layer: nn.Module) -> int | None:
        """None where it cannot be known."""
        if layer not in self.numbers:
            if layer not in self.known:
                self.known += [m for m in self.role if self.role[m] == self.role[layer]]
            here = self.place[layer]
            skipped = [m for m in self.known if m not in self.numbers and self.place[m] < here]
            skipped.sort(key=self.place.__getitem__)
            for module in (*skipped, layer):
                if self.place[module] < self.guessed:
                    return None
                self.numbers[module] = self.first + len(self.numbers)
            if skipped:
                self.guessed = here
        return self.numbers[layer]

    def unseen(self) -> Iterator[nn.Module]:
        """Attention of roles that were not called."""
        seen = self.others | {self.role[m] for m in self.known}
        return (m for m in self.role if hasattr(m, "processor") and self.role[m] not in seen)


class Layers:
    """All models that a list of plans came to serve."""

    def __init__(self, plans: int) -> None:
        self.plans = plans
        self.models: list[Model] = []

    def model(self, attention: Attention) -> Model:
        for model in self.models:
            if attention.layer in model.place:
                return model
        # Layers that no model holds follow each other; a second model after a whole one begins anew.
        known = sum(len(model.known) for model in self.models)
        self.models.append(Model(attention.modules[-1], known if known < self.plans else 0))
        return self.models[-1]

    def number(self, attention: Attention) -> int:
        """ValueError where there are more layers than plans, or it cannot be known which one it is."""
        layer = attention.layer
        if layer is None:
            raise ValueError("an attention is in no module; accepted: one plan for all, not a list")
        model = self.model(attention)
        number = model.number(layer)
        last = model is self.models[-1]
        if number is None or not (last or layer in model.numbers):
            raise ValueError(
                f"which plan is for {type(layer).__name__} cannot be known, as layers before it were skipped;"
                " accepted: a first call of the model that skips none"
            )
        many = model.first + len(model.known)
        if many > self.plans:
            raise ValueError(
                f"the model has {many} self-attentions or more and there are {self.plans} plans; accepted: a"
                " plan for each layer"
            )
        return number

    def missing(self) -> int | None:
        """How many layers there are, where that is known and not the number of plans."""
        if not self.models or any(True for model in self.models for _ in model.unseen()):
            return None
        last = self.models[-1]
        many = last.first + len(last.known)
        return None if many == self.plans else many
