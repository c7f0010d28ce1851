"""Arrays as the kernels take them, and the words for those that they do not."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Scalar = float | ArrayLike
Shape = tuple[int, ...]

DTYPES = ("float32", "float16", "bfloat16")


def describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array {value.shape}"
    return (
        repr(value) if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"
    )


def array_of(op: str, argument: str, value: Any) -> Array:
    """Whatever holds an array: NumPy's own, what has `__array__` (JAX, torch on the CPU), a buffer, a
    DLPack producer."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {argument} is a masked array, whose mask would be lost; fill it first")
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def laid_out(a: Array) -> Array:
    """`a` itself where it is C-contiguous, aligned and in the machine's byte order, else a copy that is."""
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return a if a.flags.c_contiguous and a.flags.aligned else a.copy(order="C")


def floats(op: str, argument: str, value: Any, *, like: Array | None = None) -> Array:
    """[B, ...] of an accepted dtype, laid out; of the shape of `like`."""
    a = array_of(op, argument, value)
    if a.dtype.name not in DTYPES:
        raise TypeError(f"{op}: {argument} is {describe(a)}; accepted: {', '.join(DTYPES)}")
    if like is None and a.ndim == 0:
        raise ValueError(f"{op}: {argument} has no batch dimension; accepted: arrays [B, ...]")
    if like is not None and a.shape != like.shape:
        raise ValueError(
            f"{op}: {argument} has shape {a.shape}; accepted: {like.shape}, as the first array has"
        )
    return laid_out(a)


