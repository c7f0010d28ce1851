"""From `path`, `reverse`, `cu_seqlens` and `layout` to the steps of a scan or convolution."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from pydiffuse.jax.arrays import DTYPES, describe, is_array
from pydiffuse.numpy.steps import Steps, steps_of


def static_steps(op: str, path: Any, reverse: bool, cu_seqlens: Any, L: int) -> Steps:
    """The order of the tokens and where sequences start, int32 arrays or None: known when the call is traced."""
    for name, value in (("path", path), ("cu_seqlens", cu_seqlens)):
        if isinstance(value, Tracer):
            raise TypeError(
                f"{op}: {name} is traced; accepted: a ScanPath or an array that is known when the function is"
                " traced (jit's static_argnames, or closed over)"
            )
    steps = steps_of(op, path, reverse, cu_seqlens, L)
    order, offsets = (None if a is None else jnp.asarray(a) for a in (steps.order, steps.offsets))
    return steps._replace(order=order, offsets=offsets)  # type: ignore[arg-type]


def shaped(
    op: str,
    argument: str,
    value: Any,
    sizes: tuple[int | None, ...],
    names: str,
    dtypes: tuple[str, ...] = DTYPES,
) -> Array:
    """An array of the sizes (None: any) that `names` spells out."""
    fits = is_array(value) and value.ndim == len(sizes)
    if not fits or not all(want in (None, have) for have, want in zip(value.shape, sizes, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{op}: {argument} is {describe(value)}; accepted: {names}, here ({wanted})")
    if value.dtype.name not in dtypes:
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: {', '.join(dtypes)}")
    return jnp.asarray(value)
