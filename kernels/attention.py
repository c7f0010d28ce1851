"""Tile attention in Triton: what a plan keeps, and nothing else.

forward_kernel    a program per block of queries, head and sample, walks the spans of keys that the block's
                  tile sees: whole steps of full spans without a mask, ends of spans and masked spans with one.
                  Softmax online in base 2, sums in float32.
The backward      (attention_backward.py) recomputes: a kernel for dk and dv over blocks of keys, one for dq.
attention_again   what a kernel does with a block that a NaN came into past a mask.

Every element of an output belongs to one program, which adds in the plan's order: no atomics, and the same
bits in every run and in every batch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.attention_again import any_nan, attend_again
from pydiffuse.kernels.attention_backward import backward_launches
from pydiffuse.kernels.attention_tile import (
    LN2,
    LOG2E,
    Arguments,
    across,
    add_products,
    block_of,
    check_sides,
    head_at,
    heads,
    inner_products,
    like,
    mask_words,
    read,
    scaled,
    side_of,
    span_of,
    spans_of,
    tile_of,
    tokens_of,
    vector_of,
    words_of,
    write,
    zeros,
)
from pydiffuse.kernels.common import Launch, inner, integers, run, unspecialised


@inner
def attend(
    state, q, k, k_at, v, v_at, tokens, live, keep, factor,
    SIGNED: tl.constexpr, D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One step of keys. state: the largest score of each row so far; the sums of 2^(score - largest), and
    # of these times v.
    largest, total, sums = state
    s = inner_products(q, read(k_at, k, tokens, live, D, WIDEST, VECTOR), D, WIDEST, PRECISION)
    if keep is None and not SIGNED:
        new = tl.maximum(largest, tl.max(s, 1) * factor)
    else:
        s *= factor
        if keep is not None:
            s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # of rows that have seen nothing yet
    if keep is None and not SIGNED:
        p = tl.exp2(s * factor - base[:, None])  # one instruction for both
    else:
        p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(largest - base)
    sums = scaled(sums, shrink[:, None], D, WIDEST)
    rows = read(v_at, v, tokens, live, D, WIDEST, VECTOR)
    return new, total * shrink + tl.sum(p, 1), add_products(sums, like(p, v), rows, D, WIDEST, PRECISION)


@triton.jit
def forward_kernel(
    out,  # [B, H, S, D] and its strides, as q, k, v
    lse,  # [B, H, S] float32, or None
    q,
    k,
    v,
    scales,  # [H] float32, or None: all are `scale`
    scale,
    sizes,  # B, H, H / Hk, 1 for a plan per head or 0, S
    side,  # the plan from the queries' side
    masks,  # words and where masks begin, or None
    order,  # [S] int32, or None
    SIGNED: tl.constexpr,  # whether scales may be negative: the largest product is not the largest score
    D: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B, H, group, head_plans, S = integers(sizes)
    b, h, tile, first, last = block_of(tl.program_id(0), side, B, H, head_plans, ROWS, PARTS)
    if PARTS > 1:
        if first >= last:
            return
    position = first + tl.arange(0, ROWS)
    inside = position < last
    token = tokens_of(order, position, inside)
    rows = read(head_at(q, b, h, VECTOR), q, token, inside, D, WIDEST, VECTOR)
    factor = scale * LOG2E
    if scales is not None:
        factor = tl.load(scales + h) * LOG2E
    k_at, v_at = head_at(k, b, h // group, VECTOR), head_at(v, b, h // group, VECTOR)
    row = position - tl.load(side[0] + tile)
    lowest = tl.full([ROWS], float("-inf"), tl.float32)
    state = (lowest, tl.zeros([ROWS], tl.float32), zeros(ROWS, D, WIDEST))
    lane = tl.arange(0, STEP)
    start, stop = spans_of(side, h * head_plans, tile)
    for span in range(start, stop):
        begin, whole, end, mask = span_of(side, span, STEP)
        for at in range(begin, whole, STEP):
            keys = tokens_of(order, at + lane, None)
            state = attend(
                state, rows, k, k_at, v, v_at, keys, None, None, factor, SIGNED, D, WIDEST, VECTOR, PRECISION,
            )  # fmt: skip
        if masks is not None:
            words = mask_words(masks, mask)
        for at in range(whole, end, STEP):
            live = at + lane < end
            keep = live[None, :]
            if masks is not None:
                word = (at - begin) // 32 + tl.arange(0, STEP // 32)
                per_row = (end - begin + 31) // 32
                w = words_of(words, mask, row[:, None], word[None, :], per_row, inside[:, None])
                keep &= across(w)
            keys = tokens_of(order, at + lane, live)
            state = attend(
                state, rows, k, k_at, v, v_at, keys, live, keep, factor, SIGNED, D, WIDEST, VECTOR, PRECISION,
            )  # fmt: skip
    largest, total, sums = state
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)  # a row that sees nothing is 0
    sums = scaled(sums, inverse[:, None], D, WIDEST)
    out_at = head_at(out, b, h, VECTOR)
    write(out_at, out, token, inside, sums, D, WIDEST, VECTOR)
    if lse is not None:
        value = tl.where(largest == float("inf"), largest, (largest + tl.log2(total)) * LN2)
        tl.store(lse + (b * H + h) * S + token, value, mask=inside)
    if masks is not None:
        if any_nan(sums):
            attend_again(
                out, q, k, v, scales, scale, sizes, side, masks, order,
                PARTS, ROWS, D, VECTOR, PRECISION,
            )  # fmt: skip


def forward_launches(out: Tensor, lse: Tensor | None, a: Arguments) -> list[Launch]:
    B, H, S, D = a.q.shape
    check_sides("tile_attention", (out, a.q, a.k, a.v), (lse,))
    tile, side = tile_of("forward", a), a.by_q
    sizes = unspecialised(B, H, H // a.k.shape[1], int(side.blocks.shape[0] > 1), S)
    args = (
        heads(out), lse, heads(a.q), heads(a.k), heads(a.v), a.scales, a.scale, sizes, side_of(side),
        a.masks, a.plan.order,
    )  # fmt: skip
    constants = tile.constants(D, vector_of((out, a.q, a.k, a.v)))
    constants["SIGNED"] = a.scales is not None or a.scale < 0
    programs = side.blocks.shape[1] * constants["PARTS"] * B * H
    return [Launch(forward_kernel, programs, args, constants, tile.warps, tile.stages, tile.registers)]


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def tile_attention(out: Tensor, lse: Tensor | None, *args: Any) -> None:
    if out.numel():
        run(forward_launches(out, lse, Arguments.of(*args)), out)


def tile_attention_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> None:
    if not dq.numel():  # key heads that no query head uses
        dk.zero_()
        dv.zero_()
    else:
        run(backward_launches(dq, dk, dv, dout, dlse, out, lse, Arguments.of(*args)), dq)
