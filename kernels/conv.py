"""The causal convolution in path order, in Triton.

    y_l = act(bias + sum_w weight_w x_(l - W + 1 + w)),   zeros before a sequence's first step

A program has a tile of steps x channels; a warp's lanes are channels where those are next to each other in
memory, else steps. Step l is at token order[l]; `first`[l] is the first step of l's sequence.

conv_kernel     y.
slope_kernel    g = dy act'(pre), pre computed again, into memory in the order of the steps; and the tile's
                part of dweight and dbias, which add_kernel (partials.py) adds up in one order.
spread_kernel   dx_l = sum_w weight_w g_(l + W - 1 - w).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import INTERPRETED, WARPS, Launch, cdiv, inner, narrow, run
from pydiffuse.kernels.partials import add_launch
from pydiffuse.kernels.scan_tile import check_float, sequence_table, sigmoid

STEPS, CHANNELS = (64, 32) if INTERPRETED else (32, 32)


@inner
def place(L, D, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    # Sample, block of steps, steps [STEPS, 1], channels [1, CHANNELS] of a program.
    program = tl.program_id(0).to(tl.int64)
    across, along = tl.cdiv(D, CHANNELS), tl.cdiv(L, STEPS)
    block = program // across % along
    step = (block * STEPS + tl.arange(0, STEPS))[:, None]
    d = (program % across * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return program // (across * along), block, step, d


@inner
def tokens_of(order, step, mask):
    if order is None:
        return step
    else:
        return tl.load(order + step, mask=mask, other=0).to(tl.int64)


@inner
def first_of(first, step, mask):
    if first is None:
        return 0
    else:
        return tl.load(first + step, mask=mask, other=0)


@inner
def taken(x, order, sample, start, step, d, L, D):
    # x [STEPS, CHANNELS] at `step`; zeros before `start`.
    here = (step >= start) & (step < L)
    token = tokens_of(order, step, here)
    at = x[0] + sample * x[1] + token * x[2] + d * x[3]
    return tl.load(at, mask=here & (d < D), other=0.0).to(tl.float32)


@inner
def preactivation(x, weight, bias, order, sample, start, step, d, L, D, WIDTH: tl.constexpr):
    pre = tl.full([1, 1], 0.0, tl.float32)
    if bias is not None:
        pre = tl.load(bias + d, mask=d < D, other=0.0)
    for w in tl.static_range(WIDTH):
        c = tl.load(weight + d * WIDTH + w, mask=d < D, other=0.0)
        pre = pre + c * taken(x, order, sample, start, step - (WIDTH - 1 - w), d, L, D)
    return pre


@triton.jit
def conv_kernel(
    out,  # (data, strides along batch, token, channel)
    x,
    weight,  # [D, WIDTH] float32
    bias,  # [D], or None
    order,  # [L] int32, or None
    first,  # [L] int32, or None
    L,
    D,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, _, step, d = place(L, D, STEPS, CHANNELS)
    inside = step < L
    start = first_of(first, step, inside)
    y = preactivation(x, weight, bias, order, sample, start, step, d, L, D, WIDTH)
    if SILU:
        y *= sigmoid(y)
    at = out[0] + sample * out[1] + tokens_of(order, step, inside) * out[2] + d * out[3]
    tl.store(at, narrow(y, out[0].dtype.element_ty), mask=inside & (d < D))


@triton.jit
def slope_kernel(
    slope,  # [B, L, D] float32, steps in their order
    dweight,  # [B blocks, WIDTH, D] float32
    dbias,  # [B blocks, D], or None
    dout,
    x,
    weight,
    bias,
    order,
    first,
    L,
    D,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, block, step, d = place(L, D, STEPS, CHANNELS)
    inside = step < L
    start = first_of(first, step, inside)
    g = taken(dout, order, sample, 0, step, d, L, D)
    if SILU:
        pre = preactivation(x, weight, bias, order, sample, start, step, d, L, D, WIDTH)
        sig = sigmoid(pre)
        g *= sig * (1.0 + pre * (1.0 - sig))
    tl.store(slope + (sample * L + step) * D + d, g, mask=inside & (d < D))
    part = sample * tl.cdiv(L, STEPS) + block
    for w in tl.static_range(WIDTH):
        v = taken(x, order, sample, start, step - (WIDTH - 1 - w), d, L, D)
        total = tl.sum(g * v, 0, keep_dims=True)
        tl.store(dweight + (part * WIDTH + w) * D + d, total, mask=d < D)
    if dbias is not None:
        tl.store(dbias + part * D + d, tl.sum(g, 0, keep_dims=True), mask=d < D)


@triton.jit
def spread_kernel(
    dx,
    slope,
    weight,
    order,
    first,
    L,
    D,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, _, step, d = place(L, D, STEPS, CHANNELS)
    inside = step < L
    y = tl.full([STEPS, CHANNELS], 0.0, tl.float32)
    for w in tl.static_range(WIDTH):
        to = step + (WIDTH - 1 - w)
        there = to < L
        if first is not None:  # of the same sequence
            there = there & (first_of(first, to, there) <= step)
        g = tl.load(slope + (sample * L + to) * D + d, mask=there & (d < D), other=0.0)
        y += tl.load(weight + d * WIDTH + w, mask=d < D, other=0.0) * g
    at = dx[0] + sample * dx[1] + tokens_of(order, step, inside) * dx[2] + d * dx[3]
    tl.store(at, narrow(y, dx[0].dtype.element_ty), mask=inside & (d < D))


def first_table(offsets: Tensor | None, L: int) -> Tensor | None:
    """The first step [L] of each step's sequence, int32."""
    sequence = sequence_table(offsets, L)
    return None if offsets is None or sequence is None else offsets[sequence]


