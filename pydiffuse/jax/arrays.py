"""Arrays and numbers as the handlers take them, and the words for those that they do not."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pydiffuse._core.rules import MAX_PREDS
from pydiffuse.jax.calls import Like

Scalar: TypeAlias = "float | Array"
DTYPES = ("float32", "bfloat16", "float16")


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def describe(value: Any) -> str:
    if is_array(value):
        return f"a {value.dtype} array {tuple(value.shape)}"
    plain = isinstance(value, bool | int | float | str | None)
    return repr(value) if plain else f"a {type(value).__name__}"


def wide() -> Any:
    """float64 where JAX has it (jax_enable_x64), else float32."""
    return jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32


def like(a: Any, dtype: Any = None) -> Like:
    return Like(a.shape, a.dtype if dtype is None else dtype)


def floats(op: str, argument: str, value: Any) -> Array:
    if not is_array(value) or value.dtype.name not in DTYPES:
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: {', '.join(DTYPES)} arrays")
    return jnp.asarray(value)


def samples(op: str, argument: str, values: Sequence[Any], *, same_dtype: bool = True) -> list[Array]:
    """Arrays [B, ...] of one shape."""
    arrays = [floats(op, argument, value) for value in values]
    first = arrays[0]
    if first.ndim == 0:
        raise ValueError(f"{op}: {argument} has no batch dimension; accepted: arrays [B, ...]")
    for a in arrays[1:]:
        if a.shape != first.shape:
            raise ValueError(
                f"{op}: {argument} have shapes {first.shape} and {a.shape}; accepted: one shape"
            )
        if same_dtype and a.dtype != first.dtype:
            raise TypeError(f"{op}: {argument} are {first.dtype} and {a.dtype}; accepted: one dtype")
    return arrays


def sequence(op: str, argument: str, value: Any, least: int = 1) -> list[Any]:
    if is_array(value) or isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a list of arrays [B, ...]")
    if not least <= len(value) <= MAX_PREDS:
        raise ValueError(f"{op}: {argument} holds {len(value)} arrays; accepted: {least} to {MAX_PREDS}")
    return list(value)


def scalar(op: str, argument: str, value: Any, batch: int) -> float | Array:
    """A number as it is; an array () or (B,) as (B,), float32 or wider."""
    if isinstance(value, Real | np.bool_):
        return float(value)
    if not is_array(value) or jnp.iscomplexobj(value):
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number or a (B,) array")
    if value.shape not in ((), (batch,)):
        raise ValueError(
            f"{op}: {argument} has shape {tuple(value.shape)}; accepted: a number or ({batch},), one per"
            " sample"
        )
    return jnp.broadcast_to(jnp.asarray(value).astype(wide()), (batch,))


def columns(op: str, weights: Any, count: int) -> tuple[Any, ...]:
    """One weight for each of `count` predictions, from a sequence or the columns of (B, count)."""
    if is_array(weights) and weights.ndim == 2:
        weights = tuple(weights[:, i] for i in range(weights.shape[1]))
    if is_array(weights) or not isinstance(weights, Sequence) or len(weights) != count:
        given = f"{len(weights)} values" if isinstance(weights, Sequence) else describe(weights)
        raise ValueError(
            f"{op}: weights is {given}; accepted: {count} numbers or (B,) arrays, or (B, {count})"
        )
    return tuple(weights)


def no_second(form: Any, *arrays: Any, more: str = "") -> Any:
    """The forward rule of a backward, which has no derivative. form: has the op's name."""
    raise NotImplementedError(f"{form.op}: its gradient has no derivative; differentiate once{more}")
