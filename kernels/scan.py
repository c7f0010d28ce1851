"""The selective scan in Triton, along any path: step l of path k reads and writes token order[k, l].

A program is one warp with a block of channels and of states in registers (scan_tile.py), and walks the 64
steps of a chunk. Of sequences longer than a chunk, the states between chunks come first, from two more
kernels (scan_states.py); the state is then known where a chunk starts, and all run at the same time.
Paths, and blocks of states where there are many, are launches one after the other: each adds its part to
the output, so sums have one order and the same bits in every run.

walk_kernel      y of every step, from the states that enter the chunks.
update_kernel    one step.
The backward     (scan_backward.py) the same walk to recompute, and back.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.structs import ScanArguments
from pydiffuse.kernels.common import WARPS, Launch, cdiv, integers, narrow, power_of_2, run
from pydiffuse.kernels.scan_backward import Gradients, backward_launches
from pydiffuse.kernels.scan_states import state_launches
from pydiffuse.kernels.scan_tile import (
    CHUNK,
    LOG2E,
    UNROLL,
    Sizes,
    Tile,
    cells,
    channels_of,
    check_float,
    given_state,
    hold,
    known_of,
    over_states,
    read,
    rows_of,
    sequence_before,
    sequence_table,
    sigmoid,
    states_of,
    step_size,
    token_of,
    tokens,
    tokens_at,
    weights,
    weights_at,
    wide,
)


@triton.jit(do_not_specialize=["one", "path", "state_block"])
def walk_kernel(
    out,  # tokens
    last,  # [B, S, K, D, N] float32, or None
    chunks_out,  # [B, K, chunks, D, N] float32, or None: filled here if `starts` is None
    starts,  # the same: the states that enter; None if there is one chunk
    u,
    delta,
    A,
    B,
    C,
    D_,
    z,
    bias,
    initial,
    order,
    sequence,
    sizes,
    one,
    path,
    state_block,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADD: tl.constexpr,  # to what `out` holds
    NR: tl.constexpr,
    DR: tl.constexpr,
    NL: tl.constexpr,
    DL: tl.constexpr,
):
    L, D, K, S, chunks, groups, group_size, per_group, _batch = integers(sizes)
    program = tl.program_id(0).to(tl.int64)
    blocks = groups * per_group
    group, _part, d, live = channels_of(program % blocks, per_group, group_size, DR, DL)
    chunk = program // blocks % chunks
    sample = program // (blocks * chunks)
    n = states_of(state_block, NR, NL)
    known = known_of(n, N, NR, NL)
    mask = live & known
    cell = cells(d, state_block, one, N, NR, NL)

    scale = tl.load(A + path * D * N + cell, mask=mask, other=0.0) * LOG2E
    if bias is not None:
        bias = tl.load(bias + path * D + d, mask=live, other=0.0)
    if D_ is not None:
        skip = tl.load(D_ + path * D + d, mask=live, other=0.0)
    u_at, delta_at = tokens_at(u, sample, 0, d), tokens_at(delta, sample, path, d)
    B_at = weights_at(B, sample, path, group, n, D * N, cell, mask)
    C_at = weights_at(C, sample, path, group, n, D * N, cell, mask)
    out_at = tokens_at(out, sample, 0, d)
    if z is not None:
        z_at = tokens_at(z, sample, 0, d)

    state = ((sample * K + path) * chunks + chunk) * D * N + cell
    if starts is None:
        h = given_state(initial, sample, 0, S, K, path, D * N, cell, mask)
        if chunks_out is not None:
            tl.store(chunks_out + state, h, mask=mask)
    else:
        h = tl.load(starts + state, mask=mask, other=0.0)
    start = chunk * CHUNK
    steps = tl.minimum(L - start, CHUNK).to(tl.int32)
    now = sequence_before(sequence, start)
    for first in range(0, steps, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            inside = first + i < steps
            here = live & inside
            step = start + first + i
            token = token_of(order, path, step, L, inside)
            v = read(u, u_at, token, here)
            dt = read(delta, delta_at, token, here)
            rows = rows + ((inside, here, step, token, v, dt),)
        results = ()
        for i in tl.static_range(UNROLL):
            inside, here, step, token, v, dt = rows[i]
            dt, _raw = step_size(dt, bias, inside, SOFTPLUS)
            if sequence is not None:
                s = tl.load(sequence + step, mask=inside, other=now)
                if s != now:
                    if last is not None:
                        if now >= 0:
                            to = last + ((sample * S + now) * K + path) * D * N + cell
                            tl.store(to, h, mask=mask)
                    h = given_state(initial, sample, s, S, K, path, D * N, cell, mask)
                now = s
            there = known & inside
            b, c = weights(B, B_at, token, there), weights(C, C_at, token, there)
            h = hold(tl.exp2(dt * scale) * h + (dt * v) * b, known, N, NR, NL)
            y = over_states(h * c, NL)
            if D_ is not None:
                y += skip * v
            results = results + (y,)
        # After all steps: a store between the loads would keep them in order.
        for i in tl.static_range(UNROLL):
            inside, here, step, token, v, dt = rows[i]
            y = results[i]
            if z is not None:
                gate = read(z, z_at, token, here)
                y *= gate * sigmoid(gate)
            to = out_at + token * out[3]
            if ADD:
                y += tl.load(to, mask=here, other=0.0)
            tl.store(to, narrow(y, out[0].dtype.element_ty), mask=here)
    if last is not None:
        if chunk == chunks - 1:
            if sequence is None:
                now = 0
            tl.store(last + ((sample * S + now) * K + path) * D * N + cell, h, mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def update_kernel(
    out,  # [B, D]
    state,  # [B, D, N] float32, updated
    x,
    dt,
    A,  # [D, N]
    B,  # [B, G, N]
    C,
    D_,
    z,
    bias,
    blocks,
    D,
    groups,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
):
    # A program (sample, block of channels): memory's order, states next to each other.
    program = tl.program_id(0).to(tl.int64)
    sample, n = program // blocks, tl.arange(0, STATES)[None, :]
    d = (program % blocks * BLOCK + tl.arange(0, BLOCK))[:, None]
    live = d < D
    mask = live & (n < N)
    at = sample * D + d
    u = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    step = tl.load(dt + at, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        bias = tl.load(bias + d, mask=live, other=0.0)
    step, _raw = step_size(step, bias, live, SOFTPLUS)
    row = (sample * groups + d // (D // groups)) * N + n
    scale = tl.load(A + d * N + n, mask=mask, other=0.0) * LOG2E
    h = tl.load(state + at * N + n, mask=mask, other=0.0)
    h = tl.exp2(step * scale) * h + (step * u) * tl.load(B + row, mask=mask, other=0.0).to(tl.float32)
    h = tl.where(mask, h, 0.0)
    tl.store(state + at * N + n, h, mask=mask)
    y = tl.sum(h * tl.load(C + row, mask=mask, other=0.0).to(tl.float32), 1, keep_dims=True)
    if D_ is not None:
        y += tl.load(D_ + d, mask=live, other=0.0) * u
    if z is not None:
        gate = tl.load(z + at, mask=live, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + at, narrow(y, out.dtype.element_ty), mask=live)


def scan_launches(
    out: Tensor, last: Tensor | None, chunks: Tensor | None, a: ScanArguments
) -> list[Launch]:
    """The launches; `out` is float32, or there is one path and one block of states."""
    sizes, tile = Sizes.of(a), Tile.forward(a.A.shape[2])
    sequence = sequence_table(a.offsets, sizes.L)
    launches, starts = [], None
    if sizes.chunks > 1:
        shape = (sizes.batch, sizes.K, sizes.chunks, sizes.D, sizes.N)
        starts = a.A.new_empty(shape) if chunks is None else chunks
        launches = state_launches(a, starts, sequence, None, None)
    for path in range(sizes.K):
        for block in range(sizes.state_blocks(tile)):
            args = (
                tokens(out), last, chunks, starts, tokens(a.u), tokens(a.delta), a.A, rows_of(a.B),
                rows_of(a.C), a.D if block == 0 else None, tokens(a.z), a.delta_bias, a.initial, a.order,
                sequence, sizes.args(tile), 1, path, block,
            )  # fmt: skip
            constants = {"N": sizes.N, "SOFTPLUS": a.softplus, "ADD": path + block > 0, **tile._asdict()}
            launches.append(Launch(walk_kernel, sizes.programs(tile), args, constants, 1))
    return launches


def selective_scan(out: Tensor, last: Tensor | None, chunks: Tensor | None, *args: Any) -> None:
    a = ScanArguments(*args)
    check_float("selective_scan", last, chunks, a.A, a.D, a.delta_bias, a.initial)
    sizes = Sizes.of(a)
    if last is not None and (sizes.empty() or a.offsets is not None):  # of empty sequences
        last.zero_() if a.initial is None else last.copy_(a.initial)
    if sizes.empty():
        return
    parts = sizes.K * sizes.state_blocks(Tile.forward(sizes.N))
    (total,) = wide([out], parts > 1)
    assert total is not None
    run(scan_launches(total, last, chunks, a), out)
    if total is not out:
        out.copy_(total)


def selective_scan_backward(
    du: Tensor,
    ddelta: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddelta_bias: Tensor | None,
    dinitial: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    chunks: Tensor,
    *args: Any,
) -> None:
    op, a = "selective_scan_backward", ScanArguments(*args)
    check_float(
        op, dA, dB, dC, dD, ddelta_bias, dinitial, dlast, chunks, a.A, a.D, a.delta_bias, a.initial
    )
    sizes = Sizes.of(a)
    if dinitial is not None and (sizes.empty() or a.offsets is not None):  # of empty sequences
        dinitial.zero_() if dlast is None else dinitial.copy_(dlast)
    if sizes.empty():
        for t in (dA, dB, dC, dD, ddelta_bias):
            if t is not None:
                t.zero_()
        return
    blocks = sizes.state_blocks(Tile.backward(sizes.N))
    wide_du, wide_dz = wide([du, dz], sizes.K * blocks > 1)
    (wide_ddelta,) = wide([ddelta], blocks > 1)
    out = Gradients(wide_du, wide_ddelta, dA, dB, dC, dD, wide_dz, ddelta_bias, dinitial)
    run(backward_launches(out, dout, dlast, chunks, a), du)
    for target, total in ((du, wide_du), (ddelta, wide_ddelta), (dz, wide_dz)):
        if total is not target:
            target.copy_(total)


def update_launches(
    out: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> list[Launch]:
    check_float("selective_state_update", state, A, D, dt_bias)
    batch, channels, N = state.shape
    if batch * channels == 0:
        return []
    wide_n = power_of_2(N)
    block = min(max(2048 // wide_n, 1), power_of_2(channels))
    blocks = cdiv(channels, block)
    args = (out, state, x, dt, A, B, C, D, z, dt_bias, blocks, channels, B.shape[1])
    constants = {"N": N, "SOFTPLUS": softplus, "BLOCK": block, "STATES": wide_n}
    return [Launch(update_kernel, batch * blocks, args, constants, WARPS)]


def selective_state_update(out: Tensor, *args: Any) -> None:
    run(update_launches(out, *args), out)
