"""From `path`, `reverse`, `cu_seqlens` and `layout` to the steps of a scan or convolution over arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydiffuse.numpy.arrays import Array, array_of, as_int32, describe, flag, integers
from pydiffuse.paths import ScanPath, from_order


class Steps(NamedTuple):
    """The order of the tokens and where sequences start."""

    order: Array | None  # int32 [K, L]
    offsets: Array | None  # int32 [S + 1]
    sequences: int
    paths: int | None
    """How many, if a list of them was given."""


def steps_of(op: str, path: Any, reverse: bool, cu_seqlens: Any, L: int) -> Steps:
    backwards = flag(op, "reverse", reverse)
    many = isinstance(path, list | tuple) and (not path or isinstance(path[0], ScanPath))
    if many and not path:
        raise ValueError(f"{op}: path is an empty list; accepted: one ScanPath or more")
    given = path if many else () if path is None else (path,)
    orders = [_order(op, f"path[{i}]" if many else "path", p, L) for i, p in enumerate(given)]
    if not orders and backwards:
        orders = [np.arange(L, dtype=np.int32)]
    order = np.stack(orders) if orders else None
    offsets = None if cu_seqlens is None else _offsets(op, cu_seqlens, L)
    if backwards:
        order = None if order is None else np.ascontiguousarray(order[:, ::-1])
        offsets = None if offsets is None else L - offsets[::-1]
    sequences = 1 if offsets is None else len(offsets) - 1
    return Steps(order, offsets, sequences, len(given) if many else None)


def dense(a: Array) -> Array:
    """a [..., L, D] itself if its channels or its tokens are next to each other in memory, else a copy."""
    forwards = all(s >= 0 and s % a.itemsize == 0 for s in a.strides)
    beside = a.itemsize in a.strides[-2:] or 1 in a.shape[-2:] or not a.size
    if forwards and beside and a.flags.aligned and a.dtype.isnative:
        return a
    return np.array(a, dtype=a.dtype.newbyteorder("="), order="C")


def any_strides(a: Array) -> Array:
    """a itself if its elements can be read where they are."""
    forwards = all(s >= 0 and s % a.itemsize == 0 for s in a.strides)
    if forwards and a.flags.aligned and a.dtype.isnative:
        return a
    return np.array(a, dtype=a.dtype.newbyteorder("="), order="C")


def tokens_last(op: str, layout: str) -> bool:
    if layout not in ("bdl", "bld"):
        raise ValueError(f"{op}: layout is {layout!r}; accepted: 'bdl' (B, D, L) or 'bld' (B, L, D)")
    return layout == "bdl"


def _order(op: str, argument: str, path: Any, L: int) -> Array:
    if not isinstance(path, ScanPath):
        try:
            path = from_order(path if isinstance(path, list | tuple) else array_of(op, argument, path))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: {argument} is no permutation: {error}") from None
    if path.length != L:
        raise ValueError(
            f"{op}: {argument} is {path!r} of {path.length} tokens; accepted: one of {L}, as the input has"
        )
    return path.visits


def _offsets(op: str, cu_seqlens: Any, L: int) -> Array:
    given = integers(op, "cu_seqlens", cu_seqlens)
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(f"{op}: cu_seqlens is {describe(given)}; accepted: offsets [S + 1]")
    if given[0] != 0 or given[-1] != L or np.any(given[1:] < given[:-1]):
        values = given.tolist() if len(given) < 9 else [*given[:8].tolist(), "..."]
        raise ValueError(
            f"{op}: cu_seqlens is {values}; accepted: 0 <= ... <= {L}, never falling, ending at {L}"
        )
    return as_int32(given)
