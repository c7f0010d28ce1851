"""The selective scan on arrays: see pydiffuse.scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pydiffuse import _host
from pydiffuse._core.limits import MAX_STATES
from pydiffuse.numpy.arrays import Array, Outputs, array_of, flag, laid_out, shaped
from pydiffuse.numpy.steps import any_strides, dense, steps_of, tokens_last
from pydiffuse.paths import ScanPath

OP = "selective_scan"


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
    path: ScanPath | ArrayLike | Sequence[ScanPath] | None = None,
    reverse: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: ArrayLike | None = None,
    layout: str = "bdl",
    out: Array | None = None,
) -> Any:
    """h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;  y_l = (<C_l, h_l> + D u_l) silu(z_l).

    See pydiffuse.selective_scan: y like u, and with return_last_state (y, the last states).
    """
    bdl, softplus = tokens_last(OP, layout), flag(OP, "delta_softplus", delta_softplus)
    names = "(B, D, L)" if bdl else "(B, L, D)"
    u = shaped(OP, "u", u, (None, None, None), names)
    inner = u.swapaxes(1, 2) if bdl else u
    batch, L, channels = inner.shape
    steps = steps_of(OP, path, reverse, cu_seqlens, L)
    K, paths = steps.paths, steps.paths or 1

    def tokens(a: Array) -> Array:
        return dense(a.swapaxes(-1, -2) if bdl else a)

    delta = array_of(OP, "delta", delta)
    own = K is not None and delta.ndim == 4
    wanted = (batch, paths, *u.shape[1:]) if own else u.shape
    each = names if K is None else f"{names} or {names.replace('B, ', 'B, K, ')}"
    delta = tokens(shaped(OP, "delta", delta, wanted, each))
    delta = delta if own else np.broadcast_to(delta[:, None], (batch, paths, L, channels))
    z = None if z is None else tokens(shaped(OP, "z", z, u.shape, names))
    A = _parameter("A", A, K, channels, None)
    N = A.shape[-1]
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{OP}: A has {N} states; accepted: 1 to {MAX_STATES}")
    B, C = (_weights(name, a, K, bdl, batch, channels, L, N) for name, a in (("B", B), ("C", C)))
    groups = {a.shape[2] for a in (B, C) if a.ndim == 5}
    if len(groups) > 1 or 0 in groups or any(channels % g for g in groups):
        raise ValueError(
            f"{OP}: B and C have {sorted(groups)} groups; accepted: one number, which divides the {channels} channels"
        )
    D = None if D is None else _parameter("D", D, K, channels)
    delta_bias = None if delta_bias is None else _parameter("delta_bias", delta_bias, K, channels)
    states = (batch, steps.sequences, paths, channels, N)
    seen = (batch, *states[1:2][: cu_seqlens is not None], *states[2:3][: K is not None], channels, N)
    if initial_state is not None:
        text = f"(B, {'' if cu_seqlens is None else 'S, '}{'' if K is None else 'K, '}D, N)"
        initial_state = shaped(OP, "initial_state", initial_state, seen, text, ("float32",))
        initial_state = laid_out(initial_state).reshape(states)
        initial_state = laid_out(initial_state[:, ::-1]) if reverse else initial_state
    last = np.empty(states, np.float32) if return_last_state else None
    inner = dense(inner)
    read = (u, inner, delta, A, B, C, D, z, delta_bias, initial_state)
    outs = Outputs(OP, out, [(u.shape, u.dtype)], read=read)
    y = outs.arrays[0].swapaxes(1, 2) if bdl else outs.arrays[0]
    # The sum over several paths is rounded once.
    total = y if paths == 1 or y.dtype == np.float32 else np.empty(y.shape, np.float32)
    _host.selective_scan(
        total, last, inner, delta, A, B, C, D, z, delta_bias, initial_state, steps.order, steps.offsets, softplus
    )  # fmt: skip
    if total is not y:
        y[...] = total
    result = outs.results()
    if last is None:
        return result
    return result, (last[:, ::-1] if reverse else last).reshape(seen)


def _parameter(name: str, value: Any, K: int | None, *sizes: int | None) -> Array:
    """float32 (K, *sizes), from one for all paths or one for each."""
    given = array_of(OP, name, value)
    one = K is None or given.ndim == len(sizes)
    text = "(D, N)" if len(sizes) == 2 else "(D,)"
    text = text if K is None else f"{text} or {text.replace('(', '(K, ')}"
    given = shaped(OP, name, given, sizes if one else (K, *sizes), text, ("float32",))
    return laid_out(np.broadcast_to(given, (K or 1, *given.shape)) if one else given)


def _weights(
    name: str, value: Any, K: int | None, bdl: bool, batch: int, channels: int, L: int, N: int
) -> Array:
    """B or C as [B, K, G, L, N], or constant as float32 [K, D, N]."""
    given, paths = array_of(OP, name, value), K or 1
    if given.ndim == 2:
        given = shaped(OP, name, given, (channels, N), "(D, N)").astype(np.float32, copy=False)
        return laid_out(np.broadcast_to(given, (paths, channels, N)))
    order, last = ((N, L), "N, L") if bdl else ((L, N), "L, N")
    grouped = "G, N, L" if bdl else "L, G, N"
    within = (None, N, L) if bdl else (L, None, N)
    sizes: tuple[int | None, ...]
    if K is None:
        text = f"(B, {last}), (B, {grouped}) or (D, N)"
        sizes = (batch, *order) if given.ndim == 3 else (batch, *within)
    else:
        text = f"(B, {last}), (B, K, {last}), (B, K, {grouped}) or (D, N)"
        sizes = (batch, paths, *order) if given.ndim == 4 else (batch, paths, *within)
        sizes = (batch, *order) if given.ndim == 3 else sizes
    given = any_strides(shaped(OP, name, given, sizes, text))
    if K is None or given.ndim == 3:
        given = np.broadcast_to(given[:, None], (batch, paths, *given.shape[1:]))
    if given.ndim == 4:
        return (given.swapaxes(-1, -2) if bdl else given)[:, :, None]
    return given.swapaxes(-1, -2) if bdl else given.swapaxes(2, 3)
