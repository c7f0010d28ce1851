"""Guidance in Triton: Gram matrices, coefficients and linear combinations, per sample.

A tensor [B, ...] is seen as rows [B, n]. Programs are numbered sample by sample; each owns a chunk of a
row, a number of whole blocks that depends on nothing but n. So neither the batch nor the device changes
a bit, and all sums run in a fixed order:

gram_partials  a program adds the products of its chunk in float64, where a product of two float32 is
               exact, one accumulator per thread and Gram entry, into partial [B, entries, chunks].
guide_kernel   every program adds its sample's partials and finds the coefficients (guidance_rules.py),
               then streams its chunk: two launches, or one where the rule needs no Gram matrix.
rule_kernel    one program per sample does that ahead of mix_kernel, where each program would have too
               much to add: many predictions, or the backward, whose rules run on dual numbers.
mix_kernel     streams combinations whose coefficients lie in memory.

Every output of a position is computed before any is stored: outputs may be the inputs.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.autograd.guidance import (
    EMIT_PREDICT,
    EMIT_STATE,
    EMIT_UPDATE,
    ordered,
    samples_together,
)
from pydiffuse.kernels.guidance_rules import RESCALE, at, coefficients
from pydiffuse.rules import COMMON, RULES, UPDATE

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
WARPS = 4
CHUNKS = 4 if INTERPRETED else 512  # of a sample, at most; a power of two
INLINE = 4  # predictions whose partials every program of guide_kernel adds by itself
CODES = {rule.code: rule for rule in RULES.values()}

A, B, H, S, P, Q, ORIGINAL, PHI, RULE_PARAMS = map(tl.constexpr, range(len(UPDATE + COMMON) + 1))
MOMENTUM = tl.constexpr(RULE_PARAMS.value + RULES["apg"].parameters.index("momentum"))
HAS_X, HAS_HISTORY, HAS_NOISE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
UPDATED, PREDICTED, STATED = map(tl.constexpr, (EMIT_UPDATE, EMIT_PREDICT, EMIT_STATE))


def block_of(tensors: int) -> int:
    """Elements per block of a combination: 16, 8 or 4 a thread of all the tensors it holds at once."""
    return 2048 if tensors <= 5 else 1024 if tensors <= 9 else 512


def gram_block(k: int) -> tuple[int, int, int]:
    """Of a Gram pass: elements per block, warps, and rows of the matrix in one sweep over a chunk."""
    if k <= 5:
        return (2048 if k <= 3 else 1024), WARPS, k
    return (512, WARPS, k) if k <= 8 else (512, 2 * WARPS, 4)


@triton.constexpr_function
def upto(last, k):
    return min(last, k)


@triton.constexpr_function
def swept(first, last, k, sums):
    """The entries of rows first .. last - 1 of a triangle, column by column, and then their sums."""
    pairs = [at(i, j, k) for j in range(first, k) for i in range(first, min(j + 1, last))]
    return (*pairs, *(at(k, k, k) + i for i in range(first, last) if sums))


@triton.jit
def sweep(
    preds,  # each [B, n]
    strides,
    sample,
    chunk,
    n,
    blocks,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The entries `swept` names, each a number per thread. A block becomes [LANES, elements of a thread]
    # as its loads lie, VECTOR at a time, so folding moves no data. A later row's tensor is needed for one
    # column only.
    K: tl.constexpr = len(preds)
    ROUNDS: tl.constexpr = BLOCK // (LANES * VECTOR)
    lane = tl.arange(0, BLOCK)
    total = ()
    for _ in tl.static_range(len(swept(FIRST, LAST, K, SUMS))):
        total = total + (tl.zeros([LANES], tl.float64),)
    for block in range(blocks):
        start = (chunk * blocks + block) * BLOCK
        live = lane < n - start
        p = ()
        new = ()
        for j in tl.static_range(FIRST, K):
            row = preds[j] + sample * strides[j] + start
            x = tl.load(row + lane, mask=live, other=0.0).to(tl.float32).to(tl.float64)
            x = tl.permute(tl.reshape(x, [ROUNDS, LANES, VECTOR]), 1, 0, 2)
            x = tl.reshape(x, [LANES, ROUNDS * VECTOR])
            if j < LAST:
                p = p + (x,)
            for i in tl.static_range(len(p)):
                new = new + (total[len(new)] + tl.sum(p[i] * x, 1),)
        if SUMS:
            for i in tl.static_range(len(p)):
                new = new + (total[len(new)] + tl.sum(p[i], 1),)
        total = new
    return total


@triton.jit(do_not_specialize=["chunks", "blocks"])
def gram_partials(
    partial,  # [B, entries, chunks] float64: the upper triangle, row by row, then the sums
    preds,
    strides,
    n,
    chunks,
    blocks,  # per chunk
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    K: tl.constexpr = len(preds)
    PAIRS: tl.constexpr = at(K, K, K)
    program = tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    to = partial + sample * (PAIRS + K * SUMS) * chunks + chunk
    for first in tl.static_range(0, K, ROWS):
        total = sweep(
            preds, strides, sample, chunk, n, blocks, first, upto(first + ROWS, K), SUMS, BLOCK, LANES, VECTOR
        )  # fmt: skip
        for e in tl.static_range(len(total)):
            entry = swept(first, upto(first + ROWS, K), K, SUMS)[e]
            tl.store(to + entry * chunks, tl.sum(total[e]))


@triton.jit
def place(e, K: tl.constexpr):
    # Row and column of the triangle's entries e.
    row = e * 0
    for i in tl.static_range(1, K):
        row += (e >= at(i, i, K)).to(e.dtype)
    return row, e - (row * K - row * (row - 1) // 2) + row


@triton.jit
def totals(partial, chunks, ENTRIES: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr):
    # A sample's statistics [WIDE], WIDE a power of two from ENTRIES on.
    e = tl.arange(0, WIDE)
    from_ = partial + (e * chunks)[:, None] + tl.arange(0, STEP)[None, :]
    total = tl.zeros([WIDE], tl.float64)
    for first in range(0, chunks, STEP):
        live = (e < ENTRIES)[:, None] & (first + tl.arange(0, STEP) < chunks)[None, :]
        total += tl.sum(tl.load(from_ + first, mask=live, other=0.0), 1)
    return total


@triton.jit(do_not_specialize=["chunks"])
def gram_kernel(
    out,  # [B, K, K] float64
    sums,  # [B, K] float64, or None
    partial,
    chunks,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    # A program per sample.
    PAIRS: tl.constexpr = at(K, K, K)
    sample = tl.program_id(0).to(tl.int64)
    value = totals(partial + sample * ENTRIES * chunks, chunks, ENTRIES, WIDE, STEP)
    e = tl.arange(0, WIDE)
    row, column = place(e, K)
    tl.store(out + (sample * K + row) * K + column, value, mask=e < PAIRS)
    tl.store(out + (sample * K + column) * K + row, value, mask=e < PAIRS)
    if sums is not None:
        tl.store(sums + sample * K + e - PAIRS, value, mask=(e >= PAIRS) & (e < ENTRIES))


@triton.jit
def statistics(partial, sample, chunks, COUNT: tl.constexpr, MAX: tl.constexpr):
    # A sample's statistics, one by one, for every thread.
    values = ()
    for e in tl.static_range(COUNT):
        lane = tl.arange(0, MAX)
        at = partial + (sample * COUNT + e) * chunks + lane
        values = values + (tl.sum(tl.load(at, mask=lane < chunks, other=0.0)),)
    return values


@triton.jit
def solve(
    G,
    n,
    high,  # the parameters, each as the sum of two float32
    low,
    varied,  # [B, columns] float64, or None
    sample,
    seed,  # [lanes]: derivatives by the OWN statistics of the predictions, then by the columns
    RULE: tl.constexpr,
    K: tl.constexpr,
    RESCALED: tl.constexpr,
    SOURCE: tl.constexpr,  # per parameter: its column of `varied`, or -1
    COLUMNS: tl.constexpr,
    OWN: tl.constexpr,
):
    # The parameters and the coefficients, as dual numbers.
    params = ()
    for i in tl.static_range(len(SOURCE)):
        if SOURCE[i] < 0:
            value = tl.cast(high[i], tl.float64) + tl.cast(low[i], tl.float64)
            params = params + ((value, 0.0),)
        else:
            value = tl.load(varied + sample * COLUMNS + SOURCE[i])
            one = tl.where(seed == OWN + SOURCE[i], 1.0, 0.0).to(tl.float64)
            params = params + ((value, one),)
    own = params[RULE_PARAMS:]
    c = coefficients(G, params[ORIGINAL], params[PHI], own, n, RULE, K, RESCALED)
    return params, c


@triton.jit
def combinations(params, c, K: tl.constexpr, HAS: tl.constexpr, EMIT: tl.constexpr):
    # The outputs' coefficients of (preds, x, history, noise).
    rows = ()
    if UPDATED & EMIT:
        row = ()
        for i in tl.static_range(K):
            row = row + (params[B][0] * c[i][0],)
        if HAS_X & HAS:
            row = row + (params[A][0],)
        if HAS_HISTORY & HAS:
            row = row + (params[H][0],)
        if HAS_NOISE & HAS:
            row = row + (params[S][0],)
        rows = rows + (row,)
    if PREDICTED & EMIT:
        row = ()
        for i in tl.static_range(K):
            row = row + (params[Q][0] * c[i][0],)
        if HAS_X & HAS:
            row = row + (params[P][0],)
        rows = rows + (row,)
    if STATED & EMIT:  # APG: c - u + momentum state
        row = (1.0, -1.0)
        if K == 3:
            row = row + (params[MOMENTUM][0],)
        rows = rows + (row,)
    return rows


@triton.jit
def narrow(y, dtype: tl.constexpr):
    if INTERPRETED:  # it cuts bfloat16 off instead of rounding
        if dtype == tl.bfloat16:
            bits = y.to(tl.uint32, bitcast=True)
            y = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return y.to(dtype)


@triton.jit
def stream(
    outs,
    out_strides,
    terms,
    strides,
    rows,  # coefficients [J][M] in registers, or () if they are in `matrix`
    matrix,  # of this sample: [J, M] float64
    shift,  # of this sample: [J] float64, or None
    sample,
    start,
    n,
    USED: tl.constexpr,  # per output, bit m: it has term m; what no output has is not read
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    live = lane < n - start
    t = ()
    for m in tl.static_range(len(terms)):
        if ANY >> m & 1:
            row = terms[m] + sample * strides[m] + start
            t = t + (tl.load(row + lane, mask=live, other=0.0).to(tl.float32),)
        else:
            t = t + (0.0,)
    results = ()
    for j in tl.static_range(len(outs)):
        y = tl.full([BLOCK], -0.0, tl.float32)  # -0 + y = y, always
        if shift is not None:
            y += tl.load(shift + j).to(tl.float32)
        for m in tl.static_range(len(terms)):
            if USED[j] >> m & 1:
                if len(rows) == 0:
                    c = tl.load(matrix + j * len(terms) + m)
                else:
                    c = rows[j][m]
                y += tl.cast(c, tl.float32) * t[m]
        results = results + (y,)
    if len(outs) > 1:  # another thread may still have to read what this one overwrites
        tl.debug_barrier()
    for j in tl.static_range(len(outs)):
        row = outs[j] + sample * out_strides[j] + start
        tl.store(row + lane, narrow(results[j], outs[j].dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["chunks"])
def mix_kernel(
    outs,  # each [B, n]
    out_strides,
    terms,
    strides,
    matrix,  # [B, J, M] float64
    shift,  # [B, J] float64, or None
    n,
    chunks,
    USED: tl.constexpr,
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    matrix += sample * len(outs) * len(terms)
    if shift is not None:
        shift += sample * len(outs)
    start = chunk * BLOCK
    stream(outs, out_strides, terms, strides, (), matrix, shift, sample, start, n, USED, ANY, BLOCK)


@triton.jit(do_not_specialize=["partials", "chunks", "blocks"])
def guide_kernel(
    outs,
    out_strides,
    terms,  # the predictions, then x, history, noise as `HAS` says
    strides,
    partial,  # [B, entries, partials] float64, or None
    partials,
    n,
    chunks,
    blocks,
    high,
    low,
    varied,
    RULE: tl.constexpr,
    K: tl.constexpr,
    RESCALED: tl.constexpr,
    SOURCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATS: tl.constexpr,
    HAS: tl.constexpr,
    EMIT: tl.constexpr,  # 0: the one term is a gradient y, and output i is c_i y
    USED: tl.constexpr,
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX: tl.constexpr,
):
    # Backwards: what the Gram pass read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    seed = tl.arange(0, 1)
    G = (statistics(partial, sample, partials, STATS, MAX), None, 0, seed)
    params, c = solve(G, n, high, low, varied, sample, seed, RULE, K, RESCALED, SOURCE, COLUMNS, STATS)
    if EMIT == 0:
        rows = ()
        for i in tl.static_range(K):
            rows = rows + ((c[i][0],),)
    else:
        rows = combinations(params, c, K, HAS, EMIT)
    for block in range(blocks):
        start = (chunk * blocks + block) * BLOCK
        stream(outs, out_strides, terms, strides, rows, None, None, sample, start, n, USED, ANY, BLOCK)


@triton.jit(do_not_specialize=["chunks"])
def rule_kernel(
    matrix,  # [B, J, M] float64; backward: [B, K, K + 1], dp_i = sum_j m_ij p_j + m_iK y + shift_i
    shift,  # backward: [B, K] float64, or None
    dvaried,  # backward: [B, columns] float64, or None
    partial,
    n,
    chunks,
    high,
    low,
    varied,
    RULE: tl.constexpr,
    K: tl.constexpr,
    RESCALED: tl.constexpr,
    SOURCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS: tl.constexpr,
    EMIT: tl.constexpr,
    BACKWARD: tl.constexpr,  # the statistics are those of (p_0 .. p_{K-1}, y)
    ENTRIES: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    SEEDS: tl.constexpr,
):
    PAIRS: tl.constexpr = at(K, K, K)
    OWN: tl.constexpr = PAIRS + K * RESCALED
    sample = tl.program_id(0).to(tl.int64)
    partial += sample * ENTRIES * chunks
    value = totals(partial, chunks, ENTRIES, WIDE, STEP)
    e = tl.arange(0, WIDE)
    to = e
    if BACKWARD:  # the statistics of p, then <y, p_i>, then what nobody needs
        row, column = place(e, K + 1)
        own = row * K - row * (row - 1) // 2 + column - row
        sums = e - at(K + 1, K + 1, K + 1)
        to = tl.where(column < K, own, OWN + row)
        to = tl.where(sums < 0, to, tl.where(sums < K, PAIRS + sums, OWN + K + 1))
    # Every thread needs the totals: they take the place of the partials, which are all read.
    tl.debug_barrier()
    tl.store(partial + to * chunks, value, mask=e < ENTRIES)
    tl.debug_barrier()
    seed = tl.arange(0, SEEDS)
    G = ((), partial, chunks, seed)
    params, c = solve(G, n, high, low, varied, sample, seed, RULE, K, RESCALED, SOURCE, COLUMNS, OWN)
    if BACKWARD:
        slope = tl.zeros([SEEDS], tl.float64)  # of sum_i dc_i c_i, dc_i = <y, p_i>
        for i in tl.static_range(K):
            slope += tl.load(partial + (OWN + i) * chunks) * c[i][1]
            tl.store(matrix + (sample * K + i) * (K + 1) + K, c[i][0].to(tl.float64))
        row, column = place(seed, K)
        g = tl.where(row == column, 2.0, 1.0) * slope
        tl.store(matrix + (sample * K + row) * (K + 1) + column, g, mask=seed < PAIRS)
        tl.store(matrix + (sample * K + column) * (K + 1) + row, g, mask=seed < PAIRS)
        if shift is not None:
            live = (seed >= PAIRS) & (seed < PAIRS + K)
            tl.store(shift + sample * K + seed - PAIRS, slope, mask=live)
        if dvaried is not None:
            live = (seed >= OWN) & (seed < OWN + COLUMNS)
            tl.store(dvaried + sample * COLUMNS + seed - OWN, slope, mask=live)
    else:
        rows = combinations(params, c, K, HAS, EMIT)
        for j in tl.static_range(len(rows)):
            for m in tl.static_range(len(rows[j])):
                tl.store(matrix + (sample * len(rows) + j) * len(rows[0]) + m, rows[j][m])


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = WARPS

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.args, **self.constants, num_warps=self.warps)


class Rows(NamedTuple):
    """The tensors of a call, each as rows [batch, n] whose elements lie in one order."""

    batch: int
    n: int

    def strides(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(self.n if self.batch == 1 else t.stride(0) for t in tensors)

    def vector(self, tensors: Sequence[Tensor]) -> int:
        """Elements in one load of 16 bytes of the narrowest tensor; 1 where Triton cannot know that
        they are aligned."""
        aligned = self.n % 16 == 0 and all(stride % 16 == 0 for stride in self.strides(tensors))
        if not (aligned and all(t.data_ptr() % 16 == 0 for t in tensors)):
            return 1
        return 16 // min(t.element_size() for t in tensors)

    def chunks(self, block: int) -> tuple[int, int]:
        """Chunks in a row, and blocks in a chunk."""
        blocks = triton.cdiv(self.n, block)
        each = triton.cdiv(blocks, CHUNKS)
        return triton.cdiv(blocks, each), each


def rows_of(op: str, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Rows, list[Tensor]]:
    """The rows of a call, and its inputs in the order of its first output."""
    like = outs[0]
    if not samples_together(like):
        raise ValueError(f"{op}: the elements of each sample must lie together in memory")
    for t in outs[1:]:
        if ordered(t, like) is not t:
            raise ValueError(f"{op}: all outputs must share one order of dimensions in memory")
    batch = len(like)
    rows = Rows(batch, like.numel() // batch if batch else 0)
    return rows, [ordered(t, like) for t in inputs]


def entries_of(k: int, sums: bool) -> int:
    return at(k, k, k) + k * sums


def total_constants(entries: int) -> dict[str, int]:
    wide = triton.next_power_of_2(entries)
    return {"ENTRIES": entries, "WIDE": wide, "STEP": max(16, 2048 // wide)}


def plan_gram(rows: Rows, preds: Sequence[Tensor], sums: bool) -> tuple[Launch, Tensor, int]:
    """The Gram pass, the partials it fills and their number per entry."""
    k = len(preds)
    block, warps, at_once = gram_block(k)
    chunks, blocks = rows.chunks(block)
    entries = entries_of(k, sums)
    partial = preds[0].new_empty(rows.batch * entries * chunks, dtype=torch.float64)
    args = (partial, tuple(preds), rows.strides(preds), rows.n, chunks, blocks)
    vector = min(rows.vector(preds), block // (32 * warps))
    constants = {
        "SUMS": sums, "ROWS": at_once, "BLOCK": block, "LANES": 32 * warps, "VECTOR": vector,
    }  # fmt: skip
    return Launch(gram_partials, rows.batch * chunks, args, constants, warps), partial, chunks


def plan_mix(
    rows: Rows,
    outs: Sequence[Tensor],
    terms: Sequence[Tensor],
    matrix: Tensor,
    shift: Tensor | None,
    used: tuple[int, ...],
) -> Launch:
    block = block_of(len(outs) + len(terms))
    chunks = triton.cdiv(rows.n, block)
    args = (
        tuple(outs), rows.strides(outs), tuple(terms), rows.strides(terms), matrix, shift, rows.n,
        chunks,
    )  # fmt: skip
    constants = {"USED": used, "ANY": any_of(used), "BLOCK": block}
    return Launch(mix_kernel, rows.batch * chunks, args, constants)


def any_of(used: tuple[int, ...]) -> int:
    together = 0
    for mask in used:
        together |= mask
    return together


class Coefficients(NamedTuple):
    """What a rule's coefficients come from: arguments and constants that its kernels share."""

    rule: int
    k: int
    params: Sequence[float]
    rescaled: bool
    varied: Tensor | None
    columns: Sequence[int]

    @property
    def curved(self) -> bool:
        return self.rescaled or CODES[self.rule].curved

    @property
    def args(self) -> tuple[Any, ...]:
        """Kernels take float32 numbers: each parameter is split into two, good to 48 bits."""
        high = array("f", self.params).tolist()
        low = [v - h if v - h == v - h else 0.0 for v, h in zip(self.params, high, strict=True)]
        return tuple(high), tuple(low), self.varied

    @property
    def constants(self) -> dict[str, Any]:
        source = [-1] * len(self.params)
        for column, i in enumerate(self.columns):
            source[i] = column
        return {
            "RULE": self.rule, "K": self.k, "RESCALED": self.rescaled, "SOURCE": tuple(source),
            "COLUMNS": len(self.columns),
        }  # fmt: skip

    def plan(
        self,
        rows: Rows,
        gram: tuple[Tensor, int],
        matrix: Tensor,
        shift: Tensor | None = None,
        dvaried: Tensor | None = None,
        has: int = 0,
        emit: int = 0,
    ) -> Launch:
        """The kernel that fills `matrix`; the backward's if `emit` is 0."""
        partial, chunks = gram
        backward, k = emit == 0, self.k
        seeds = entries_of(k, self.rescaled) + len(self.columns) if backward else 1
        constants = self.constants | total_constants(entries_of(k + backward, self.rescaled)) | {
            "HAS": has, "EMIT": emit, "BACKWARD": backward,
            "SEEDS": triton.next_power_of_2(seeds),
        }  # fmt: skip
        args = (matrix, shift, dvaried, partial, rows.n, chunks, *self.args)
        return Launch(rule_kernel, rows.batch, args, constants, warps=8 if seeds > 128 else WARPS)


