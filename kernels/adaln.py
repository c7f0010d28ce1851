"""Adaptive layer norm in Triton: normalise, then scale and shift by a row of a table.

modulate_kernel           a program per token: its features stay in registers from the sums to the output.
modulate_backward_kernel  a program per segment, some tokens of one row of the table in their order: it
                          writes their gradients and adds up their part of the table's.
sum_kernel                adds the segments of a row of the table, in their order, a block of columns each.

Segments come from a stable sort on the device, so their number is bounded here but never read back.
Rows outside the table are pulled to its ends: nothing outside it is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import Launch, Rows, cdiv, inner, narrow, power_of_2, run

MAX_FEATURES = 8192
SEGMENT = 16  # tokens, at least
SEGMENTS = 4096  # beyond which they grow
SUM_BLOCK = 256
IN_REGISTERS = 4096  # features whose sums over a segment are kept there; of more, in memory


def warps_of(block: int) -> int:
    return min(32, max(4, block // 256))


@inner
def token_of(tensor, stride, token, n, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    at = tl.multiple_of(tensor + token * stride, ALIGN)
    return tl.load(at + lane, mask=lane < tl.multiple_of(n, ALIGN), other=0.0).to(tl.float32)


@inner
def store_token(tensor, stride, token, value, n, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    at = tl.multiple_of(tensor + token * stride, ALIGN)
    live = lane < tl.multiple_of(n, ALIGN)
    tl.store(at + lane, narrow(value, tensor.dtype.element_ty), mask=live)


@inner
def normed(v, n, eps, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """u = norm(v) and 1 / its spread. The second sum takes out what the mean missed by rounding."""
    rstd = 1.0
    if NORM == 1:
        live = tl.arange(0, BLOCK) < n
        d = tl.where(live, v - tl.sum(v, 0) / n, 0.0)
        missed = tl.sum(d, 0) / n
        rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, 0) / n - missed * missed + eps)
        v = tl.where(live, (d - missed) * rstd, 0.0)
    elif NORM == 2:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / n + eps)
        v = v * rstd
    return v, rstd


@inner
def table_row(table, rows, token, table_rows, n, COLUMNS: tl.constexpr):
    row = tl.load(rows + token)
    row = tl.minimum(tl.maximum(row, 0), table_rows - 1).to(tl.int64)
    return table + row * COLUMNS * n


@triton.jit(do_not_specialize=["table_rows", "n"])
def modulate_kernel(
    y,  # [R, D]
    r,  # [R, D], or None
    x,
    branch,  # [R, D], or None
    strides,  # of y, r, x, branch
    table,  # [K, COLUMNS, D] float32
    rows,  # [R] int32
    table_rows,
    n,
    eps,
    one,  # factor = one + scale
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = table_row(table, rows, token, table_rows, n, COLUMNS)
    v = token_of(x, strides[2], token, n, BLOCK, ALIGN)
    if branch is not None:
        gate = token_of(at + 2 * n, 0, 0, n, BLOCK, ALIGN)
        v += gate * token_of(branch, strides[3], token, n, BLOCK, ALIGN)
    u, _ = normed(v, n, eps, NORM, BLOCK)
    shift = token_of(at, 0, 0, n, BLOCK, ALIGN)
    factor = one + token_of(at + n, 0, 0, n, BLOCK, ALIGN)
    if r is not None:
        store_token(r, strides[1], token, v, n, BLOCK, ALIGN)
    store_token(y, strides[0], token, u * factor + shift, n, BLOCK, ALIGN)


@inner
def add_to(sums, start, value, first, n, BLOCK: tl.constexpr):
    """Sums that registers cannot hold: every thread reads back only what it has written itself."""
    lane = tl.arange(0, BLOCK)
    before = tl.load(sums + start + lane, mask=(lane < n) & (first == 0), other=0.0)
    tl.store(sums + start + lane, before + value, mask=lane < n)


@triton.jit(do_not_specialize=["table_rows", "n"])
def modulate_backward_kernel(
    dx,  # [R, D]
    dbranch,  # [R, D], or None
    dy,
    dr,  # [R, D], or None
    x,
    branch,
    strides,  # of dx, dbranch, dy, dr, x, branch
    partial,  # [segments, COLUMNS, D] float32
    order,  # [R] tokens by their row of the table
    begin,  # [segments] of `order`
    end,
    table,
    rows,
    table_rows,
    n,
    eps,
    one,
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(begin + segment), tl.load(end + segment)
    partial += segment * COLUMNS * n
    lane = tl.arange(0, BLOCK)
    dshift = tl.zeros([BLOCK], tl.float32)
    dscale = dshift
    dgate = dshift
    for i in range(first, last):
        token = tl.load(order + i).to(tl.int64)
        at = table_row(table, rows, token, table_rows, n, COLUMNS)
        v = token_of(x, strides[4], token, n, BLOCK, ALIGN)
        if branch is not None:
            gate = token_of(at + 2 * n, 0, 0, n, BLOCK, ALIGN)
            v += gate * token_of(branch, strides[5], token, n, BLOCK, ALIGN)
        u, rstd = normed(v, n, eps, NORM, BLOCK)
        if not REGISTERS:
            tl.debug_barrier()  # what follows is not to be loaded before there are registers for it
        slope = token_of(dy, strides[2], token, n, BLOCK, ALIGN)
        if REGISTERS:
            dshift += slope
            dscale += slope * u
        else:
            add_to(partial, 0, slope, i == first, n, BLOCK)
            add_to(partial, n, slope * u, i == first, n, BLOCK)
        dv = slope * (one + token_of(at + n, 0, 0, n, BLOCK, ALIGN))
        if NORM > 0:
            along = tl.sum(dv * u, 0) / n
            if NORM == 1:
                dv -= tl.sum(dv, 0) / n
            dv = (dv - u * along) * rstd
        if dr is not None:
            dv += token_of(dr, strides[3], token, n, BLOCK, ALIGN)
        store_token(dx, strides[0], token, dv, n, BLOCK, ALIGN)
        if not REGISTERS:
            tl.debug_barrier()
        if branch is not None:
            gate = token_of(at + 2 * n, 0, 0, n, BLOCK, ALIGN)
            store_token(dbranch, strides[1], token, dv * gate, n, BLOCK, ALIGN)
            more = dv * token_of(branch, strides[5], token, n, BLOCK, ALIGN)
            if REGISTERS:
                dgate += more
            else:
                add_to(partial, 2 * n, more, i == first, n, BLOCK)
    if REGISTERS:
        tl.store(partial + lane, dshift, mask=lane < n)
        tl.store(partial + n + lane, dscale, mask=lane < n)
        if branch is not None:
            tl.store(partial + 2 * n + lane, dgate, mask=lane < n)


@triton.jit(do_not_specialize=["width", "blocks"])
def sum_kernel(
    dtable,  # [K, width] float32
    partial,  # [segments, width]
    of_row,  # [K + 1] int64: the segments of each row of the table
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for segment in range(tl.load(of_row + row), tl.load(of_row + row + 1)):
        total += tl.load(partial + segment * width + column, mask=column < width, other=0.0).to(
            tl.float64
        )
    tl.store(dtable + row * width + column, total.to(tl.float32), mask=column < width)


class Modulation(NamedTuple):
    """What forward and backward share, checked."""

    tokens: Rows
    table: Tensor
    rows: Tensor
    norm: int
    eps: float
    factors: bool

    @classmethod
    def of(
        cls,
        op: str,
        tensors: list[Tensor | None],
        table: Tensor,
        rows: Tensor,
        columns: int,
        *rest: Any,
    ) -> Modulation:
        x = tensors[0]
        assert x is not None
        if x.dim() != 2 or not 0 < x.shape[1] <= MAX_FEATURES:
            raise ValueError(
                f"{op}: {x.shape[-1]} features; the Triton kernels accept 1 to {MAX_FEATURES}"
            )
        for t in tensors:
            if t is not None and (t.shape != x.shape or (t.stride(1) != 1 and t.shape[1] > 1)):
                raise ValueError(f"{op}: tensors must be [R, D] alike, features side by side")
        if table.shape[1:] != (columns, x.shape[1]) or table.dtype is not torch.float32:
            raise ValueError(f"{op}: table must be float32 [K, {columns}, {x.shape[1]}]")
        if not len(table):
            raise ValueError(f"{op}: table has no rows")
        if rows.shape != x.shape[:1] or rows.dtype is not torch.int32 or not rows.is_contiguous():
            raise ValueError(f"{op}: rows must be contiguous int32 [{len(x)}]")
        return cls(Rows(*x.shape), table, rows, *rest)

    def args(self) -> tuple[Any, ...]:
        one = 0.0 if self.factors else 1.0
        return self.table, self.rows, len(self.table), self.tokens.n, self.eps, one

    def constants(self, tensors: list[Tensor | None]) -> dict[str, Any]:
        there = [t for t in tensors if t is not None]
        align = min(self.tokens.align(there), self.tokens.align([self.table[:, 0]]))
        return {
            "NORM": self.norm,
            "COLUMNS": self.table.shape[1],
            "BLOCK": power_of_2(self.tokens.n),
            "ALIGN": align,
        }

    def strides(self, tensors: list[Tensor | None]) -> tuple[int, ...]:
        return tuple(0 if t is None else self.tokens.strides([t])[0] for t in tensors)


class Segments(NamedTuple):
    order: Tensor  # [R]
    begin: Tensor  # [segments]; those that are left over are empty
    end: Tensor
    of_row: Tensor  # [K + 1]

    @classmethod
    def of(cls, rows: Tensor, K: int) -> Segments:
        """Tokens sorted by row of the table, each row cut into pieces of one length."""
        R = len(rows)
        length = max(SEGMENT, power_of_2(cdiv(R, SEGMENTS)))
        row, order = rows.clamp(0, K - 1).sort(stable=True)
        bounds = torch.searchsorted(row, torch.arange(K + 1, device=rows.device, dtype=row.dtype))
        pieces = (bounds[1:] - bounds[:-1] + length - 1) // length
        of_row = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
        piece = torch.arange(min(R, K + R // length), device=rows.device)
        k = torch.searchsorted(of_row[1:], piece, right=True)
        used, k = k < K, k.clamp(max=K - 1)
        begin = bounds[k] + (piece - of_row[k]) * length
        end = torch.where(used, torch.minimum(begin + length, bounds[k + 1]), begin)
        return cls(order, begin, end, of_row)


def modulate_launches(
    y: Tensor, r: Tensor | None, x: Tensor, branch: Tensor | None, table: Tensor, rows: Tensor, *rest: Any
) -> list[Launch]:
    tensors = [y, r, x, branch]
    if not x.numel():
        return []
    call = Modulation.of("modulate", tensors, table, rows, 2 if branch is None else 3, *rest)
    constants = call.constants(tensors)
    args = (*tensors, call.strides(tensors), *call.args())
    return [Launch(modulate_kernel, len(x), args, constants, warps_of(constants["BLOCK"]))]


def modulate_backward_launches(
    dx: Tensor,
    dbranch: Tensor | None,
    dtable: Tensor,
    dy: Tensor,
    dr: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    table: Tensor,
    rows: Tensor,
    *rest: Any,
) -> list[Launch]:
    tensors = [dx, dbranch, dy, dr, x, branch]
    if not x.numel():
        dtable.zero_()
        return []
    columns = 2 if branch is None else 3
    call = Modulation.of("modulate_backward", tensors, table, rows, columns, *rest)
    if dtable.shape != table.shape or dtable.dtype != table.dtype or not dtable.is_contiguous():
        raise ValueError("modulate_backward: dtable must be contiguous float32, like table")
    order, begin, end, of_row = Segments.of(rows, len(table))
    partial = torch.empty(len(begin), *table.shape[1:], dtype=torch.float32, device=x.device)
    constants = call.constants(tensors)
    registers = constants["BLOCK"] <= IN_REGISTERS
    args = (*tensors, call.strides(tensors), partial, order, begin, end, *call.args())
    width = columns * x.shape[1]
    blocks = cdiv(width, SUM_BLOCK)
    return [
        Launch(
            modulate_backward_kernel,
            len(begin),
            args,
            {**constants, "REGISTERS": registers},
            warps_of(constants["BLOCK"]),
            fused=False,  # of one feature all is mean: dy scale less its mean is 0, not what rounding left
        ),
        Launch(
            sum_kernel,
            len(table) * blocks,
            (dtable, partial, of_row, width, blocks),
            {"BLOCK": SUM_BLOCK},
            4,
        ),
    ]


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def modulate(y: Tensor, *args: Any) -> None:
    run(modulate_launches(y, *args), y)


def modulate_backward(dx: Tensor, *args: Any) -> None:
    run(modulate_backward_launches(dx, *args), dx)
