"""Token and channel routing on arrays: see pydiffuse.routing, whose names and arguments these are.

Tokens are arrays [B, N, D...]; ids are (B, keep) integers, unique within a sample.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydiffuse import _host
from pydiffuse.numpy.arrays import (
    Array,
    Outputs,
    Scalar,
    array_of,
    as_int32,
    broadcasts,
    count,
    describe,
    finite,
    floats,
    generator_of,
    integers,
    laid_out,
    numbers,
    within,
)


def route(B: int, N: int, keep: int | float, *, generator: np.random.Generator | None = None) -> Array:
    """For each of B samples a uniformly random subset of N tokens: ids (B, keep) int64, sorted.

    See pydiffuse.route.
    """
    B, N = count("route", "B", B), count("route", "N", N)
    share = isinstance(keep, float | np.floating)
    if share and not 0.0 <= keep <= 1.0:
        raise ValueError(
            f"route: keep is {keep!r}; accepted: a count of 0 to {N}, or a fraction of 0.0 to 1.0"
        )
    kept = int(keep * N + 0.5) if share else count("route", "keep", keep, 0, N)
    keys = generator_of("route", generator).random((B, N))
    return np.sort(np.argsort(keys, axis=1)[:, :kept], axis=1)


def gather_tokens(x: Array, ids: Array, *, out: Array | None = None) -> Array:
    """x[b, ids[b, j]], [B, keep, D...].  See pydiffuse.gather_tokens."""
    op = "gather_tokens"
    x = _tokens(op, "x", x)
    index = _ids(op, ids, x)
    outs = Outputs(op, out, [((*index.shape, *x.shape[2:]), x.dtype)], read=(x, index))
    if outs.arrays[0].size:
        _host.gather_tokens(_flat(outs.arrays[0]), _flat(x), index)
    return outs.results()


def scatter_tokens(
    base: Array,
    y: Array,
    ids: Array,
    gate: Scalar | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """base with token ids[b, j] replaced by y[b, j], or by (1 - gate) base + gate y.

    See pydiffuse.scatter_tokens; `out` may be base.
    """
    op = "scatter_tokens"
    base = _tokens(op, "base", base)
    index = _ids(op, ids, base)
    y = _tokens(op, "y", y)
    shape = (*index.shape, *base.shape[2:])
    if y.shape != shape or y.dtype != base.dtype:
        raise ValueError(f"{op}: y is {describe(y)}; accepted: a {base.dtype} array {shape}")
    g = None
    if gate is not None:
        given = numbers(op, "gate", gate).astype(np.float32)
        g = laid_out(broadcasts(op, "gate", given, index.shape, "a gate for each token"))
    outs = Outputs(op, out, [(base.shape, base.dtype)], same=(base,), read=(y, index, g))
    if base.size:
        _host.scatter_tokens(_flat(outs.arrays[0]), _flat(base), _flat(y), index, g)
    return outs.results()


def channel_mask(level: Scalar, channels: int, *, beta: float = 0.8, alpha: float = 4.0) -> Array:
    """Which channels a noise level may use, bool [..., C].  See pydiffuse.channel_mask."""
    op = "channel_mask"
    channels = count(op, "channels", channels, 1)
    if not 0 < finite(op, "beta", beta) <= 1:
        raise ValueError(f"{op}: beta is {beta!r}; accepted: a number in (0, 1]")
    if not finite(op, "alpha", alpha) > 0:
        raise ValueError(f"{op}: alpha is {alpha!r}; accepted: a number > 0")
    given = numbers(op, "level", level)
    if not np.all((given >= 0) & (given <= 1)):
        raise ValueError(
            f"{op}: level holds a value outside [0, 1] or NaN; accepted: 0 to 1, 1 the noisiest"
        )
    width = math.floor(beta * channels)
    start = np.round((channels - width) * given**alpha)[..., None]
    channel = np.arange(channels)
    return (channel >= start) & (channel < start + width)


def _tokens(op: str, argument: str, value: Any) -> Array:
    given = floats(op, argument, value)
    if given.ndim < 2:
        raise ValueError(f"{op}: {argument} has shape {given.shape}; accepted: [B, N, D...]")
    return given


def _flat(tokens: Array) -> Array:
    return tokens.reshape(*tokens.shape[:2], math.prod(tokens.shape[2:]))


def _ids(op: str, ids: Any, x: Array) -> Array:
    """int32 [B, keep]."""
    given, (B, N) = integers(op, "ids", array_of(op, "ids", ids)), x.shape[:2]
    if given.ndim != 2 or len(given) != B:
        raise ValueError(f"{op}: ids has shape {given.shape}; accepted: ({B}, keep)")
    within(op, "ids", given, N, "the tokens of a sample")
    row = np.sort(given, axis=1)
    twice = np.argwhere(row[:, 1:] == row[:, :-1])
    if len(twice):
        b, j = twice[0]
        raise ValueError(f"{op}: ids holds {row[b, j]} twice in sample {b}; accepted: unique ids")
    return as_int32(given)
