"""The states between chunks of a scan, so that chunks can run side by side: forward the state that
enters each from the left, backward the gradient that enters from the right.

local_kernel  a program (sample, block of states, path, chunk, block of channels) walks its chunk from 0:
              where it ends, and the sum of delta. The chunk then takes a state h to
              exp(A sum) h + end, or to end if a sequence starts in it.
carry_kernel  a program (sample, path, block of channels x states) walks over the chunks and makes of each
              end the state that enters the next.

Whether a scan is cut depends on its length alone: neighbours in the batch change no bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.structs import ScanArguments
from pydiffuse.kernels.common import WARPS, Launch, cdiv, integers
from pydiffuse.kernels.scan_tile import (
    CHUNK,
    LOG2E,
    UNROLL,
    Sizes,
    Tile,
    cells,
    channels_of,
    given_state,
    known_of,
    read,
    rows_of,
    sequence_before,
    sigmoid,
    states_of,
    step_size,
    token_of,
    tokens,
    tokens_at,
    weights,
    weights_at,
)

CARRY_BLOCK = 256


@triton.jit(do_not_specialize=["one"])
def local_kernel(
    ends,  # [B, K, chunks, D, N] float32: each in the place of the chunk that it enters
    sums,  # [B, K, chunks, D] float32
    x,  # tokens: u; reverse: dout
    z,  # tokens; reverse only
    delta,
    A,  # [K, D, N]
    w,  # weights: B; reverse: C
    bias,  # [K, D]
    given,  # [B, S, K, D, N]: initial; reverse: dlast
    order,  # [K, L] int32
    sequence,  # [L] int32
    sizes,
    one,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    NR: tl.constexpr,
    DR: tl.constexpr,
    NL: tl.constexpr,
    DL: tl.constexpr,
):
    L, D, K, S, chunks, groups, group_size, per_group, _batch = integers(sizes)
    program = tl.program_id(0).to(tl.int64)
    blocks = groups * per_group
    group, _part, d, live = channels_of(program % blocks, per_group, group_size, DR, DL)
    chunk = program // blocks % (chunks - 1)
    path = program // (blocks * (chunks - 1)) % K
    rest = program // (blocks * (chunks - 1) * K)
    if REVERSE:
        chunk += 1
    STATES: tl.constexpr = (N + NR * NL - 1) // (NR * NL)
    sample, state_block = rest // STATES, rest % STATES
    n = states_of(state_block, NR, NL)
    known = known_of(n, N, NR, NL)
    mask = live & known
    cell = cells(d, state_block, one, N, NR, NL)

    scale = tl.load(A + path * D * N + cell, mask=mask, other=0.0) * LOG2E
    if bias is not None:
        bias = tl.load(bias + path * D + d, mask=live, other=0.0)
    x_at, delta_at = tokens_at(x, sample, 0, d), tokens_at(delta, sample, path, d)
    w_at = weights_at(w, sample, path, group, n, D * N, cell, mask)
    if z is not None:
        z_at = tokens_at(z, sample, 0, d)

    start = chunk * CHUNK
    steps = tl.minimum(L - start, CHUNK).to(tl.int32)
    h = tl.full([NR, DR, NL, DL], 0.0, tl.float32)
    total = tl.full([1, DR, 1, DL], 0.0, tl.float32)
    now = sequence_before(sequence, start + steps if REVERSE else start)
    for first in range(0, steps, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            inside = first + i < steps
            here = live & inside
            step = start + (steps - 1 - first - i if REVERSE else first + i)
            token = token_of(order, path, step, L, inside)
            v = read(x, x_at, token, here)
            dt = read(delta, delta_at, token, here)
            if z is not None:
                gate = read(z, z_at, token, here)
                v *= gate * sigmoid(gate)
            rows = rows + ((inside, here, step, token, v, dt),)
        for i in tl.static_range(UNROLL):
            inside, here, step, token, v, dt = rows[i]
            dt, _raw = step_size(dt, bias, inside, SOFTPLUS)
            total += dt
            a = tl.exp2(dt * scale)
            row = weights(w, w_at, token, known & inside)
            if REVERSE:
                h = a * (h + v * row)
                if sequence is not None:
                    s = tl.where(inside, sequence_before(sequence, step), now)
                    if s != now:
                        h = given_state(given, sample, s, S, K, path, D * N, cell, mask)
                    now = s
            else:
                if sequence is not None:
                    s = tl.load(sequence + step, mask=inside, other=now)
                    if s != now:
                        h = given_state(given, sample, s, S, K, path, D * N, cell, mask)
                    now = s
                h = a * h + (dt * v) * row
    at = (sample * K + path) * chunks + chunk
    tl.store(ends + (at + (-1 if REVERSE else 1)) * D * N + cell, h, mask=mask)
    if state_block == 0:
        tl.store(sums + at * D + d, total, mask=live)


@triton.jit(do_not_specialize=["blocks"])
def carry_kernel(
    states,  # [B, K, chunks, D, N] float32: the ends, and then the states
    sums,  # [B, K, chunks, D] float32
    A,
    given,  # [B, S, K, D, N], or None: initial; reverse: dlast
    sequence,
    sizes,
    blocks,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    L, D, K, S, chunks, _groups, _group_size, _per_group, _batch = integers(sizes)
    program = tl.program_id(0).to(tl.int64)
    e = program % blocks * BLOCK + tl.arange(0, BLOCK)
    path = program // blocks % K
    sample = program // (blocks * K)
    live = e < D * N
    scale = tl.load(A + path * D * N + e, mask=live, other=0.0) * LOG2E
    h = tl.full([BLOCK], 0.0, tl.float32)
    if given is not None:
        s = 0
        if REVERSE:
            if sequence is not None:
                s = tl.load(sequence + L - 1)
        h = tl.load(given + ((sample * S + s) * K + path) * D * N + e, mask=live, other=0.0)
    base = (sample * K + path) * chunks
    tl.store(states + (base + (chunks - 1 if REVERSE else 0)) * D * N + e, h, mask=live)
    for first in range(0, chunks - 1, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            chunk = chunks - 1 - first - i if REVERSE else first + i
            here = live & (first + i < chunks - 1)
            at = states + (base + (chunk - 1 if REVERSE else chunk + 1)) * D * N + e
            end = tl.load(at, mask=here, other=0.0)
            total = tl.load(sums + (base + chunk) * D + e // N, mask=here, other=0.0)
            rows = rows + ((chunk, here, at, end, total),)
        for i in tl.static_range(UNROLL):
            chunk, here, at, end, total = rows[i]
            h = tl.exp2(scale * total) * h + end
            if sequence is not None:
                inside = first + i < chunks - 1
                start = chunk * CHUNK
                before = tl.load(sequence + start - 1, mask=inside & (chunk > 0), other=-1)
                after = tl.load(sequence + tl.minimum(start + CHUNK, L) - 1, mask=inside, other=-1)
                h = tl.where(before == after, h, end)
            tl.store(at, h, mask=here)


def state_launches(
    a: ScanArguments, states: Tensor, sequence: Tensor | None, dout: Tensor | None, dlast: Tensor | None
) -> list[Launch]:
    """What enters each chunk, into `states`: forward without `dout`, backward with it."""
    sizes, tile, reverse = Sizes.of(a), Tile.forward(a.A.shape[2]), dout is not None
    sums = a.A.new_empty(states.shape[:-1])
    given = dlast if reverse else a.initial
    rows = (tokens(dout), tokens(a.z)) if reverse else (tokens(a.u), None)
    w = rows_of(a.C if reverse else a.B)
    shared: dict[str, Any] = {"N": sizes.N, "REVERSE": reverse}
    local = (
        states, sums, *rows, tokens(a.delta), a.A, w, a.delta_bias, given, a.order, sequence, sizes.args(tile), 1,
    )  # fmt: skip
    constants = {**shared, "SOFTPLUS": a.softplus, **tile._asdict()}
    walked = sizes._replace(chunks=sizes.chunks - 1)  # nothing follows the last
    programs = walked.programs(tile) * sizes.K * sizes.state_blocks(tile)
    blocks = cdiv(sizes.D * sizes.N, CARRY_BLOCK)
    carry = (states, sums, a.A, given, sequence, sizes.args(tile), blocks)
    return [
        Launch(local_kernel, programs, local, constants, 1),
        Launch(
            carry_kernel,
            sizes.batch * sizes.K * blocks,
            carry,
            {**shared, "BLOCK": CARRY_BLOCK},
            WARPS,
        ),
    ]
