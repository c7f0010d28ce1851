"""The selective scan on JAX arrays: see pydiffuse.scan.

Its gradients recompute: saved are the inputs and the state before every 64th step, which the backward kernel
walks from the last to the first.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse._core.limits import CHUNK, MAX_STATES
from pydiffuse._core.words import check_flag
from pydiffuse.jax.arrays import describe, is_array, like, no_second
from pydiffuse.jax.calls import Like, alike, call
from pydiffuse.jax.steps import shaped, static_steps
from pydiffuse.numpy.steps import tokens_last

OP = "selective_scan"
FLOAT32 = ("float32",)
LAST, CHUNKS = 1 << 6, 1 << 7  # results, beside the six arrays that may be missing


class Form(NamedTuple):
    op: str
    channels_last: int
    softplus: int
    sequences: int
    with_last: bool


class Arrays(NamedTuple):
    """u, z: (B, D, L) or (B, L, D); delta: (B, K or 1, ..); A: [K, D, N]; B, C: [B, K or 1, G, N, L], with
    channels last [B, K or 1, L, G, N], or [K, D, N]; D, delta_bias: [K, D]; initial: [B, S, K, D, N];
    order: [K, L]; offsets: [S + 1]."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any = None
    z: Any = None
    delta_bias: Any = None
    initial: Any = None
    order: Any = None
    offsets: Any = None


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    path: Any = None,
    reverse: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    layout: str = "bdl",
) -> Any:
    """h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;  y_l = (<C_l, h_l> + D u_l) silu(z_l).

    See pydiffuse.selective_scan: y like u, and with return_last_state (y, the last states). path and
    cu_seqlens are static: known when the call is traced.
    """
    bdl = tokens_last(OP, layout)
    check_flag(OP, "delta_softplus", delta_softplus)
    names = "(B, D, L)" if bdl else "(B, L, D)"
    u = shaped(OP, "u", u, (None, None, None), names)
    batch = u.shape[0]
    channels, L = u.shape[1:] if bdl else u.shape[:0:-1]
    steps = static_steps(OP, path, reverse, cu_seqlens, L)
    K, paths = steps.paths, steps.paths or 1
    own = K is not None and is_array(delta) and delta.ndim == 4
    wanted = (batch, paths, *u.shape[1:]) if own else u.shape
    each = names if K is None else f"{names} or {names.replace('B, ', 'B, K, ')}"
    delta = shaped(OP, "delta", delta, wanted, each)
    delta = delta if own else delta[:, None]
    z = None if z is None else shaped(OP, "z", z, u.shape, names)
    A = _parameter("A", A, K, channels, None)
    N = A.shape[-1]
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{OP}: A has {N} states; accepted: 1 to {MAX_STATES}")
    B, C = (_weights(name, a, K, bdl, batch, channels, L, N) for name, a in (("B", B), ("C", C)))
    groups = {a.shape[2 if bdl else 3] for a in (B, C) if a.ndim == 5}
    if len(groups) > 1 or 0 in groups or any(channels % g for g in groups):
        raise ValueError(
            f"{OP}: B and C have {sorted(groups)} groups; accepted: one number, which divides the {channels} channels"
        )
    D = None if D is None else _parameter("D", D, K, channels)
    bias = None if delta_bias is None else _parameter("delta_bias", delta_bias, K, channels)
    states = (batch, steps.sequences, paths, channels, N)
    seen = (batch, *states[1:2][: cu_seqlens is not None], *states[2:3][: K is not None], channels, N)
    if initial_state is not None:
        text = f"(B, {'' if cu_seqlens is None else 'S, '}{'' if K is None else 'K, '}D, N)"
        initial_state = shaped(OP, "initial_state", initial_state, seen, text, FLOAT32).reshape(states)
        initial_state = initial_state[:, ::-1] if reverse else initial_state
    form = Form(OP, int(not bdl), int(delta_softplus), steps.sequences, return_last_state)
    arrays = Arrays(u, delta, A, B, C, D, z, bias, initial_state, steps.order, steps.offsets)
    y, *last = _scan(form, *alike(*arrays))
    if not last:
        return y
    return y, (last[0][:, ::-1] if reverse else last[0]).reshape(seen)


def _parameter(name: str, value: Any, K: int | None, *sizes: int | None) -> Array:
    """float32 (K, *sizes), from one for all paths or one for each."""
    one = K is None or not is_array(value) or value.ndim == len(sizes)
    text = "(D, N)" if len(sizes) == 2 else "(D,)"
    text = text if K is None else f"{text} or {text.replace('(', '(K, ')}"
    given = shaped(OP, name, value, sizes if one else (K, *sizes), text, FLOAT32)
    return jnp.broadcast_to(given, (K or 1, *given.shape)) if one else given


