"""Token routing on JAX arrays: see pydiffuse.routing.

Tokens are arrays [B, N, D...]; ids are (B, keep) integers, unique within a sample. Gathering and scattering
are each other's derivatives, to any order.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse.jax.arrays import Scalar, describe, floats, integers, is_array
from pydiffuse.jax.calls import Like, alike
from pydiffuse.jax.calls import call as call_handler

call = partial(call_handler, vmap="broadcast_all")
GATE, BASE, Y = 1, 2, 4


class Scatter(NamedTuple):
    N: int
    donate: bool = False  # the result takes base's memory


def route(B: int, N: int, keep: int | float, *, key: Array) -> Array:
    """For each of B samples a uniformly random subset of N tokens: ids (B, keep) int32, sorted.

    See pydiffuse.route. key: of jax.random.
    """
    share = isinstance(keep, float)
    if not 0 <= keep <= (1 if share else N):
        raise ValueError(
            f"route: keep is {keep!r}; accepted: a count of 0 to {N}, or a fraction of 0.0 to 1.0"
        )
    kept = int(keep * N + 0.5) if share else int(keep)
    return jnp.sort(jnp.argsort(jax.random.uniform(key, (B, N)), axis=1)[:, :kept], axis=1)


def gather_tokens(x: Array, ids: Array) -> Array:
    """x[b, ids[b, j]], [B, keep, D...].  See pydiffuse.gather_tokens."""
    op = "gather_tokens"
    x = _tokens(op, "x", x)
    index = _ids(op, ids, x)
    shape = (*index.shape, *x.shape[2:])
    if not math.prod(shape):
        return jnp.zeros(shape, x.dtype)
    return _gather(*alike(_flat(x), index, None)).reshape(shape)


def scatter_tokens(
    base: Array, y: Array, ids: Array, gate: Scalar | None = None, *, donate_base: bool = False
) -> Array:
    """base with token ids[b, j] replaced by y[b, j], or by (1 - gate) base + gate y.

    See pydiffuse.scatter_tokens. donate_base: the result is written into base's memory, of which only the
    tokens that are replaced are touched; where base is still needed XLA copies it first.
    """
    op = "scatter_tokens"
    base = _tokens(op, "base", base)
    index = _ids(op, ids, base)
    y = _tokens(op, "y", y)
    shape = (*index.shape, *base.shape[2:])
    if y.shape != shape or y.dtype != base.dtype:
        raise ValueError(f"{op}: y is {describe(y)}; accepted: a {base.dtype} array {shape}")
    if gate is not None:
        if not isinstance(gate, int | float) and not is_array(gate):
            raise TypeError(f"{op}: gate is {describe(gate)}; accepted: a number or an array")
        try:
            gate = jnp.broadcast_to(jnp.asarray(gate, jnp.float32), index.shape)
        except ValueError:
            raise ValueError(
                f"{op}: gate has shape {gate.shape}; accepted: what broadcasts to {index.shape}"  # type: ignore[union-attr]
            ) from None
    if not base.size:
        return base
    flat = alike(_flat(base), _flat(y), index, gate)
    return _scatter(Scatter(base.shape[1], donate_base), *flat).reshape(base.shape)


def _tokens(op: str, argument: str, value: Any) -> Array:
    given = floats(op, argument, value)
    if given.ndim < 2:
        raise ValueError(f"{op}: {argument} has shape {given.shape}; accepted: [B, N, D...]")
    return given


def _flat(tokens: Array) -> Array:
    return tokens.reshape(*tokens.shape[:2], math.prod(tokens.shape[2:]))


def _ids(op: str, ids: Any, x: Array) -> Array:
    """int32 [B, keep]; the kernel refuses those outside of the tokens, and any that are there twice."""
    given = integers(op, "ids", ids, x.shape[1])
    if given.ndim != 2 or len(given) != len(x):
        raise ValueError(f"{op}: ids has shape {given.shape}; accepted: ({len(x)}, keep)")
    return given


def _there(*arrays: Array | None) -> list[Array]:
    return [a for a in arrays if a is not None]


@jax.custom_vjp
def _gather(x: Array, ids: Array, gate: Array | None) -> Array:
    """x [B, N, C], ids [B, keep] int32, gate [B, keep] float32 or None -> [B, keep, C]."""
    has = 0 if gate is None else GATE
    out = Like((*ids.shape, x.shape[2]), x.dtype)
    return call("gather_tokens", [out], _there(x, ids, gate), has=has)[0]


def _gather_backward(saved: Any, dout: Array) -> Any:
    x, ids, gate = saved
    dx = _scatter(Scatter(x.shape[1]), None, dout, ids, gate)
    return dx, None, None if gate is None else _inner(dout, _gather(x, ids, None))


_gather.defvjp(lambda *arrays: (_gather(*arrays), arrays), _gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scatter(form: Scatter, base: Array | None, y: Array | None, ids: Array, gate: Array | None) -> Array:
    """[B, N, C] from base [B, N, C] and y [B, keep, C]; what is None is zeros, and not both are."""
    like = y if base is None else base
    assert like is not None
    has = (
        (GATE if gate is not None else 0)
        | (BASE if base is not None else 0)
        | (Y if y is not None else 0)
    )
    out = Like((ids.shape[0], form.N, like.shape[2]), like.dtype)
    aliases = {0: 0} if form.donate and base is not None else None
    return call("scatter_tokens", [out], _there(base, y, ids, gate), aliases, has=has)[0]


def _scatter_backward(form: Scatter, saved: Any, dout: Array) -> Any:
    base, y, ids, gate = saved
    dbase = None if base is None else _scatter(Scatter(form.N), dout, None, ids, gate)
    dy = None if y is None else _gather(dout, ids, gate)
    dgate = None
    if gate is not None:
        there = _gather(dout, ids, None)
        dgate = jnp.zeros_like(gate)
        dgate = dgate if y is None else dgate + _inner(there, y)
        dgate = dgate if base is None else dgate - _inner(there, _gather(base, ids, None))
    return dbase, dy, None, dgate


_scatter.defvjp(lambda form, *arrays: (_scatter(form, *arrays), arrays), _scatter_backward)


def _inner(a: Array, b: Array) -> Array:
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(-1)
