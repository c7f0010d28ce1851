"""Guidance in Triton: Gram matrices, coefficients and linear combinations, per sample.

A tensor [B, ...] is seen as rows [B, n]. Programs are numbered sample by sample; each owns a chunk of a
row, a number of whole blocks that depends on nothing but n, and all sums run in a fixed order. So a
sample's neighbours in the batch do not change a bit of its result.

gram_partials  (guidance_gram.py) a program adds the products of its chunk in float64.
guide_kernel   every program adds its sample's partials and finds the coefficients (guidance_rules.py),
               then streams its chunk: two launches, or one where the rule needs no Gram matrix.
rule_kernel    one program per sample does that ahead of mix_kernel (guidance_mix.py), where every
               program would have too much to add: many predictions, or the backward, whose rules run on
               dual numbers.

Every output of a position is computed before any is stored: outputs may be the inputs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.rules import EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES
from pydiffuse.kernels.common import WARPS, Launch, Rows, check_doubles, power_of_2, run
from pydiffuse.kernels.guidance_gram import (
    entries_of,
    gram_launches,
    gram_pass,
    place,
    statistics,
    total_constants,
    totals,
)
from pydiffuse.kernels.guidance_mix import Mixture, mix_launches, stream
from pydiffuse.kernels.guidance_rules import RESCALE, at, combinations, solve

INLINE = 4  # predictions whose partials every program of guide_kernel adds by itself
CURVED = {rule.code: rule.curved for rule in RULES.values()}


@triton.jit(do_not_specialize=["partials", "n", "chunks", "blocks"])
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
    ENTRIES: tl.constexpr,
    HAS: tl.constexpr,
    EMIT: tl.constexpr,  # 0: the one term is a gradient y, and output i is c_i y
    PREDS: tl.constexpr,
    USED: tl.constexpr,
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    # Backwards: what the Gram pass read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    seed = tl.arange(0, 1)
    G = (statistics(partial, sample, partials, ENTRIES), None, 0, seed)
    params, c = solve(G, n, high, low, varied, sample, seed, RULE, K, RESCALED, SOURCE, COLUMNS, ENTRIES)
    if EMIT == 0:
        rows = ()
        for i in tl.static_range(K):
            rows = rows + ((c[i][0],),)
    else:
        rows = combinations(params, c, K, HAS, EMIT)
    for block in range(blocks):
        start = (chunk * blocks + block) * BLOCK
        stream(
            outs, out_strides, terms, strides, rows, None, None, sample, start, n,
            PREDS, USED, ANY, BLOCK, ALIGN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "chunks"])
def rule_kernel(
    matrix,  # [B, J, M + 1] float64; backward: [B, K, K + 1], dp_i = sum_j m_ij p_j + m_iK y + shift_i
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
    EMIT: tl.constexpr,  # 0: the backward; the statistics are those of (p_0 .. p_{K-1}, y)
    ENTRIES: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
    SEEDS: tl.constexpr,
):
    BACKWARD: tl.constexpr = EMIT == 0
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
                tl.store(matrix + (sample * len(rows) + j) * len(rows[j]) + m, rows[j][m])


class Rule(NamedTuple):
    """What the coefficients of a call come from, beside the predictions."""

    code: int
    k: int
    params: Sequence[float]
    rescaled: bool
    varied: Tensor | None
    columns: Sequence[int]

    def curved(self) -> bool:
        return self.rescaled or CURVED[self.code]

    def args(self) -> tuple[Any, ...]:
        """Kernels take float32 numbers: each parameter goes as the sum of two, good to 48 bits."""
        high = array("f", self.params).tolist()
        low = [v - h if abs(h) < float("inf") else 0.0 for v, h in zip(self.params, high, strict=True)]
        return tuple(high), tuple(low), self.varied

    def constants(self, has: int, emit: int) -> dict[str, Any]:
        columns = tuple(self.columns)
        source = tuple(columns.index(i) if i in columns else -1 for i in range(len(self.params)))
        return {
            "RULE": self.code,
            "K": self.k,
            "RESCALED": self.rescaled,
            "SOURCE": source,
            "COLUMNS": len(columns),
            "HAS": has,
            "EMIT": emit,
        }

    def stream(
        self, rows: Rows, mixture: Mixture, partial: Tensor | None, partials: int, has: int, emit: int
    ) -> Launch:
        """Coefficients and combination in one; `emit` 0 is the gradient of a rule without a Gram pass."""
        constants = {
            **self.constants(has, emit),
            **mixture.constants(rows),
            "ENTRIES": entries_of(self.k, self.rescaled) if partial is not None else 0,
        }
        chunks, blocks = rows.chunks(constants["BLOCK"])
        args = (*mixture.args(rows), partial, partials, rows.n, chunks, blocks, *self.args())
        return Launch(guide_kernel, rows.batch * chunks, args, constants, WARPS)

    def matrix(
        self,
        rows: Rows,
        outs: tuple[Tensor, Tensor | None, Tensor | None],
        partial: Tensor,
        chunks: int,
        has: int = 0,
        emit: int = 0,
    ) -> Launch:
        """Coefficients into memory: `outs` is the matrix and, for the gradient (`emit` 0), the shift and
        the gradient of what varies."""
        backward = emit == 0
        seeds = entries_of(self.k, self.rescaled) + len(self.columns) if backward else 1
        constants = {
            **self.constants(has, emit),
            **total_constants(entries_of(self.k + backward, self.rescaled)),
            "SEEDS": power_of_2(seeds),
        }
        args = (*outs, partial, rows.n, chunks, *self.args())
        return Launch(rule_kernel, rows.batch, args, constants, WARPS if seeds <= 128 else 2 * WARPS)


def guide_launches(
    out: Sequence[Tensor],
    preds: Sequence[Tensor],
    x: Tensor | None,
    history: Tensor | None,
    noise: Tensor | None,
    code: int,
    params: Sequence[float],
    rescaled: bool,
    varied: Tensor | None,
    columns: Sequence[int],
    emit: int,
) -> list[Launch]:
    check_doubles("guide", varied)
    k, extras = len(preds), (x, history, noise)
    has = sum(1 << i for i, t in enumerate(extras) if t is not None)
    rows, terms = Rows.of("guide", out, (*preds, *(t for t in extras if t is not None)))
    if rows.batch * rows.n == 0:
        return []
    rule = Rule(code, k, params, rescaled, varied, columns)
    every, more = (1 << k) - 1, ((1 << has.bit_count()) - 1) << k
    guided = 2 if code == RESCALE.value else every
    masks = {EMIT_UPDATE: guided | more, EMIT_PREDICT: guided | (has & 1) << k, EMIT_STATE: every}
    mixture = Mixture(out, terms, tuple(mask for bit, mask in masks.items() if emit & bit), k)
    if not rule.curved():
        return [rule.stream(rows, mixture, None, 0, has, emit)]
    launch, partial, chunks = gram_pass(rows, terms[:k], rescaled)
    if k <= INLINE:
        return [launch, rule.stream(rows, mixture, partial, chunks, has, emit)]
    matrix = partial.new_empty(rows.batch, len(out), len(terms) + 1)
    return [
        launch,
        rule.matrix(rows, (matrix, None, None), partial, chunks, has, emit),
        mixture.launch(rows, matrix, None),
    ]


def guide_backward_launches(
    dpreds: Sequence[Tensor],
    dvaried: Tensor | None,
    grad: Tensor,
    preds: Sequence[Tensor],
    code: int,
    params: Sequence[float],
    rescaled: bool,
    varied: Tensor | None,
    columns: Sequence[int],
) -> list[Launch]:
    check_doubles("guide_backward", varied, dvaried)
    k = len(preds)
    rows, terms = Rows.of("guide_backward", dpreds, (*preds, grad))
    if rows.batch * rows.n == 0:
        if dvaried is not None:
            dvaried.zero_()
        return []
    rule = Rule(code, k, params, rescaled, varied, columns)
    if not rule.curved() and dvaried is None:
        return [rule.stream(rows, Mixture(dpreds, terms[k:], (1,) * k), None, 0, 0, 0)]
    launch, partial, chunks = gram_pass(rows, terms, rescaled)
    matrix = partial.new_empty(rows.batch, k, k + 1)
    shift = partial.new_empty(rows.batch, k) if rescaled else None
    used = (1 << k + 1) - 1 if rule.curved() else 1 << k
    return [
        launch,
        rule.matrix(rows, (matrix, shift, dvaried), partial, chunks),
        Mixture(dpreds, terms, (used,) * k).launch(rows, matrix, shift),
    ]


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def guide(out: Sequence[Tensor], *args: Any) -> None:
    run(guide_launches(out, *args), out[0])


def guide_backward(dpreds: Sequence[Tensor], *args: Any) -> None:
    run(guide_backward_launches(dpreds, *args), dpreds[0])


def mix(out: Sequence[Tensor], *args: Any) -> None:
    run(mix_launches(out, *args), out[0])


def gram(out: Tensor, sums: Tensor | None, preds: Sequence[Tensor]) -> None:
    run(gram_launches(out, sums, preds), out)
