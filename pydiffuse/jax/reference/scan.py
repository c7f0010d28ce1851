"""The selective scan in jax.numpy, a step at a time: see pydiffuse.reference.scan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pydiffuse.numpy.steps import steps_of


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
    """h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;  y_l = <C_l, h_l> + D u_l, times silu(z_l).

    Step l is at token path[l]. delta <- delta + delta_bias, then softplus if asked for. With several paths the
    results add up, token by token.  Mamba, arXiv 2312.00752, eq. 2 and section 3.3.2.
    """

    def tokens_first(a: Array, dims: int) -> Array:  # [L, B, ..] from [B, .., L] or [B, L, ..]
        a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
        return jnp.moveaxis(a, dims - 1 if layout == "bdl" else 1, 0)

    L = u.shape[2] if layout == "bdl" else u.shape[1]
    steps = steps_of("selective_scan", path, reverse, cu_seqlens, L)
    many, sequences = steps.paths is not None, steps.sequences
    offsets = np.array([0, L]) if steps.offsets is None else steps.offsets
    sequence = np.repeat(np.arange(sequences), np.diff(offsets))
    starts = np.isin(np.arange(L), offsets[:-1][np.diff(offsets) > 0])

    def own(a: Any, k: int, dims: int, axis: int = 0) -> Any:
        """Path k's part of what has more than the `dims` dimensions that it has when shared."""
        return jnp.take(a, k, axis) if many and a is not None and a.ndim > dims else a

    us, channels = tokens_first(u, 3), A.shape[-2]
    y, lasts = jnp.zeros_like(us), []
    for k in range(steps.paths or 1):
        order = np.arange(L) if steps.order is None else steps.order[k]
        dt = tokens_first(own(delta, k, 3, 1), 3)
        bias = own(delta_bias, k, 1)
        dt = dt if bias is None else dt + bias
        dt = jax.nn.softplus(dt) if delta_softplus else dt
        Ak, Dk = own(A, k, 2), own(D, k, 1)
        Bk, Ck = (_rows(own(w, k, 3, 1), tokens_first, L, channels) for w in (B, C))
        initial = (
            None if initial_state is None else own(initial_state, k, 3 + (cu_seqlens is not None), -3)
        )
        if initial is None:
            h0 = jnp.zeros((us.shape[1], sequences, channels, A.shape[-1]), us.dtype)
        else:
            h0 = (initial if cu_seqlens is not None else initial[:, None])[:, :: -1 if reverse else 1]

        def step(carry: Any, x: Any, h0: Array = h0, Ak: Array = Ak) -> Any:
            h, last = carry
            s, start, dt, b, c, u = x
            h = jnp.where(start, jnp.take(h0, s, 1), h)
            h = jnp.exp(dt[..., None] * Ak) * h + dt[..., None] * b * u[..., None]
            return (h, last.at[:, s].set(h)), (h * c).sum(-1)

        xs = (sequence, starts, dt[order], Bk[order], Ck[order], us[order])
        (_, last), out = jax.lax.scan(step, (h0[:, 0], h0), xs)
        out = jnp.zeros_like(us).at[order].set(out)
        y = y + (out if Dk is None else out + Dk * us)
        lasts.append(last[:, :: -1 if reverse else 1])
    y = y if z is None else y * jax.nn.silu(tokens_first(z, 3))
    y = jnp.moveaxis(y, 0, 2 if layout == "bdl" else 1).astype(u.dtype)
    if not return_last_state:
        return y
    last = jnp.stack(lasts, 2) if many else lasts[0]
    return y, last if cu_seqlens is not None else last[:, 0]


def _rows(w: Array, tokens_first: Any, L: int, channels: int) -> Array:
    """B or C as [L, B or 1, D, N]."""
    if w.ndim == 2:
        return jnp.broadcast_to(w, (L, 1, *w.shape))
    rows = tokens_first(w, w.ndim)
    rows = rows[:, :, None] if w.ndim == 3 else rows
    return jnp.repeat(rows, channels // rows.shape[2], 2)