def masks(rule: int, k: int, has: int, emit: int) -> tuple[int, ...]:
    """Per output, the terms it has: a term that is not there is not read, so its NaNs stay out."""
    every = (1 << k) - 1
    preds = 2 if rule == RESCALE.value else every
    extras = ((1 << has.bit_count()) - 1) << k
    used = {EMIT_UPDATE: preds | extras, EMIT_PREDICT: preds | (has & 1) << k, EMIT_STATE: every}
    return tuple(mask for bit, mask in used.items() if emit & bit)


def plan_guide(
    out: Sequence[Tensor],
    preds: Sequence[Tensor],
    x: Tensor | None,
    history: Tensor | None,
    noise: Tensor | None,
    rule: int,
    params: Sequence[float],
    rescaled: bool,
    varied: Tensor | None,
    columns: Sequence[int],
    emit: int,
) -> list[Launch]:
    extras = (x, history, noise)
    has = sum(1 << i for i, t in enumerate(extras) if t is not None)
    rows, terms = rows_of("guide", out, [*preds, *(t for t in extras if t is not None)])
    if rows.batch * rows.n == 0:
        return []
    k = len(preds)
    rule_ = Coefficients(rule, k, params, rescaled, varied, columns)
    used = masks(rule, k, has, emit)
    launches = []
    partial, partials = None, 0
    if rule_.curved:
        launch, partial, partials = plan_gram(rows, terms[:k], rescaled)
        launches.append(launch)
        if k > INLINE:
            matrix = partial.new_empty(rows.batch, len(out), len(terms))
            launches.append(rule_.plan(rows, (partial, partials), matrix, has=has, emit=emit))
            launches.append(plan_mix(rows, out, terms, matrix, None, used))
            return launches
    launches.append(plan_stream(rows, out, terms, rule_, (partial, partials), has, emit, used))
    return launches


