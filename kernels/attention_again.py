"""Blocks of attention once more, where a mask keeps out a NaN or an infinity.

A product takes in what a mask keeps out, times 0; of a NaN that is a NaN. So a block whose plan has masks and
whose result holds a NaN is computed here a second time: masked tiles add one token after the other, where it
is seen. Blocks without a NaN never come here, and the main walks know nothing of it: what is used here is
computed here, from `zero`, a 0 out of memory that the compiler cannot see through, so that no register holds
it before. To need few of them, it goes by STEP tokens, and through all of them for every PIECE features.
"""

from __future__ import annotations

import triton.language as tl

from pydiffuse.kernels.attention_tile import (
    LOG2E,
    across,
    base_of,
    block_of,
    down,
    head_at,
    like,
    mask_words,
    span_of,
    spans_of,
    tokens_of,
    weights_of,
    wide,
    words_of,
)
from pydiffuse.kernels.common import inner, integers, narrow

STEP = tl.constexpr(32)  # a mask's word
PIECE = tl.constexpr(32)


@inner
def any_nan(parts):
    # 0 times anything else, and the sum of such, is 0; of an infinity it is a NaN, too: no matter.
    total = tl.sum(parts[0] * 0.0, 1)
    for i in tl.static_range(1, len(parts)):
        total += tl.sum(parts[i] * 0.0, 1)
    total = tl.sum(total, 0)
    return total != total


@inner
def piece_of(at, t, tokens, live, start, D: tl.constexpr):
    feature = start + tl.arange(0, PIECE)
    inside = live[:, None] & (feature < D)[None, :]
    return at + (tokens * t[3])[:, None] + feature[None, :], inside


@inner
def write_piece(at, t, tokens, live, start, x, D: tl.constexpr):
    to, inside = piece_of(at, t, tokens, live, start, D)
    tl.store(to, narrow(x, t[0].dtype.element_ty), mask=inside)


@inner
def products(
    a_at, a, a_tokens, a_live, b_at, b, b_tokens, b_live, D: tl.constexpr, PRECISION: tl.constexpr
):
    # [tokens of a, tokens of b], piece by piece.
    s = tl.zeros([a_tokens.shape[0], b_tokens.shape[0]], tl.float32)
    for start in tl.range(0, D, PIECE, num_stages=1):
        from_a, inside_a = piece_of(a_at, a, a_tokens, a_live, start, D)
        from_b, inside_b = piece_of(b_at, b, b_tokens, b_live, start, D)
        x = wide(tl.load(from_a, mask=inside_a, other=0.0))
        y = wide(tl.load(from_b, mask=inside_b, other=0.0))
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s


@inner
def add_seen(
    sums, weights, keep, masked, at, t, tokens, live, start, D: tl.constexpr, PRECISION: tl.constexpr
):
    # sums [rows, PIECE] + weights [rows, STEP] times features of the tokens, where `keep` holds.
    weights = like(weights, t)
    if masked:
        lane = tl.arange(0, STEP)
        feature = start + tl.arange(0, PIECE)
        for j in tl.range(0, STEP, num_stages=1):
            own = lane == j
            token = tl.sum(tl.where(own, tokens, 0), 0)
            there = tl.sum(tl.where(own & live, 1, 0), 0) > 0
            row = tl.load(at + token * t[3] + feature, mask=there & (feature < D), other=0.0).to(
                tl.float32
            )
            weight = tl.sum(tl.where(own[None, :], weights, 0.0).to(tl.float32), 1)
            seen = tl.max(tl.where(own[None, :] & keep, 1, 0), 1) > 0
            sums += tl.where(seen[:, None], weight[:, None] * row[None, :], 0.0)
    else:
        to, inside = piece_of(at, t, tokens, live, start, D)
        sums = tl.dot(weights, wide(tl.load(to, mask=inside, other=0.0)), sums, input_precision=PRECISION)
    return sums


@inner
def again(side, sizes):
    zero = tl.load(side[0])  # where the first tile begins
    B, heads, group, head_plans, S = integers(sizes)
    return zero, B, heads, group, head_plans, S


@inner
def own_tokens(order, first, last, ROWS: tl.constexpr):
    position = first + tl.arange(0, ROWS)
    inside = position < last
    return position, inside, tokens_of(order, position, inside)


