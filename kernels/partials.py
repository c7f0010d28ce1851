"""Sums over what programs left in memory, in one order: gradients of what many programs share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import INTERPRETED, WARPS, Launch, cdiv

ROWS = 8
BLOCK = 4096 if INTERPRETED else 128


@triton.jit(do_not_specialize=["count"])
def add_kernel(
    out,  # [size] float32
    partial,  # [count, size] float32
    size,
    count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # ROWS sums side by side, so that as many loads are under way.
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        live = (e < size)[None, :] & (first + row < count)
        total += tl.load(partial + (first + row) * size + e[None, :], mask=live, other=0.0)
    tl.store(out + e, tl.sum(total, 0), mask=e < size)


def add_launch(out: Tensor, partial: Tensor) -> Launch:
    """out = sum_i partial[i], partial [count, *out.shape]; both contiguous float32."""
    args = (out, partial, out.numel(), len(partial))
    return Launch(add_kernel, cdiv(out.numel(), BLOCK), args, {"ROWS": ROWS, "BLOCK": BLOCK}, WARPS)
