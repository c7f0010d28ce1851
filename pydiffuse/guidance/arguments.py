"""The arguments of the guidance functions, checked."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from pydiffuse._core.checks import describe
from pydiffuse._core.rules import COMMON, MAX_PREDS, UPDATE, Rule

Scalar = float | Tensor


def parameter_name(row: Rule, i: int) -> str:
    """The name of the i-th parameter of a call, for messages."""
    names = (*UPDATE, *COMMON, *row.parameters)
    return names[i] if i < len(names) else f"{row.weights}[{i - len(names)}]"


def number_of(op: str, row: Rule, i: int, value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(
            f"{op}: {parameter_name(row, i)} is {describe(value)}; accepted: a number or a (B,) tensor"
        )
    return float(value)


def sequence(op: str, argument: str, value: Any, least: int = 1) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a list of tensors [B, ...]")
    if not least <= len(value) <= MAX_PREDS:
        raise ValueError(f"{op}: {argument} holds {len(value)} tensors; accepted: {least} to {MAX_PREDS}")
    return list(value)


def weights_of(op: str, weights: Any, count: int) -> tuple[Scalar, ...]:
    """One weight for each of `count` predictions, from a sequence or the columns of (B, count)."""
    if isinstance(weights, Tensor) and weights.dim() == 2:
        weights = weights.unbind(1)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(weights) != count:
        given = f"{len(weights)} values" if isinstance(weights, Sequence) else describe(weights)
        raise ValueError(
            f"{op}: weights is {given}; accepted: {count} numbers or (B,) tensors, or (B, {count})"
        )
    return tuple(weights)