@inner
def seen_keys(words, mask, row, begin, at, end, inside, lane):
    # Of step `at` of a span: the keys that are there, and which row sees which.
    live = at + lane < end
    word = (at - begin) // 32 + tl.arange(0, 1)
    w = words_of(words, mask, row[:, None], word[None, :], (end - begin + 31) // 32, inside[:, None])
    return live, live[None, :] & across(w)


@inner
def attend_again(
    out, q, k, v, scales, scale, sizes, side, masks, order,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A block of queries' output; its lse is right as it is.
    zero, B, H, group, head_plans, _S = again(side, sizes)
    b, h, tile, first, last = block_of(tl.program_id(0) + zero, side, B, H, head_plans, ROWS, PARTS)
    position, inside, token = own_tokens(order, first, last, ROWS)
    if scales is not None:
        scale = tl.load(scales + h)
    factor = scale * LOG2E
    q_at, out_at = head_at(q, b, h, VECTOR), head_at(out, b, h, VECTOR)
    k_at, v_at = head_at(k, b, h // group, VECTOR), head_at(v, b, h // group, VECTOR)
    row = position - tl.load(side[0] + tile)
    lane = zero + tl.arange(0, STEP)
    from_span, stop = spans_of(side, h * head_plans, tile)
    for start in range(0, D, PIECE):
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, PIECE], tl.float32)
        for span in range(from_span, stop):
            begin, _whole, end, mask = span_of(side, span, STEP)
            words = mask_words(masks, mask)
            for at in tl.range(begin, end, STEP, num_stages=1):
                live, keep = seen_keys(words, mask, row, begin, at, end, inside, lane)
                keys = tokens_of(order, at + lane, live)
                s = products(q_at, q, token, inside, k_at, k, keys, live, D, PRECISION) * factor
                s = tl.where(keep, s, float("-inf"))
                new = tl.maximum(largest, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp2(s - base[:, None])
                shrink = tl.exp2(largest - base)
                total = total * shrink + tl.sum(p, 1)
                sums = add_seen(
                    sums * shrink[:, None], p, keep, mask >= 0, v_at, v, keys, live, start, D, PRECISION
                )
                largest = new
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        write_piece(out_at, out, token, inside, start, sums * inverse[:, None], D)


@inner
def queries_again(
    dq, q, k, v, dout, lse, delta, scales, scale, sizes, side, masks, order,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A block of queries' gradient.
    zero, B, H, group, head_plans, S = again(side, sizes)
    b, h, tile, first, last = block_of(tl.program_id(0) + zero, side, B, H, head_plans, ROWS, PARTS)
    position, inside, token = own_tokens(order, first, last, ROWS)
    if scales is not None:
        scale = tl.load(scales + h)
    q_at, dout_at, dq_at = (
        head_at(q, b, h, VECTOR),
        head_at(dout, b, h, VECTOR),
        head_at(dq, b, h, VECTOR),
    )
    k_at, v_at = head_at(k, b, h // group, VECTOR), head_at(v, b, h // group, VECTOR)
    query = (b * H + h) * S + token
    lse_row = base_of(tl.load(lse + query, mask=inside, other=0.0))[:, None]
    delta_row = tl.load(delta + query, mask=inside, other=0.0)[:, None]
    row = position - tl.load(side[0] + tile)
    lane = zero + tl.arange(0, STEP)
    from_span, stop = spans_of(side, h * head_plans, tile)
    for start in range(0, D, PIECE):
        sums = tl.zeros([ROWS, PIECE], tl.float32)
        for span in range(from_span, stop):
            begin, _whole, end, mask = span_of(side, span, STEP)
            words = mask_words(masks, mask)
            for at in tl.range(begin, end, STEP, num_stages=1):
                live, keep = seen_keys(words, mask, row, begin, at, end, inside, lane)
                keys = tokens_of(order, at + lane, live)
                s = products(q_at, q, token, inside, k_at, k, keys, live, D, PRECISION)
                dp = products(dout_at, dout, token, inside, v_at, v, keys, live, D, PRECISION)
                p = weights_of(s, lse_row, keep, scale * LOG2E)
                ds = tl.where(keep, p * (dp - delta_row), 0.0)
                sums = add_seen(sums, ds, keep, mask >= 0, k_at, k, keys, live, start, D, PRECISION)
        write_piece(dq_at, dq, token, inside, start, sums * scale, D)


@inner
def keys_again(
    grad, q, k, v, dout, lse, delta, scales, scale, sizes, side, masks, order,
    PARTS: tl.constexpr, ROWS: tl.constexpr, DK: tl.constexpr,
    D: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A block of keys' gradient: dk, or without DK dv.
    zero, B, Hk, group, head_plans, S = again(side, sizes)
    b, hk, tile, first, last = block_of(
        tl.program_id(0) + zero, side, B, Hk, group * head_plans, ROWS, PARTS
    )
    _position, inside, token = own_tokens(order, first, last, ROWS)
    k_at, v_at, grad_at = (
        head_at(k, b, hk, VECTOR),
        head_at(v, b, hk, VECTOR),
        head_at(grad, b, hk, VECTOR),
    )
    tile_begin, tile_end = tl.load(side[0] + tile), tl.load(side[0] + tile + 1)
    word = (first - tile_begin) // 32 + tl.arange(0, ROWS // 32)
    per_row = (tile_end - tile_begin + 31) // 32
    lane = zero + tl.arange(0, STEP)
    for start in range(0, D, PIECE):
        sums = tl.zeros([ROWS, PIECE], tl.float32)
        for h in range(hk * group, (hk + 1) * group):
            weight = scale
            if scales is not None:
                weight = tl.load(scales + h)
            q_at, dout_at = head_at(q, b, h, VECTOR), head_at(dout, b, h, VECTOR)
            row = (b * Hk * group + h) * S
            begins, stop = spans_of(side, h * head_plans, tile)
            for span in range(begins, stop):
                begin, _whole, end, mask = span_of(side, span, STEP)
                words = mask_words(masks, mask)
                for at in tl.range(begin, end, STEP, num_stages=1):
                    live = at + lane < end
                    query = at - begin + lane
                    keep = live[None, :] & down(
                        words_of(words, mask, query[None, :], word[:, None], per_row, live[None, :])
                    )
                    queries = tokens_of(order, at + lane, live)
                    s = products(k_at, k, token, inside, q_at, q, queries, live, D, PRECISION)
                    lse_row = tl.load(lse + row + queries, mask=live, other=0.0)
                    p = weights_of(s, base_of(lse_row)[None, :], keep, weight * LOG2E)
                    if DK:
                        dp = products(v_at, v, token, inside, dout_at, dout, queries, live, D, PRECISION)
                        delta_row = tl.load(delta + row + queries, mask=live, other=0.0)
                        ds = tl.where(keep, p * (dp - delta_row[None, :]), 0.0) * weight
                        sums = add_seen(
                            sums, ds, keep, mask >= 0, q_at, q, queries, live, start, D, PRECISION
                        )
                    else:
                        sums = add_seen(
                            sums, p, keep, mask >= 0, dout_at, dout, queries, live, start, D, PRECISION
                        )
        write_piece(grad_at, grad, token, inside, start, sums, D)
