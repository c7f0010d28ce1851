"""The Gram pass of guidance: products of predictions, added in float64, where a product of two float32
is exact. Entries are the Gram matrix's upper triangle, row by row, and then the sums.

gram_partials  a program adds its chunk, one accumulator per thread and entry, into
               partial [B, entries, chunks].
gram_kernel    adds a sample's partials for the op `gram`; other kernels do so by themselves, with
               `totals` (a vector of all entries) or `statistics` (entry by entry).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import CHUNKS, WARPS, Launch, Rows, check_doubles, inner, power_of_2
from pydiffuse.kernels.guidance_rules import at


def gram_block(k: int) -> tuple[int, int, int]:
    """Of a Gram pass: elements per block, warps, and rows of the matrix in one sweep over a chunk."""
    if k <= 5:
        return (2048 if k <= 3 else 1024), WARPS, k
    return (512, WARPS, k) if k <= 8 else (512, 2 * WARPS, 4)


@triton.constexpr_function
def swept(first, last, k, sums):
    """The entries of rows first .. last - 1 of a triangle, column by column, and then their sums."""
    pairs = [at(i, j, k) for j in range(first, k) for i in range(first, min(j + 1, last))]
    return (*pairs, *(at(k, k, k) + i for i in range(first, last) if sums))


@inner
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
    ALIGN: tl.constexpr,
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
        live = lane < tl.multiple_of(n - start, ALIGN)
        p = ()
        new = ()
        for j in tl.static_range(FIRST, K):
            row = tl.multiple_of(preds[j] + sample * strides[j] + start, ALIGN)
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


@triton.jit(do_not_specialize=["n", "chunks", "blocks"])
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
    ALIGN: tl.constexpr,
):
    K: tl.constexpr = len(preds)
    PAIRS: tl.constexpr = at(K, K, K)
    program = tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    to = partial + sample * (PAIRS + K * SUMS) * chunks + chunk
    for first in tl.static_range(0, K, ROWS):
        total = sweep(
            preds, strides, sample, chunk, n, blocks, first, min(first + ROWS, K), SUMS, BLOCK, LANES,
            VECTOR, ALIGN,
        )  # fmt: skip
        for e in tl.static_range(len(total)):
            entry = swept(first, min(first + ROWS, K), K, SUMS)[e]
            tl.store(to + entry * chunks, tl.sum(total[e]))


@inner
def place(e, K: tl.constexpr):
    # Row and column of the triangle's entries e.
    row = e * 0
    for i in tl.static_range(1, K):
        row += (e >= at(i, i, K)).to(e.dtype)
    return row, e - (row * K - row * (row - 1) // 2) + row


@inner
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


@inner
def statistics(partial, sample, chunks, ENTRIES: tl.constexpr):
    # A sample's statistics, one by one, for every thread.
    lane = tl.arange(0, CHUNKS)
    values = ()
    for e in tl.static_range(ENTRIES):
        x = tl.load(partial + (sample * ENTRIES + e) * chunks + lane, mask=lane < chunks, other=0.0)
        values = values + (tl.sum(x),)
    return values


def entries_of(k: int, sums: bool) -> int:
    return k * (k + 1) // 2 + k * sums


def total_constants(entries: int) -> dict[str, int]:
    wide = power_of_2(entries)
    return {"ENTRIES": entries, "WIDE": wide, "STEP": max(16, 2048 // wide)}


def gram_pass(rows: Rows, preds: Sequence[Tensor], sums: bool) -> tuple[Launch, Tensor, int]:
    """The launch, the partials that it fills, and how many of them an entry has."""
    k = len(preds)
    block, warps, at_once = gram_block(k)
    chunks, blocks = rows.chunks(block)
    size = rows.batch * entries_of(k, sums) * chunks
    partial = torch.empty(size, dtype=torch.float64, device=preds[0].device)
    lanes, align = 32 * warps, rows.align(preds)
    vector = 1 if align == 1 else 16 // min(t.element_size() for t in preds)
    constants = {
        "SUMS": sums,
        "ROWS": at_once,
        "BLOCK": block,
        "LANES": lanes,
        "VECTOR": min(vector, block // lanes),
        "ALIGN": align,
    }
    args = (partial, tuple(preds), rows.strides(preds), rows.n, chunks, blocks)
    return Launch(gram_partials, rows.batch * chunks, args, constants, warps), partial, chunks


def gram_launches(out: Tensor, sums: Tensor | None, preds: Sequence[Tensor]) -> list[Launch]:
    check_doubles("gram", out, sums)
    rows, preds = Rows.of("gram", preds[:1], preds, written=False)
    if rows.batch * rows.n == 0:
        for t in (out, sums):
            if t is not None:
                t.zero_()
        return []
    k, summed = len(preds), sums is not None
    launch, partial, chunks = gram_pass(rows, preds, summed)
    constants = {"K": k, **total_constants(entries_of(k, summed))}
    return [launch, Launch(gram_kernel, rows.batch, (out, sums, partial, chunks), constants, WARPS)]