def plan_stream(
    rows: Rows,
    out: Sequence[Tensor],
    terms: Sequence[Tensor],
    rule: Coefficients,
    gram: tuple[Tensor | None, int],
    has: int,
    emit: int,
    used: tuple[int, ...],
) -> Launch:
    """guide_kernel: coefficients and combination in one."""
    block = block_of(len(out) + len(terms))
    chunks, blocks = rows.chunks(block)
    args = (
        tuple(out), rows.strides(out), tuple(terms), rows.strides(terms), *gram, rows.n, chunks,
        blocks, *rule.args,
    )  # fmt: skip
    stats = entries_of(rule.k, rule.rescaled) if rule.curved else 0
    constants = rule.constants | {
        "STATS": stats, "HAS": has, "EMIT": emit, "USED": used, "ANY": any_of(used), "BLOCK": block,
        "MAX": CHUNKS,
    }  # fmt: skip
    return Launch(guide_kernel, rows.batch * chunks, args, constants)


def plan_guide_backward(
    dpreds: Sequence[Tensor],
    dvaried: Tensor | None,
    grad: Tensor,
    preds: Sequence[Tensor],
    rule: int,
    params: Sequence[float],
    rescaled: bool,
    varied: Tensor | None,
    columns: Sequence[int],
) -> list[Launch]:
    rows, terms = rows_of("guide_backward", dpreds, [*preds, grad])
    if rows.batch * rows.n == 0:
        return []
    k = len(preds)
    rule_ = Coefficients(rule, k, params, rescaled, varied, columns)
    if not rule_.curved and dvaried is None:
        return [plan_stream(rows, dpreds, terms[k:], rule_, (None, 0), 0, 0, (1,) * k)]
    launch, partial, chunks = plan_gram(rows, terms, rescaled)
    matrix = partial.new_empty(rows.batch, k, k + 1)
    shift = partial.new_empty(rows.batch, k) if rescaled else None
    used = ((1 << (k + 1)) - 1 if rule_.curved else 1 << k,) * k
    return [
        launch,
        rule_.plan(rows, (partial, chunks), matrix, shift, dvaried),
        plan_mix(rows, dpreds, terms, matrix, shift, used),
    ]


