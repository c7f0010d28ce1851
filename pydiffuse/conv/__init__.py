"""The causal convolution that stands before a selective scan, in path order."""

from __future__ import annotations

from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_shape
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse._core.layouts import dense
from pydiffuse._core.structs import MAX_WIDTH
from pydiffuse.conv import reference
from pydiffuse.conv.autograd import CausalConv1d
from pydiffuse.paths import ScanPath
from pydiffuse.paths.steps import PathLike, check_layout, steps_of, usual_order


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    path: PathLike = None,
    reverse: bool = False,
    cu_seqlens: Tensor | list[int] | tuple[int, ...] | None = None,
    layout: str = "bdl",
) -> Tensor:
    """A causal depthwise convolution over the steps of a path: y_l = act(bias + sum_w weight_w x_(l-W+1+w)).

    x: [B, D, L], or [B, L, D] with layout="bld"; float32, bfloat16 or float16. weight: [D, W], W from 1
    to 8, and bias: [D], of any of these dtypes. activation: "silu" or None. path, reverse, cu_seqlens: as in
    `selective_scan`, one path. Returns y like x, each token's result at its place.

    Differentiable once. As causal-conv1d's function of the same name where path is None.
    """
    op = "causal_conv1d"
    ops = dispatch.direct(op, x, weight, bias)
    if ops and cu_seqlens is None and layout in ("bdl", "bld") and activation in ("silu", "swish", None):
        usual, order = usual_order(path, reverse, x)
        y = None
        if usual:
            y = ops.causal_conv1d.new(x, weight, bias, order, activation is not None, layout == "bdl")
        if y is not None:
            return y
    check_layout(op, layout)
    bdl = layout == "bdl"
    check_shape(op, "x", x, (None, None, None), "(B, D, L)" if bdl else "(B, L, D)")
    D, L = (x.shape[1], x.shape[2]) if bdl else (x.shape[2], x.shape[1])
    check_shape(op, "weight", weight, (D, None), "(D, W)", like=x)
    W = weight.shape[1]
    if not 1 <= W <= MAX_WIDTH:
        raise ValueError(f"{op}: weight has width {W}; accepted: 1 to {MAX_WIDTH}")
    if bias is not None:
        check_shape(op, "bias", bias, (D,), "(D,)", like=x)
    if activation not in ("silu", "swish", None):
        raise ValueError(f"{op}: activation is {activation!r}; accepted: 'silu' or None")
    if isinstance(path, list | tuple) and path and isinstance(path[0], ScanPath):
        raise TypeError(f"{op}: path is a list of paths; accepted: one path")
    steps, _ = steps_of(op, path, reverse, cu_seqlens, L, x.device)
    if dispatch.forced_reference():
        activation = "silu" if activation else None
        return reference.causal_conv1d(
            x, weight, bias, activation=activation, path=path, reverse=reverse, cu_seqlens=cu_seqlens,
            layout=layout,
        )  # fmt: skip
    order = None if steps.order is None else steps.order[0]
    args = (
        dense(x.transpose(1, 2) if bdl else x),
        weight.float().contiguous(),
        None if bias is None else bias.float().contiguous(),
        order,
        steps.offsets,
        activation is not None,
    )
    if needs_function(x, weight, bias):
        (y,) = differentiable("conv.CausalConv1d", op, *args)
    else:
        (y,) = CausalConv1d.forward(op, *args)
    return y.transpose(1, 2) if bdl else y
