"""The gradients of the selective scan (formulas: pydiffuse/autograd/scan.py).

backward_kernel  a program, one warp, has a chunk of a block of channels and states. The states of 64
                 steps do not fit into registers: it walks the chunk once and leaves every other state
                 in memory, then goes from the last two steps to the first, computes their states again
                 and carries dh back through them. The gradient that enters from the right comes from
                 scan_states.py.
add_kernel       (partials.py) sums of dB and dC over blocks of channels, of the parameters' gradients over
                 samples and chunks, in one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.structs import CHUNK as STEPS
from pydiffuse._core.structs import ScanArguments
from pydiffuse.kernels.common import Launch, inner, integers, narrow
from pydiffuse.kernels.partials import add_launch
from pydiffuse.kernels.scan_states import state_launches
from pydiffuse.kernels.scan_tile import (
    CHUNK,
    LN2,
    LOG2E,
    SAVE,
    Sizes,
    Tile,
    cells,
    channels_of,
    given_state,
    hold,
    known_of,
    over_channels,
    over_states,
    places,
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
)

SAVED = 1 << 27  # bytes for saved states; more programs than have room there come in further launches


@inner
def put(t, at, token, y, mask, ADD: tl.constexpr):
    to = at + token * t[3]
    if ADD:
        y += tl.load(to, mask=mask, other=0.0)
    tl.store(to, narrow(y, t[0].dtype.element_ty), mask=mask)


@inner
def put_weights(w, at, token, stride, row, mask):
    # The sum over this block's channels of a token's row; nothing for constants.
    if len(w) > 1:
        tl.store(at + token * stride, over_channels(row), mask=mask)


@triton.jit(do_not_specialize=["one", "path", "state_block", "first_program"])
def backward_kernel(
    du,  # tokens
    ddelta,
    dz,
    dA,  # [B chunks, K, D, N] float32: this chunk's part
    dD,  # [B chunks, K, D]; None where D_ is
    dbias,
    dB,  # [blocks of a group, B, K, G, L, N] float32: this block's part; of constants as dA
    dC,
    dinitial,  # [B, S, K, D, N], or None
    saved,  # [programs of the launch, CHUNK / SAVE, tile] float32
    dout,  # tokens
    dlast,  # [B, S, K, D, N], or None
    starts,  # [B, K, chunks, D, N]: the states that enter the chunks
    carries,  # the same: the gradients that enter from the right; None if there is one chunk
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
    first_program,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADD: tl.constexpr,  # du and dz to what is there
    ADD_DELTA: tl.constexpr,
    NR: tl.constexpr,
    DR: tl.constexpr,
    NL: tl.constexpr,
    DL: tl.constexpr,
):
    L, D, K, S, chunks, groups, group_size, per_group, batch = integers(sizes)
    program = tl.program_id(0).to(tl.int64) + first_program
    blocks = groups * per_group
    group, part, d, live = channels_of(program % blocks, per_group, group_size, DR, DL)
    chunk = program // blocks % chunks
    sample = program // (blocks * chunks)
    n = states_of(state_block, NR, NL)
    known = known_of(n, N, NR, NL)
    mask = live & known
    cell = cells(d, state_block, one, N, NR, NL)

    decay = tl.load(A + path * D * N + cell, mask=mask, other=0.0)
    decay = decay * LOG2E
    if D_ is not None:
        skip = tl.load(D_ + path * D + d, mask=live, other=0.0)
    if bias is not None:
        bias = tl.load(bias + path * D + d, mask=live, other=0.0)
    u_at, delta_at = tokens_at(u, sample, 0, d), tokens_at(delta, sample, path, d)
    dout_at, du_at = tokens_at(dout, sample, 0, d), tokens_at(du, sample, 0, d)
    ddelta_at = tokens_at(ddelta, sample, path, d)
    if z is not None:
        z_at, dz_at = tokens_at(z, sample, 0, d), tokens_at(dz, sample, 0, d)
    B_at = weights_at(B, sample, path, group, n, D * N, cell, mask)
    C_at = weights_at(C, sample, path, group, n, D * N, cell, mask)
    row_at = (((part * batch + sample) * K + path) * groups + group) * L * N + n

    start = chunk * CHUNK
    steps = tl.minimum(L - start, CHUNK).to(tl.int32)
    state = ((sample * K + path) * chunks + chunk) * D * N + cell
    SLOT: tl.constexpr = NR * DR * NL * DL
    slot = saved + tl.program_id(0).to(tl.int64) * (CHUNK // SAVE) * SLOT
    slot += places(one, NR, DR, NL, DL)

    h = tl.load(starts + state, mask=mask, other=0.0)
    subs = tl.cdiv(steps, SAVE)
    for sub in range(subs - 1):
        tl.store(slot + sub * SLOT, h)
        now = sequence_before(sequence, start + sub * SAVE)
        rows = ()
        for i in tl.static_range(SAVE):
            step = start + sub * SAVE + i
            token = token_of(order, path, step, L, True)
            v = read(u, u_at, token, live)
            dt = read(delta, delta_at, token, live)
            rows = rows + ((step, token, v, dt),)
        for i in tl.static_range(SAVE):
            step, token, v, dt = rows[i]
            dt, raw = step_size(dt, bias, True, SOFTPLUS)
            if sequence is not None:
                s = tl.load(sequence + step)
                if s != now:
                    h = given_state(initial, sample, s, S, K, path, D * N, cell, mask)
                now = s
            h = tl.exp2(dt * decay) * h + (dt * v) * weights(B, B_at, token, known)
            h = hold(h, known, N, NR, NL)
    tl.store(slot + (subs - 1) * SLOT, h)
    tl.debug_barrier()  # another lane may read what this one wrote

    if carries is None:
        s = 0
        if sequence is not None:
            s = tl.load(sequence + L - 1)
        g = given_state(dlast, sample, s, S, K, path, D * N, cell, mask)
    else:
        g = tl.load(carries + state, mask=mask, other=0.0)
    dA_sum = tl.full([NR, DR, NL, DL], 0.0, tl.float32)
    dB_sum = tl.full([NR, DR, NL, DL], 0.0, tl.float32)
    dC_sum = tl.full([NR, DR, NL, DL], 0.0, tl.float32)
    dD_sum = tl.full([1, DR, 1, DL], 0.0, tl.float32)
    dbias_sum = tl.full([1, DR, 1, DL], 0.0, tl.float32)
    for back in range(subs):
        sub = subs - 1 - back
        h = tl.load(slot + sub * SLOT)
        now = sequence_before(sequence, start + sub * SAVE)
        rows = ()
        for i in tl.static_range(SAVE):
            inside = sub * SAVE + i < steps
            here = live & inside
            step = start + sub * SAVE + i
            token = token_of(order, path, step, L, inside)
            v = read(u, u_at, token, here)
            dt = read(delta, delta_at, token, here)
            dy = read(dout, dout_at, token, here)
            rows = rows + ((inside, here, known & inside, step, token, v, dt, dy),)
        states = ()
        for i in tl.static_range(SAVE):
            inside, here, there, step, token, v, dt, dy = rows[i]
            dt, raw = step_size(dt, bias, inside, SOFTPLUS)
            if sequence is not None:
                s = tl.load(sequence + step, mask=inside, other=now)
                if s != now:
                    h = given_state(initial, sample, s, S, K, path, D * N, cell, mask)
                now = s
            b = weights(B, B_at, token, there)
            kept = hold(tl.exp2(dt * decay) * h, known, N, NR, NL)
            states = states + ((kept, dt, raw, b),)
            h = hold(kept + (dt * v) * b, known, N, NR, NL)
        for j in tl.static_range(SAVE):
            inside, here, there, step, token, v, dt, dy = rows[SAVE - 1 - j]
            kept, dt, raw, b = states[SAVE - 1 - j]
            # Sums across lanes as soon as they can be: what they need is then free.
            entry = dt * v
            after = hold(kept + entry * b, known, N, NR, NL)
            c = weights(C, C_at, token, there)
            if z is not None:
                y = over_states(after * c, NL)
                if D_ is not None:
                    y += skip * v
                gate = read(z, z_at, token, here)
                sig = sigmoid(gate)
                put(dz, dz_at, token, dy * y * sig * (1.0 + gate * (1.0 - sig)), here, ADD)
                dy *= gate * sig
            after *= dy
            put_weights(C, dC + row_at, token, N, after, there)
            if len(C) == 1:
                dC_sum += after
            dh = hold(g + dy * c, known, N, NR, NL)
            put_weights(B, dB + row_at, token, N, entry * dh, there)
            if len(B) == 1:
                dB_sum += entry * dh
            along = over_states(b * dh, NL)
            direct = dt * along
            if D_ is not None:
                direct += skip * dy
                dD_sum += v * dy
            put(du, du_at, token, direct, here, ADD)
            g = tl.exp2(dt * decay) * dh
            kept *= dh  # the gradient of dt A
            dA_sum += dt * kept
            ddt = v * along + over_states(decay * kept, NL) * LN2
            if SOFTPLUS:
                ddt = tl.where(raw > 20.0, ddt, ddt * sigmoid(raw))
            put(ddelta, ddelta_at, token, ddt, here, ADD_DELTA)
            if dbias is not None:
                dbias_sum += tl.where(inside, ddt, 0.0)
            if sequence is not None:
                s = tl.load(sequence + step, mask=inside, other=-1)
                s_before = tl.where(inside, sequence_before(sequence, step), -1)
                if s != s_before:
                    if dinitial is not None:
                        to = dinitial + ((sample * S + s) * K + path) * D * N + cell
                        tl.store(to, g, mask=mask)
                    g = given_state(dlast, sample, s_before, S, K, path, D * N, cell, mask)

    where = ((sample * chunks + chunk) * K + path) * D
    tl.store(dA + where * N + cell, dA_sum, mask=mask)
    if len(B) == 1:
        tl.store(dB + where * N + cell, dB_sum, mask=mask)
    if len(C) == 1:
        tl.store(dC + where * N + cell, dC_sum, mask=mask)
    if D_ is not None:
        tl.store(dD + where + d, dD_sum, mask=live)
    if dbias is not None:
        # Each block of states has a part of ddelta, hence of its sum.
        if state_block > 0:
            dbias_sum += tl.load(dbias + where + d, mask=live, other=0.0)
        tl.store(dbias + where + d, dbias_sum, mask=live)
    if dinitial is not None:
        if sequence is None:
            if chunk == 0:
                tl.store(dinitial + (sample * S * K + path) * D * N + cell, g, mask=mask)


class Gradients(NamedTuple):
    """What the op writes: as in its schema."""

    du: Tensor  # [B, L, D]
    ddelta: Tensor  # [B, K, L, D]
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None
    dz: Tensor | None
    dbias: Tensor | None
    dinitial: Tensor | None


def backward_launches(
    out: Gradients, dout: Tensor, dlast: Tensor | None, starts: Tensor, a: ScanArguments
) -> list[Launch]:
    """The launches; du and dz are float32 where they are sums of several parts, and so is ddelta."""
    sizes, tile = Sizes.of(a), Tile.backward(a.A.shape[2])
    sequence = sequence_table(a.offsets, sizes.L)
    launches: list[Launch] = []
    carries = None
    if sizes.chunks > 1:
        carries = torch.empty_like(starts)
        launches = state_launches(a, carries, sequence, dout, dlast)
    sums: list[Launch] = []

    def parts(total: Tensor | None, count: int) -> Tensor | None:
        """[count, ...] to be added up into `total` at the end."""
        if total is None or count == 1:
            return total
        partial = total.new_empty(count, *total.shape)
        sums.append(add_launch(total, partial))
        return partial

    walks = sizes.batch * sizes.chunks
    blocks = sizes.per_group(tile)
    dA, dD, dbias = (parts(t, walks) for t in (out.dA, out.dD, out.dbias))
    dB, dC = (parts(t, walks if t.dim() == 3 else blocks) for t in (out.dB, out.dC))
    programs, slot = sizes.programs(tile), STEPS // SAVE.value * tile.states * tile.channels
    at_once = min(max(SAVED // (4 * slot), 1), programs)
    saved = a.A.new_empty(at_once * slot)
    for path in range(sizes.K):
        for block in range(sizes.state_blocks(tile)):
            args = (
                tokens(out.du), tokens(out.ddelta), tokens(out.dz), dA, dD if block == 0 else None, dbias, dB,
                dC, out.dinitial, saved, tokens(dout), dlast, starts, carries, tokens(a.u), tokens(a.delta),
                a.A, rows_of(a.B),
                rows_of(a.C), a.D if block == 0 else None, tokens(a.z), a.delta_bias, a.initial, a.order,
                sequence, sizes.args(tile), 1, path, block,
            )  # fmt: skip
            constants = {
                "N": sizes.N,
                "SOFTPLUS": a.softplus,
                "ADD": path + block > 0,
                "ADD_DELTA": block > 0,
                **tile._asdict(),
            }
            for begin in range(0, programs, at_once):
                count = min(at_once, programs - begin)
                launches.append(Launch(backward_kernel, count, (*args, begin), constants, 1))
    return launches + sums
