"""The causal convolution in jax.numpy: see pydiffuse.reference.conv."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pydiffuse.numpy.steps import steps_of


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    path: Any = None,
    reverse: bool = False,
    cu_seqlens: Any = None,
    layout: str = "bdl",
) -> Array:
    """y_l = act(bias + sum_w weight_w x_(l - W + 1 + w)), zeros before a sequence's first step; step l is at
    token path[l]."""
    bdl = x if layout == "bdl" else x.swapaxes(1, 2)
    L, W = bdl.shape[-1], weight.shape[-1]
    steps = steps_of("causal_conv1d", path, reverse, cu_seqlens, L)
    order = np.arange(L) if steps.order is None else steps.order[0]
    offsets = np.array([0, L]) if steps.offsets is None else steps.offsets
    first = np.repeat(offsets[:-1], np.diff(offsets))  # of each step's sequence
    taps = bdl[..., order].astype(jnp.float32)
    y = jnp.zeros_like(taps)
    for w in range(W):
        at = np.arange(L) - W + 1 + w
        tap = jnp.where(at >= first, taps[..., np.maximum(at, 0)], 0) if L else taps
        y = y + weight[:, w, None].astype(jnp.float32) * tap
    y = y if bias is None else y + bias[:, None].astype(jnp.float32)
    y = jax.nn.silu(y) if activation in ("silu", "swish") else y
    y = jnp.zeros_like(y).at[..., order].set(y).astype(x.dtype)
    return y if layout == "bdl" else y.swapaxes(1, 2)