def strided(t: Tensor) -> tuple[Any, ...]:
    return (t, *t.stride())


def tiled(x: Tensor, weight: Tensor, **more: Any) -> tuple[int, dict[str, Any]]:
    """Programs, and the constants of every kernel."""
    batch, L, D = x.shape
    programs = batch * cdiv(L, STEPS) * cdiv(D, CHANNELS)
    return programs, {"WIDTH": weight.shape[1], "STEPS": STEPS, "CHANNELS": CHANNELS, **more}


def conv_launches(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> list[Launch]:
    check_float("causal_conv1d", weight, bias)
    if x.numel() == 0:
        return []
    _, L, D = x.shape
    programs, constants = tiled(x, weight, SILU=silu)
    args = (strided(out), strided(x), weight, bias, order, first_table(offsets, L), L, D)
    return [Launch(conv_kernel, programs, args, constants, WARPS)]


def backward_launches(
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> tuple[list[Launch], Tensor]:
    """The launches, and dweight [WIDTH, D] as they leave it."""
    batch, L, D = x.shape
    first, blocks = first_table(offsets, L), batch * cdiv(L, STEPS)
    slope = weight.new_empty(batch, L, D)
    turned = weight.new_empty(weight.shape[1], D)
    weights = weight.new_empty(blocks, *turned.shape)
    biases = None if dbias is None else weight.new_empty(blocks, D)
    programs, constants = tiled(x, weight)
    sources = (slope, weights, biases, strided(dout), strided(x), weight, bias, order, first, L, D)
    targets = (strided(dx), slope, weight, order, first, L, D)
    launches = [
        Launch(slope_kernel, programs, sources, {**constants, "SILU": silu}, WARPS),
        Launch(spread_kernel, programs, targets, constants, WARPS),
        add_launch(turned, weights),
    ]
    if dbias is not None and biases is not None:
        launches.append(add_launch(dbias, biases))
    return launches, turned


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def causal_conv1d(out: Tensor, *args: Any) -> None:
    run(conv_launches(out, *args), out)


def causal_conv1d_backward(
    dx: Tensor, dweight: Tensor, dbias: Tensor | None, dout: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> None:
    check_float("causal_conv1d_backward", dweight, dbias, weight, args[0])
    if x.numel() == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        return
    launches, turned = backward_launches(dx, dweight, dbias, dout, x, weight, *args)
    run(launches, dx)
    dweight.copy_(turned.T)
