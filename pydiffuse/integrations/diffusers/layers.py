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
NO_SOURCES = re.compile(r"mask|length|emb|ids|pos|rot|freq|bias|scale|shift|gate|mod|residual")


class Attention(NamedTuple):
    """An attention that is being computed: the modules it is within, the innermost first."""

    modules: tuple[nn.Module, ...]
    hidden: Tensor | None
    """The sequence that the innermost one was called with,"""
    others: tuple[tuple[bool, Tensor], ...]
    """and the others, and whether their names say that they are sources."""

    @property
    def layer(self) -> nn.Module | None:
        return self.modules[0] if self.modules else None

    def is_cross(self, queries: int, keys: int) -> bool:
        """Keys and values come from elsewhere. Joint attention has the other sequence among its queries; in a
        module that computes self-attention, too, the other one is told by its length."""
        if self.hidden is None or queries > _tokens(self.hidden):
            return False
        alone = hasattr(self.layer, "processor") or keys != _tokens(self.hidden)
        return any(_tokens(t) == keys or (named and alone) for named, t in self.others)


def current_attention() -> Attention:
    """By the caller's stack."""
    modules: list[nn.Module] = []
    hidden: Tensor | None = None
    others: list[tuple[bool, Tensor]] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL:
            call = frame.f_locals
            modules.append(call["self"])
            # What only wraps the call, and has queries and keys already, says nothing of their sources.
            if hidden is None and not (len(modules) > 1 and hasattr(modules[-2], "processor")):
                hidden, others = _sequences(call["self"], call["args"], call["kwargs"])
        frame = frame.f_back
    return Attention(tuple(modules), hidden, tuple(others))


def _sequences(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor | None, list[tuple[bool, Tensor]]]:
    """The first sequence among a call's arguments, and the others."""
    hidden: Tensor | None = None
    others: list[tuple[bool, Tensor]] = []
    for name, value in (*zip(_names(type(module).forward), args, strict=False), *kwargs.items()):
        first = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(first, Tensor) or first.dim() < 3 or not first.is_floating_point():
            continue
        named = SOURCES.search(name) is not None
        if hidden is None and not named:
            hidden = first
        elif first is not hidden and first.dim() == 3 and not NO_SOURCES.search(name):
            others.append((named, first))
    if hidden is not None and hidden.dim() == 4 and not others and not hasattr(module, "processor"):
        return None, []
    return hidden, others


def _tokens(sequence: Tensor) -> int:
    """Of [B, S, C], or of [B, C, ...] as images have it."""
    return sequence.shape[1] if sequence.dim() == 3 else math.prod(sequence.shape[2:])


@lru_cache(maxsize=1024)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


class Model:
    """The self-attentions of one model, numbered as it calls them.

    Layers with one path but for its numbers (`blocks.3.attn1`, `blocks.4.attn1`) play one role. When the
    first of them is called, all are known; those that are registered before it and were not called have been
    skipped, and have their numbers, too.
    """

    def __init__(self, root: nn.Module) -> None:
        self.first = 0
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
        self.served: list[Model] = []

    def model(self, attention: Attention) -> Model:
        for model in self.models:
            if attention.layer in model.place:
                return model
        self.models.append(Model(attention.modules[-1]))
        return self.models[-1]

    def number(self, attention: Attention) -> int:
        """ValueError where there are more layers than plans, or it cannot be known which one it is."""
        layer = attention.layer
        if layer is None:
            raise ValueError("an attention is in no module; accepted: one plan for all, not a list")
        model = self.model(attention)
        if model not in self.served:
            # Layers that no model holds follow each other; a second model after a whole one begins anew.
            known = sum(len(m.known) for m in self.served)
            model.first = known if known < self.plans else 0
            self.served.append(model)
        known, after = len(model.known), self.served[self.served.index(model) + 1 :]
        number = model.number(layer)
        if number is None or (len(model.known) > known and after and after[0].first):
            raise ValueError(
                f"which plan is for {type(layer).__name__} cannot be known, as layers before it were skipped;"
                " accepted: a first call of the model that skips none"
            )
        if self._end(model) > self.plans:
            raise ValueError(
                f"the model has {self._end(model)} self-attentions or more and there are {self.plans} plans;"
                " accepted: a plan for each layer"
            )
        return number

    def missing(self) -> int | None:
        """How many layers there are, where that is known and not the number of plans."""
        if not self.served or any(True for model in self.served for _ in model.unseen()):
            return None
        many = self._end(self.served[-1])
        return None if many == self.plans else many

    def _end(self, model: Model) -> int:
        return model.first + len(model.known)