def run(launches: Sequence[Launch], like: Tensor) -> None:
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        for launch in launches:
            launch.run()


def guide(out: Sequence[Tensor], *args: Any) -> None:
    run(plan_guide(out, *args), out[0])


def guide_backward(dpreds: Sequence[Tensor], dvaried: Tensor | None, *args: Any) -> None:
    if dvaried is not None and dpreds[0].numel() == 0:
        dvaried.zero_()
    run(plan_guide_backward(dpreds, dvaried, *args), dpreds[0])


def mix(out: Sequence[Tensor], terms: Sequence[Tensor], matrix: Tensor, shift: Tensor | None) -> None:
    rows, terms = rows_of("mix", out, terms)
    if rows.batch * rows.n:
        used = ((1 << len(terms)) - 1,) * len(out)
        run([plan_mix(rows, out, terms, matrix, shift, used)], out[0])


def gram(out: Tensor, sums: Tensor | None, preds: Sequence[Tensor]) -> None:
    rows, preds = rows_of("gram", preds[:1], preds)
    if rows.batch * rows.n == 0:
        out.zero_()
        if sums is not None:
            sums.zero_()
        return
    run(plan_gram_op(rows, out, sums, preds), out)


def plan_gram_op(rows: Rows, out: Tensor, sums: Tensor | None, preds: Sequence[Tensor]) -> list[Launch]:
    k, summed = len(preds), sums is not None
    launch, partial, chunks = plan_gram(rows, preds, summed)
    constants = {"K": k, **total_constants(entries_of(k, summed))}
    return [launch, Launch(gram_kernel, rows.batch, (out, sums, partial, chunks), constants)]
