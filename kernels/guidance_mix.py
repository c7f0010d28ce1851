"""Combinations of guidance: out_j = shift_j + sum_m c_jm term_m per sample, in float32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import WARPS, Launch, Rows, cdiv, check_doubles, inner, narrow


def mix_block(tensors: int) -> int:
    """Elements per block of a combination: 16, 8 or 4 a thread of all the tensors it holds at once."""
    return 2048 if tensors <= 5 else 1024 if tensors <= 9 else 512


@inner
def stream(
    outs,
    out_strides,
    terms,
    strides,
    rows,  # coefficients [J][M] in registers, or () if they are in `matrix`; with PREDS, [J][M + 1]
    matrix,  # of this sample: [J, M] float64; with PREDS, [J, M + 1]
    shift,  # of this sample: [J] float64, or None
    sample,
    start,
    n,
    PREDS: tl.constexpr,  # leading terms that are taken as differences to one of them, the origin (last column)
    USED: tl.constexpr,  # per output, bit m: it has term m; what no output has is not read
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    COLUMNS: tl.constexpr = len(terms) + (PREDS > 0)
    lane = tl.arange(0, BLOCK)
    live = lane < tl.multiple_of(n - start, ALIGN)
    t = ()
    for m in tl.static_range(len(terms)):
        if ANY >> m & 1:
            row = tl.multiple_of(terms[m] + sample * strides[m] + start, ALIGN)
            t = t + (tl.load(row + lane, mask=live, other=0.0).to(tl.float32),)
        else:
            t = t + (0.0,)
    if PREDS > 1:  # as differences to the origin
        if len(rows) == 0:
            origin = tl.load(matrix + len(terms))
        else:
            origin = rows[0][len(terms)]
        zero, one = tl.where(origin == 0, t[0], 0.0), tl.where(origin == 1, t[1], 0.0)
        differences = (t[0] - one, t[1] - zero)
        for m in tl.static_range(2, PREDS):
            differences = differences + (t[m] - zero - one,)
        t = differences + t[PREDS:]
    results = ()
    for j in tl.static_range(len(outs)):
        y = tl.full([BLOCK], -0.0, tl.float32)  # -0 + y = y, always
        if shift is not None:
            y += tl.load(shift + j).to(tl.float32)
        for m in tl.static_range(len(terms)):
            if USED[j] >> m & 1:
                if len(rows) == 0:
                    c = tl.load(matrix + j * COLUMNS + m)
                else:
                    c = rows[j][m]
                y += tl.cast(c, tl.float32) * t[m]
        results = results + (y,)
    if len(outs) > 1:  # another thread may still have to read what this one overwrites
        tl.debug_barrier()
    for j in tl.static_range(len(outs)):
        row = tl.multiple_of(outs[j] + sample * out_strides[j] + start, ALIGN)
        tl.store(row + lane, narrow(results[j], outs[j].dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n", "chunks"])
def mix_kernel(
    outs,  # each [B, n]
    out_strides,
    terms,
    strides,
    matrix,  # [B, J, M] float64; with PREDS, [B, J, M + 1]
    shift,  # [B, J] float64, or None
    n,
    chunks,
    PREDS: tl.constexpr,
    USED: tl.constexpr,
    ANY: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0)
    sample, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    matrix += sample * len(outs) * (len(terms) + (PREDS > 0))
    if shift is not None:
        shift += sample * len(outs)
    start = chunk * BLOCK
    stream(
        outs, out_strides, terms, strides, (), matrix, shift, sample, start, n,
        PREDS, USED, ANY, BLOCK, ALIGN,
    )  # fmt: skip


class Mixture(NamedTuple):
    """Outputs, the terms they are combined from, and per output which terms it has, bit by bit: a term
    that is not there is not read, so its NaNs stay out."""

    outs: Sequence[Tensor]
    terms: Sequence[Tensor]
    used: tuple[int, ...]
    preds: int = 0
    """Leading terms that are taken as differences to one of them, so that equal ones come back exactly."""

    def args(self, rows: Rows) -> tuple[Any, ...]:
        outs, terms = tuple(self.outs), tuple(self.terms)
        return outs, rows.strides(outs), terms, rows.strides(terms)

    def constants(self, rows: Rows) -> dict[str, Any]:
        tensors, together = (*self.outs, *self.terms), 0
        for mask in self.used:
            together |= mask
        block = mix_block(len(tensors))
        return {
            "PREDS": self.preds,
            "USED": self.used,
            "ANY": together,
            "BLOCK": block,
            "ALIGN": rows.align(tensors),
        }

    def launch(self, rows: Rows, matrix: Tensor, shift: Tensor | None) -> Launch:
        constants = self.constants(rows)
        chunks = cdiv(rows.n, constants["BLOCK"])
        args = (*self.args(rows), matrix, shift, rows.n, chunks)
        return Launch(mix_kernel, rows.batch * chunks, args, constants, WARPS)


def mix_launches(
    out: Sequence[Tensor], terms: Sequence[Tensor], matrix: Tensor, shift: Tensor | None
) -> list[Launch]:
    check_doubles("mix", matrix, shift)
    rows, terms = Rows.of("mix", out, terms)
    if rows.batch * rows.n == 0:
        return []
    return [Mixture(out, terms, ((1 << len(terms)) - 1,) * len(out)).launch(rows, matrix, shift)]
