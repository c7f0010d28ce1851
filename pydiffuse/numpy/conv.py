"""The causal convolution on arrays: see pydiffuse.conv."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pydiffuse import _host
from pydiffuse._core.limits import MAX_WIDTH
from pydiffuse.numpy.arrays import Array, Outputs, laid_out, shaped
from pydiffuse.numpy.steps import dense, steps_of, tokens_last
from pydiffuse.paths import ScanPath


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    path: ScanPath | ArrayLike | None = None,
    reverse: bool = False,
    cu_seqlens: ArrayLike | None = None,
    layout: str = "bdl",
    out: Array | None = None,
) -> Array:
    """y_l = act(bias + sum_w weight_w x_(l-W+1+w)) over the steps of a path.  See pydiffuse.causal_conv1d."""
    op = "causal_conv1d"
    bdl = tokens_last(op, layout)
    x = shaped(op, "x", x, (None, None, None), "(B, D, L)" if bdl else "(B, L, D)")
    inner = x.swapaxes(1, 2) if bdl else x
    L, D = inner.shape[1:]
    weight = shaped(op, "weight", weight, (D, None), "(D, W)")
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: weight has width {weight.shape[1]}; accepted: 1 to {MAX_WIDTH}")
    bias = None if bias is None else _wide(shaped(op, "bias", bias, (D,), "(D,)"))
    if activation not in ("silu", "swish", None):
        raise ValueError(f"{op}: activation is {activation!r}; accepted: 'silu' or None")
    steps = steps_of(op, path, reverse, cu_seqlens, L)
    if steps.paths is not None:
        raise TypeError(f"{op}: path is a list of paths; accepted: one path")
    inner, weight = dense(inner), _wide(weight)
    outs = Outputs(op, out, [(x.shape, x.dtype)], read=(x, inner, weight, bias))
    y: Any = outs.arrays[0].swapaxes(1, 2) if bdl else outs.arrays[0]
    _host.causal_conv1d(y, inner, weight, bias, steps.order, steps.offsets, activation is not None)
    return outs.results()


def _wide(a: Array) -> Array:
    return laid_out(a.astype(np.float32, copy=False))
