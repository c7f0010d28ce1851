"""The causal convolution on JAX arrays: see pydiffuse.conv."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse._core.limits import MAX_WIDTH
from pydiffuse.jax.arrays import like, no_second
from pydiffuse.jax.calls import alike, call
from pydiffuse.jax.steps import shaped, static_steps
from pydiffuse.numpy.steps import tokens_last

OP = "causal_conv1d"


class Form(NamedTuple):
    op: str
    channels_last: int
    silu: int


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
    """y_l = act(bias + sum_w weight_w x_(l-W+1+w)) over the steps of a path.  See pydiffuse.causal_conv1d.

    path and cu_seqlens are static: known when the call is traced.
    """
    bdl = tokens_last(OP, layout)
    x = shaped(OP, "x", x, (None, None, None), "(B, D, L)" if bdl else "(B, L, D)")
    D, L = x.shape[1:] if bdl else x.shape[:0:-1]
    weight = shaped(OP, "weight", weight, (D, None), "(D, W)")
    if not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{OP}: weight has width {weight.shape[1]}; accepted: 1 to {MAX_WIDTH}")
    if bias is not None:
        bias = shaped(OP, "bias", bias, (D,), "(D,)").astype(jnp.float32)
    if activation not in ("silu", "swish", None):
        raise ValueError(f"{OP}: activation is {activation!r}; accepted: 'silu' or None")
    steps = static_steps(OP, path, reverse, cu_seqlens, L)
    if steps.paths is not None:
        raise TypeError(f"{OP}: path is a list of paths; accepted: one path")
    form = Form(OP, int(not bdl), int(activation is not None))
    return _conv(form, *alike(x, weight.astype(jnp.float32), bias, steps.order, steps.offsets))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(form: Form, *arrays: Array | None) -> Array:
    """arrays: x, weight, bias, order, offsets."""
    there, attributes = _given(form, arrays)
    return call("causal_conv1d", [like(arrays[0])], there, **attributes)[0]


def _given(form: Form, arrays: tuple[Array | None, ...]) -> Any:
    has = sum(1 << i for i, a in enumerate(arrays[2:]) if a is not None)
    attributes = {"has": has, "channels_last": form.channels_last, "silu": form.silu}
    return [a for a in arrays if a is not None], attributes


def _backward(form: Form, arrays: tuple[Any, ...], dy: Array) -> Any:
    return *_conv_backward(form, dy, *arrays), None, None


_conv.defvjp(lambda form, *arrays: (_conv(form, *arrays), arrays), _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv_backward(form: Form, dy: Array, *arrays: Array | None) -> tuple[Array | None, ...]:
    """-> dx, dweight, dbias or None."""
    there, attributes = _given(form, arrays)
    results = [like(a) for a in arrays[:3] if a is not None]
    found = call("causal_conv1d_backward", results, [*there, dy], **attributes)
    return tuple(found) if len(found) == 3 else (*found, None)


_conv_backward.defvjp(no_second, lambda form, saved, grads: ())