def _weights(
    name: str, value: Any, K: int | None, bdl: bool, batch: int, channels: int, L: int, N: int
) -> Array:
    """B or C as [B, K or 1, G, N, L] or [B, K or 1, L, G, N], or constant as float32 [K, D, N]."""
    if not is_array(value):
        raise TypeError(f"{OP}: {name} is {describe(value)}; accepted: an array")
    paths = K or 1
    if value.ndim == 2:
        given = shaped(OP, name, value, (channels, N), "(D, N)").astype(jnp.float32)
        return jnp.broadcast_to(given, (paths, channels, N))
    order, last = ((N, L), "N, L") if bdl else ((L, N), "L, N")
    grouped = "G, N, L" if bdl else "L, G, N"
    within = (None, N, L) if bdl else (L, None, N)
    sizes: tuple[int | None, ...]
    if K is None:
        text = f"(B, {last}), (B, {grouped}) or (D, N)"
        sizes = (batch, *order) if value.ndim == 3 else (batch, *within)
    else:
        text = f"(B, {last}), (B, K, {last}), (B, K, {grouped}) or (D, N)"
        sizes = (batch, paths, *order) if value.ndim == 4 else (batch, paths, *within)
        sizes = (batch, *order) if value.ndim == 3 else sizes
    given = shaped(OP, name, value, sizes, text)
    if K is None or given.ndim == 3:
        given = given[:, None]
    if given.ndim == 5:
        return given
    return given[:, :, None] if bdl else given[:, :, :, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: Form, *arrays: Array | None) -> tuple[Array, ...]:
    """arrays: those of Arrays. -> y, and the last states if asked for."""
    y, last, _ = _run(form, Arrays(*arrays), with_chunks=False)
    return (y,) if last is None else (y, last)


def _run(form: Form, given: Arrays, *, with_chunks: bool) -> tuple[Array, Array | None, Array | None]:
    K, channels, N = given.A.shape
    batch, L = given.u.shape[0], given.u.shape[1 if form.channels_last else 2]
    results = [like(given.u, jnp.float32 if K > 1 else None)]  # a sum over paths is rounded once
    if with_chunks:
        results.append(Like((batch, K, -(-L // CHUNK), channels, N), jnp.float32))
    if form.with_last:
        results.append(Like((batch, form.sequences, K, channels, N), jnp.float32))
    there, attributes = _given(form, given)
    attributes["has"] |= (LAST if form.with_last else 0) | (CHUNKS if with_chunks else 0)
    y, *states = call("selective_scan", results, there, **attributes)
    chunks = states.pop(0) if with_chunks else None
    return y.astype(given.u.dtype), states[0] if states else None, chunks


def _given(form: Form, given: Arrays) -> tuple[list[Array], dict[str, Any]]:
    has = sum(1 << i for i, a in enumerate(given[5:]) if a is not None)
    attributes = {"has": has, "channels_last": form.channels_last, "softplus": form.softplus}
    return [a for a in given if a is not None], attributes


def _forward(form: Form, *arrays: Array | None) -> Any:
    y, last, chunks = _run(form, Arrays(*arrays), with_chunks=True)
    return ((y,) if last is None else (y, last)), (chunks, arrays)


def _backward(form: Form, saved: Any, grads: tuple[Array, ...]) -> Any:
    chunks, arrays = saved
    dlast = grads[1] if len(grads) > 1 else None
    return *_scan_backward(form, grads[0], dlast, chunks, *arrays), None, None


_scan.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_backward(
    form: Form, dy: Array, dlast: Array | None, chunks: Array, *arrays: Array | None
) -> Any:
    """-> the gradients of u .. initial, None for None."""
    given = Arrays(*arrays)
    u, K = given.u, given.A.shape[0]
    L = u.shape[1 if form.channels_last else 2]
    there, attributes = _given(form, given)
    attributes["has"] |= LAST if dlast is not None else 0

    def weights(w: Array) -> Like:  # [B, K, G, L, N], or as it is
        if w.ndim == 3:
            return like(w)
        groups = w.shape[3 if form.channels_last else 2]
        return Like((u.shape[0], K, groups, L, given.A.shape[-1]), jnp.float32)

    def maybe(a: Array | None, dtype: Any = None) -> list[Like]:
        return [] if a is None else [like(a, dtype)]

    wide = jnp.float32 if K > 1 else None  # sums over the paths
    results = [
        like(u, wide), Like((u.shape[0], K, *u.shape[1:]), given.delta.dtype), like(given.A), weights(given.B),
        weights(given.C), *maybe(given.D), *maybe(given.z, wide), *maybe(given.delta_bias), *maybe(given.initial),
    ]  # fmt: skip
    inputs = [*there, dy, chunks, *([] if dlast is None else [dlast])]
    du, ddelta, dA, dB, dC, *rest = call("selective_scan_backward", results, inputs, **attributes)

    def of_weights(d: Array, w: Array) -> Array:
        if w.ndim == 3:
            return d
        d = d.sum(1, keepdims=True) if w.shape[1] < K else d
        return (d.swapaxes(2, 3) if form.channels_last else d.swapaxes(3, 4)).astype(w.dtype)

    if given.delta.shape[1] < K:
        ddelta = ddelta.astype(jnp.float32).sum(1, keepdims=True).astype(ddelta.dtype)
    dD, dz, dbias, dinitial = (None if a is None else rest.pop(0) for a in given[5:9])
    dz = None if dz is None else dz.astype(given.z.dtype)
    return (
        du.astype(u.dtype), ddelta, dA, of_weights(dB, given.B), of_weights(dC, given.C), dD, dz, dbias, dinitial
    )  # fmt: skip


_scan_backward.defvjp(no_second, lambda form, saved, grads: ())
