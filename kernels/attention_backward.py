"""The backward of tile attention in Triton: recomputed from q, k, v and lse.

delta_kernel     delta = <dout, out> - dlse, of every query.
dkv_kernel       a program per block of keys, key head and sample walks the spans of queries that see it,
                 the heads of its group one after the other; scores stand transposed, [keys, queries].
                 Where D is beyond 128, registers hold one of the two sums: two launches.
dq_kernel        a program per block of queries, as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.attention_again import any_nan, keys_again, queries_again
from pydiffuse.kernels.attention_tile import (
    LOG2E,
    Arguments,
    across,
    add_products,
    base_of,
    block_of,
    check_sides,
    down,
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
    weights_of,
    words_of,
    write,
    zeros,
)
from pydiffuse.kernels.common import INTERPRETED, Launch, cdiv, inner, integers, unspecialised


@triton.jit(do_not_specialize=["heads", "S", "blocks"])
def delta_kernel(
    delta,  # [B, H, S] float32
    dlse,  # [B, H, S] float32, or None
    dout,  # [B, H, S, D] and its strides, as out
    out,
    heads,
    S,
    blocks,  # of a head
    D: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head, first = program // blocks, program % blocks * ROWS
    b, h = head // heads, head % heads
    token = first + tl.arange(0, ROWS)
    live = token < S
    slope = read(head_at(dout, b, h, VECTOR), dout, token, live, D, WIDEST, VECTOR)
    value = read(head_at(out, b, h, VECTOR), out, token, live, D, WIDEST, VECTOR)
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(slope)):
        total += tl.sum(slope[i].to(tl.float32) * value[i].to(tl.float32), 1)
    at = head * S + token
    if dlse is not None:
        total -= tl.load(dlse + at, mask=live, other=0.0)
    tl.store(delta + at, total, mask=live)


@inner
def add_to_keys(
    sums, k_rows, v_rows, q, q_at, dout, dout_at, lse, delta, tokens, live, keep, factor, weight,
    DK: tl.constexpr, DV: tl.constexpr,
    D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One step of queries. Of one past its span p is 2^-inf. sums: of dk, of dv, or of both; no tuple holds
    # None, which Triton 3.6 cannot return.
    other = None if live is None else float("inf")
    lse_row = base_of(tl.load(lse + tokens, mask=live, other=other))
    delta_row = tl.load(delta + tokens, mask=live, other=None if live is None else 0.0)
    rows = read(q_at, q, tokens, live, D, WIDEST, VECTOR)
    s = inner_products(k_rows, rows, D, WIDEST, PRECISION)
    out_rows = read(dout_at, dout, tokens, live, D, WIDEST, VECTOR)
    p = weights_of(s, lse_row[None, :], keep, factor)
    if DK:
        dp = inner_products(v_rows, out_rows, D, WIDEST, PRECISION)
        ds = p * (dp - delta_row[None, :])
        if weight is not None:
            ds *= weight
        dk = add_products(sums[0], like(ds, q), rows, D, WIDEST, PRECISION)
    if DV:
        dv = add_products(sums[len(sums) - 1], like(p, dout), out_rows, D, WIDEST, PRECISION)
    if DK and DV:
        return dk, dv
    elif DK:
        return (dk,)
    else:
        return (dv,)


@triton.jit
def dkv_kernel(
    dk,  # [B, Hk, Sk, D] and its strides, as dv, k, v; or None: another launch writes it
    dv,
    dout,  # [B, H, S, D], as q
    lse,  # [B, H, S] float32, as delta
    delta,
    q,
    k,
    v,
    scales,  # [H] float32, or None: all are `scale`
    scale,
    sizes,  # B, Hk, H / Hk, 1 for a plan per head or 0, S
    side,  # the plan from the keys' side
    masks,
    order,
    D: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B, Hk, group, head_plans, S = integers(sizes)
    b, hk, tile, first, last = block_of(tl.program_id(0), side, B, Hk, group * head_plans, ROWS, PARTS)
    if PARTS > 1:
        if first >= last:
            return
    position = first + tl.arange(0, ROWS)
    inside = position < last
    token = tokens_of(order, position, inside)
    k_at, v_at = head_at(k, b, hk, VECTOR), head_at(v, b, hk, VECTOR)
    k_rows = read(k_at, k, token, inside, D, WIDEST, VECTOR)
    DK: tl.constexpr = dk is not None
    DV: tl.constexpr = dv is not None
    v_rows, sums = None, ()
    if DK:
        v_rows = read(v_at, v, token, inside, D, WIDEST, VECTOR)
        sums = sums + (zeros(ROWS, D, WIDEST),)
    if DV:
        sums = sums + (zeros(ROWS, D, WIDEST),)
    tile_begin, tile_end = tl.load(side[0] + tile), tl.load(side[0] + tile + 1)
    word = (first - tile_begin) // 32 + tl.arange(0, ROWS // 32)
    per_row = (tile_end - tile_begin + 31) // 32
    lane = tl.arange(0, STEP)
    for h in range(hk * group, (hk + 1) * group):
        if scales is None:
            weight, factor = None, scale * LOG2E
        else:
            weight = tl.load(scales + h)
            factor = weight * LOG2E
        q_at, dout_at = head_at(q, b, h, VECTOR), head_at(dout, b, h, VECTOR)
        row = (b * Hk * group + h) * S
        start, stop = spans_of(side, h * head_plans, tile)
        for span in range(start, stop):
            begin, whole, end, mask = span_of(side, span, STEP)
            for at in range(begin, whole, STEP):
                queries = tokens_of(order, at + lane, None)
                sums = add_to_keys(
                    sums, k_rows, v_rows, q, q_at, dout, dout_at, lse + row, delta + row, queries, None, None,
                    factor, weight, DK, DV, D, WIDEST, VECTOR, PRECISION,
                )  # fmt: skip
            if masks is not None:
                words = mask_words(masks, mask)
            for at in range(whole, end, STEP):
                live = at + lane < end
                keep = None
                if masks is not None:
                    query = at - begin + lane
                    keep = down(
                        words_of(words, mask, query[None, :], word[:, None], per_row, live[None, :])
                    )
                queries = tokens_of(order, at + lane, live)
                sums = add_to_keys(
                    sums, k_rows, v_rows, q, q_at, dout, dout_at, lse + row, delta + row, queries, live, keep,
                    factor, weight, DK, DV, D, WIDEST, VECTOR, PRECISION,
                )  # fmt: skip
    parts = sums[0]
    if DK and DV:
        parts = parts + sums[1]
    bad = any_nan(parts)
    if DK:
        dk_sums = sums[0]
        if scales is None:
            dk_sums = scaled(dk_sums, scale, D, WIDEST)
        write(head_at(dk, b, hk, VECTOR), dk, token, inside, dk_sums, D, WIDEST, VECTOR)
    if DV:
        dv_sums = sums[len(sums) - 1]
        write(head_at(dv, b, hk, VECTOR), dv, token, inside, dv_sums, D, WIDEST, VECTOR)
    if masks is not None:
        if bad:
            if DK:
                keys_again(
                    dk, q, k, v, dout, lse, delta, scales, scale, sizes, side, masks, order,
                    PARTS, ROWS, True, D, VECTOR, PRECISION,
                )  # fmt: skip
            if DV:
                keys_again(
                    dv, q, k, v, dout, lse, delta, scales, scale, sizes, side, masks, order,
                    PARTS, ROWS, False, D, VECTOR, PRECISION,
                )  # fmt: skip


@inner
def add_to_queries(
    sums, own, k, k_at, v, v_at, lse, delta, tokens, live, keep, factor,
    D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_rows, out_rows = own
    rows = read(k_at, k, tokens, live, D, WIDEST, VECTOR)
    s = inner_products(q_rows, rows, D, WIDEST, PRECISION)
    v_rows = read(v_at, v, tokens, live, D, WIDEST, VECTOR)
    dp = inner_products(out_rows, v_rows, D, WIDEST, PRECISION)
    ds = weights_of(s, lse[:, None], keep, factor) * (dp - delta[:, None])
    return add_products(sums, like(ds, k), rows, D, WIDEST, PRECISION)


@triton.jit
def dq_kernel(
    dq,  # [B, H, S, D] and its strides, as dout, q
    dout,
    lse,  # [B, H, S] float32, as delta
    delta,
    q,
    k,  # [B, Hk, Sk, D], as v
    v,
    scales,  # [H] float32, or None: all are `scale`
    scale,
    sizes,  # B, H, H / Hk, 1 for a plan per head or 0, S
    side,  # the plan from the queries' side
    masks,
    order,
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
    q_at, dout_at = head_at(q, b, h, VECTOR), head_at(dout, b, h, VECTOR)
    own = (
        read(q_at, q, token, inside, D, WIDEST, VECTOR),
        read(dout_at, dout, token, inside, D, WIDEST, VECTOR),
    )
    query = (b * H + h) * S + token
    lse_row = base_of(tl.load(lse + query, mask=inside, other=0.0))
    delta_row = tl.load(delta + query, mask=inside, other=0.0)
    own_scale = scale
    if scales is not None:
        own_scale = tl.load(scales + h)
    factor = own_scale * LOG2E
    k_at, v_at = head_at(k, b, h // group, VECTOR), head_at(v, b, h // group, VECTOR)
    row = position - tl.load(side[0] + tile)
    sums = zeros(ROWS, D, WIDEST)
    lane = tl.arange(0, STEP)
    start, stop = spans_of(side, h * head_plans, tile)
    for span in range(start, stop):
        begin, whole, end, mask = span_of(side, span, STEP)
        for at in range(begin, whole, STEP):
            keys = tokens_of(order, at + lane, None)
            sums = add_to_queries(
                sums, own, k, k_at, v, v_at, lse_row, delta_row, keys, None, None, factor, D, WIDEST, VECTOR, PRECISION,
            )  # fmt: skip
        if masks is not None:
            words = mask_words(masks, mask)
        for at in range(whole, end, STEP):
            live = at + lane < end
            keep = live[None, :]
            if masks is not None:
                word = (at - begin) // 32 + tl.arange(0, STEP // 32)
                per_row = (end - begin + 31) // 32
                keep &= across(
                    words_of(words, mask, row[:, None], word[None, :], per_row, inside[:, None])
                )
            keys = tokens_of(order, at + lane, live)
            sums = add_to_queries(
                sums, own, k, k_at, v, v_at, lse_row, delta_row, keys, live, keep, factor, D, WIDEST, VECTOR, PRECISION,
            )  # fmt: skip
    write(
        head_at(dq, b, h, VECTOR),
        dq,
        token,
        inside,
        scaled(sums, own_scale, D, WIDEST),
        D,
        WIDEST,
        VECTOR,
    )
    if masks is not None:
        if any_nan(sums):
            queries_again(
                dq, q, k, v, dout, lse, delta, scales, scale, sizes, side, masks, order,
                PARTS, ROWS, D, VECTOR, PRECISION,
            )  # fmt: skip


def backward_launches(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments
) -> list[Launch]:  # fmt: skip
    B, H, S, D = a.q.shape
    Hk = a.k.shape[1]
    check_sides("tile_attention_backward", (dq, dk, dv, dout, out, a.q, a.k, a.v), (dlse, lse))
    vector = vector_of((dq, dk, dv, dout, out, a.q, a.k, a.v))
    per_head = int(a.by_q.blocks.shape[0] > 1)
    delta = torch.empty_like(lse)
    rows = 256 if INTERPRETED else 32
    blocks = cdiv(S, rows)
    launches = [
        Launch(
            delta_kernel, B * H * blocks, (delta, dlse, heads(dout), heads(out), H, S, blocks),
            {"D": D, "WIDEST": 256, "ROWS": rows, "VECTOR": vector}, 4,
        )
    ]  # fmt: skip
    inputs = (heads(dout), lse, delta, heads(a.q), heads(a.k), heads(a.v), a.scales, a.scale)
    both = heads(dk), heads(dv)
    sums = {"dkv": both} if D <= 128 else {"dk": (both[0], None), "dv": (None, both[1])}
    for kernel, name, grads, side, owners in (
        *((dkv_kernel, name, grads, a.by_k, Hk) for name, grads in sums.items()),
        (dq_kernel, "dq", (heads(dq),), a.by_q, H),
    ):
        tile = tile_of(name, a)
        sizes = unspecialised(B, owners, H // Hk, per_head, S)
        args = (*grads, *inputs, sizes, side_of(side), a.masks, a.plan.order)
        constants = tile.constants(D, vector)
        programs = side.blocks.shape[1] * constants["PARTS"] * B * owners
        launches.append(
            Launch(kernel, programs, args, constants, tile.warps, tile.stages, tile.registers)
        )
    return launches