def shaped(
    op: str,
    argument: str,
    value: Any,
    sizes: Sequence[int | None],
    names: str,
    dtypes: Sequence[str] = DTYPES,
) -> Array:
    """An array, laid out in whatever way, of the sizes (None: any) that `names` spells out."""
    a = array_of(op, argument, value)
    fits = a.ndim == len(sizes) and all(
        want is None or have == want for have, want in zip(a.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{op}: {argument} is {describe(a)}; accepted: {names}, here ({wanted})")
    if a.dtype.name not in dtypes:
        raise TypeError(f"{op}: {argument} is {describe(a)}; accepted: {', '.join(dtypes)}")
    return a


def numbers(op: str, argument: str, value: Any) -> Array:
    """Real numbers, as float64."""
    given = array_of(op, argument, value)
    if given.dtype.kind not in "fiub" and given.dtype.name != "bfloat16":
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: numbers")
    return given.astype(np.float64, copy=False)


def scalar(op: str, argument: str, value: Any, batch: int) -> float | Array:
    """A number, or float64 [B]."""
    if type(value) in (float, int, bool):
        return float(value)
    given = numbers(op, argument, value)
    if given.ndim == 0:
        return float(given)
    if given.shape != (batch,):
        raise ValueError(
            f"{op}: {argument} has shape {given.shape}; accepted: a number or ({batch},), one per sample"
        )
    return given


def sequence(op: str, argument: str, values: Any, least: int = 1) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < least:
        raise TypeError(f"{op}: {argument} is {describe(values)}; accepted: a list of arrays")
    return list(values)


def name(op: str, argument: str, value: Any, accepted: Sequence[str | None]) -> int:
    """The code of a name: its place among those that are accepted."""
    if not isinstance(value, str | None) or value not in accepted:
        raise ValueError(f"{op}: {argument} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
    return tuple(accepted).index(value)


def count(op: str, argument: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """An int or one of NumPy's integers."""
    if not isinstance(value, bool | np.bool_) and hasattr(value, "__index__"):
        n = operator.index(value)
        if n >= least and (most is None or n <= most):
            return n
    upwards = "or more" if most is None else f"to {most}"
    raise ValueError(f"{op}: {argument} is {value!r}; accepted: an int, {least} {upwards}")


def flag(op: str, argument: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {argument} is {value!r}; accepted: True or False")
    return bool(value)


def finite(op: str, argument: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{op}: {argument} is {value!r}; accepted: a finite number")
    if not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{op}: {argument} is {value!r}; accepted: a finite number")
    return float(value)  # type: ignore[arg-type]


def per_patch(op: str, argument: str, value: Any, batch: int, patches: int) -> Array:
    """A value for every patch, float32 [B, N], from a number, (B,) or (B, N); not always contiguous."""
    given = array_of(op, argument, value)
    if given.dtype.kind not in "fiu" and given.dtype.name != "bfloat16":
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number, (B,) or (B, N)")
    if given.shape not in ((), (batch,), (batch, patches)):
        raise ValueError(
            f"{op}: {argument} has shape {given.shape}; accepted: a number, ({batch},) or"
            f" ({batch}, {patches}), a value for each of the {patches} patches"
        )
    table = given.astype(np.float32, copy=False)
    table = table if table.flags.aligned else table.copy()
    return np.broadcast_to(table[:, None] if table.ndim == 1 else table, (batch, patches))


def integers(op: str, argument: str, value: Any) -> Array:
    given = array_of(op, argument, value)
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: integers")
    return given


def within(op: str, argument: str, given: Array, most: int, what: str) -> None:
    """Integers of 0 to `most` - 1, before they become narrower ones."""
    if given.size and (given.min() < 0 or given.max() >= most):
        found = given.min() if given.min() < 0 else given.max()
        raise ValueError(f"{op}: {argument} holds {found}; accepted: 0 to {most - 1}, {what}")


def as_int32(given: Array) -> Array:
    return laid_out(given.astype(np.int32, copy=False))


def broadcasts(op: str, argument: str, given: Array, shape: Shape, what: str) -> Array:
    try:
        return np.broadcast_to(given, shape)
    except ValueError:
        raise ValueError(
            f"{op}: {argument} has shape {given.shape}; accepted: what broadcasts to {shape}, {what}"
        ) from None


def generator_of(op: str, generator: Any) -> np.random.Generator:
    if generator is None:
        return np.random.default_rng()
    if not isinstance(generator, np.random.Generator):
        raise TypeError(f"{op}: generator is {describe(generator)}; accepted: a numpy.random.Generator")
    return generator


class Outputs:
    """What a call returns: the arrays of `out=`, or new ones.

    `arrays` are what the kernels write. Where an array of `out` is not laid out as they want it, or shares
    memory with something that is read, they write a new one, and `results` copies it over.
    """

    def __init__(
        self,
        op: str,
        out: Any,
        likes: Sequence[tuple[Shape, Any]],
        *,
        same: Iterable[Array | None] = (),
        read: Iterable[Array | None] = (),
    ) -> None:
        """likes: shape and dtype of each result. same, read: the arrays that are read; the kernels may write
        over those in `same`, element by element."""
        self.given: list[Array | None] = [None] * len(likes)
        if out is not None:
            if len(likes) > 1 and (not isinstance(out, tuple | list) or len(out) != len(likes)):
                raise TypeError(f"{op}: out is {describe(out)}; accepted: a tuple of {len(likes)} arrays")
            self.given = list(out) if isinstance(out, tuple | list) and len(likes) > 1 else [out]
        over = [a for a in same if a is not None]
        apart = [a for a in read if a is not None]
        self.arrays = []
        for i, (o, (shape, like)) in enumerate(zip(self.given, likes, strict=True)):
            dtype = np.dtype(like).newbyteorder("=")
            name = "out" if len(likes) == 1 else f"out[{i}]"
            if o is not None:
                _check_out(op, name, o, shape, dtype, self.given[:i])
            fits = o is not None and _writable(o, over, apart)
            self.arrays.append(o if fits and o is not None else np.empty(shape, dtype))

    def results(self) -> Any:
        for o, array in zip(self.given, self.arrays, strict=True):
            if o is not None and o is not array:
                o[...] = array
        results = tuple(a if o is None else o for o, a in zip(self.given, self.arrays, strict=True))
        return results[0] if len(results) == 1 else results


def _check_out(
    op: str, name: str, o: Any, shape: Shape, dtype: np.dtype[Any], others: Sequence[Array | None]
) -> None:
    if not isinstance(o, np.ndarray) or o.shape != shape or o.dtype.name != dtype.name:
        raise ValueError(f"{op}: {name} is {describe(o)}; accepted: a {dtype} array {shape}")
    if not o.flags.writeable:
        raise ValueError(f"{op}: {name} is read-only; accepted: an array that can be written")
    for other in others:
        if other is not None and shares(o, other):
            raise ValueError(f"{op}: {name} shares memory with another output; each needs its own")


def shares(a: Array, b: Array) -> bool:
    """Whether two arrays have an element in common, or might where it is hard to say."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _writable(o: Array, over: Sequence[Array], apart: Sequence[Array]) -> bool:
    if not (o.flags.c_contiguous and o.flags.aligned and o.dtype.isnative):
        return False
    for a in over:
        same = a.ctypes.data == o.ctypes.data and a.dtype == o.dtype and a.shape == o.shape
        if not same and np.may_share_memory(a, o):
            return False
    return not any(np.may_share_memory(a, o) for a in apart)
