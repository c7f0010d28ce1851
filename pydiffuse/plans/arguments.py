"""Checks of the constructors' arguments: each error names the plan, the argument, what came, what fits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from pydiffuse._core.modes import compiling, is_tensor

MAX_TILES = 2**27
"""Kept tiles of a plan: some GB of memory while it is made."""


def count(op: str, argument: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An integer of at least `least`, and at most `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        upto = "or more" if most is None else f"to {most}"
        raise ValueError(f"{op}: {argument} is {value!r}; accepted: an int, {least} {upto}")
    return number


def check_eager(op: str) -> None:
    """Dynamo would trace how a plan is made, and keep nothing of it."""
    if compiling():
        raise RuntimeError(f"{op}: make the plan outside of the compiled function")


def check_tokens(op: str, tokens: int) -> None:
    """Before arrays of that length are made. Kernels number tokens in 32 bits."""
    if tokens >= 2**31:
        raise ValueError(f"{op}: {tokens} tokens; accepted: below 2^31")


def check_tiles(op: str, tiles: int, remedy: str) -> None:
    """Before arrays of that length are made."""
    if tiles > MAX_TILES:
        raise ValueError(f"{op}: the plan would keep {tiles} tiles; accepted: up to 2^27; {remedy}")


def counts(
    op: str, argument: str, values: Any, least: int = 1, sizes: Sequence[int] = ()
) -> tuple[int, ...]:
    """Integers of at least `least`; sizes: how many of them there may be, any number but none by default."""
    accepted = f"ints, each {least} or more"
    if sizes:
        accepted = f"{' or '.join(map(str, sizes))} {accepted}"
    given: tuple[Any, ...] = ()
    if (isinstance(values, Sequence | np.ndarray) or is_tensor(values)) and not isinstance(values, str):
        given = tuple(values)
    try:
        numbers = tuple(operator.index(v) for v in given)
    except TypeError:
        numbers = ()
    booleans = any(isinstance(v, bool) for v in given)
    if not numbers or booleans or min(numbers) < least or (sizes and len(numbers) not in sizes):
        raise ValueError(f"{op}: {argument} is {values!r}; accepted: {accepted}")
    return numbers
