"""Where loaded modules hold functions, so that others can be put there, and taken away again.

A module holds a function by a name, or in a closure of one of its functions: decorators keep there what they
chose at import.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

_OF = "_pydiffuse_stands_for"


class Place(NamedTuple):
    """A name of a module, or a cell of a closure that the module's function of that name has."""

    module: ModuleType
    name: str
    cell: CellType | None

    def put(self, function: Any) -> None:
        if self.cell is None:
            setattr(self.module, self.name, function)
        else:
            self.cell.cell_contents = function

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"


def stand_in(ours: Callable[..., Any], original: Any, owner: str) -> Callable[..., Any]:
    """A function that calls `ours` and knows what it stands for, and which integration put it there."""

    @functools.wraps(ours)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    setattr(function, _OF, (owner, original))
    return function


def stands_for(function: Any, owner: str) -> tuple[Any, ...]:
    """(what `function` stands for,), or () if it is no stand-in of this integration."""
    mark = getattr(function, _OF, ()) if type(function) is FunctionType else ()
    return mark[1:] if mark and mark[0] == owner else ()


def modules(prefix: str = "") -> list[ModuleType]:
    """The loaded modules: of a package, or all."""
    inside = prefix + "."
    return [
        m
        for name, m in list(sys.modules.items())
        if isinstance(m, ModuleType) and (not prefix or name == prefix or name.startswith(inside))
    ]


def places(within: list[ModuleType]) -> Iterator[tuple[Place, Any]]:
    """Every place with what is there."""
    for module in within:
        for name, value in list(vars(module).items()):
            yield Place(module, name, None), value
            if type(value) is FunctionType and not hasattr(value, _OF):
                for cell in value.__closure__ or ():
                    try:
                        yield Place(module, name, cell), cell.cell_contents
                    except ValueError:  # not filled yet
                        continue
