"""Token routing in Triton: gathering and scattering are one motion.

A program writes a block of one token: a copy of y's token, a blend of it with base's, or base's alone.
Every token is written by one program, so nothing is atomic. ids out of range are pulled to the ends.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import Launch, cdiv, narrow, power_of_2, run

MAX_BLOCK = 2048  # features of a program


@triton.jit(do_not_specialize=["count", "n", "blocks", "tokens", "gates"])
def move_kernel(
    out,  # [B, N, C]
    base,  # [B, N, C], or None: zeros
    y,  # [B, M, C], or None: zeros
    strides,  # of out, base, y: from sample to sample, from token to token
    index,  # [B, count] y's token, -1 for none; or None: the program's own
    place,  # [B, count] out's token; or None: the program's own
    gate,  # [B, gates] float32, or None
    count,
    n,
    blocks,  # of a token
    tokens,  # N or M, whichever index or place runs over
    gates,
    GATE_AT_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,  # divides every stride and n
):
    program = tl.program_id(0).to(tl.int64)
    item, block = program // blocks, program % blocks
    b, t = item // count, item % count
    s = t
    if index is not None:
        s = tl.minimum(tl.load(index + item), tokens - 1).to(tl.int64)
    p = t
    if place is not None:
        p = tl.minimum(tl.maximum(tl.load(place + item), 0), tokens - 1).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    live = column < tl.multiple_of(n, ALIGN)
    routed = s >= 0
    v = tl.zeros([BLOCK], tl.float32)
    if y is not None:
        from_y = tl.multiple_of(y + b * strides[4] + s * strides[5], ALIGN)
        v = tl.load(from_y + column, mask=live & routed, other=0.0).to(tl.float32)
    if gate is not None:
        at = s if GATE_AT_INDEX else t
        g = tl.load(gate + b * gates + at, mask=routed, other=0.0)
        v = g * v
    if base is not None:
        needed = live if gate is not None else live & (s < 0)
        from_base = tl.multiple_of(base + b * strides[2] + p * strides[3], ALIGN)
        old = tl.load(from_base + column, mask=needed, other=0.0).to(tl.float32)
        if gate is not None:
            old = (1.0 - g) * old
        v += old
    to = tl.multiple_of(out + b * strides[0] + p * strides[1], ALIGN)
    tl.store(to + column, narrow(v, out.dtype.element_ty), mask=live)


def _launch(
    op: str,
    out: Tensor,
    base: Tensor | None,
    y: Tensor | None,
    index: Tensor | None,
    place: Tensor | None,
    gate: Tensor | None,
    count: int,
    tokens: int,
    at_index: bool,
) -> list[Launch]:
    for t in (out, base, y):
        if t is not None and (t.dim() != 3 or (t.stride(2) != 1 and t.shape[2] > 1)):
            raise ValueError(f"{op}: tensors must be [B, N, C], features side by side")
    B, _, n = out.shape
    if not B * count * n:
        return []
    strides = tuple(s for t in (out, base, y) for s in ((0, 0) if t is None else t.stride()[:2]))
    block = min(MAX_BLOCK, power_of_2(n))
    blocks = cdiv(n, block)
    gates = 0 if gate is None else gate.shape[1]
    args = (out, base, y, strides, index, place, gate, count, n, blocks, tokens, gates)
    there = [t for t in (out, base, y) if t is not None]
    aligned = all(v % 16 == 0 for t in there for v in (*t.stride()[:2], t.data_ptr())) and n % 16 == 0
    constants = {"GATE_AT_INDEX": at_index, "BLOCK": block, "ALIGN": 16 if aligned else 1}
    return [Launch(move_kernel, B * count * blocks, args, constants, 4 if block <= 1024 else 8)]


def gather_launches(out: Tensor, x: Tensor, ids: Tensor, gate: Tensor | None) -> list[Launch]:
    N = x.shape[1]
    return _launch("gather_tokens", out, None, x, ids.clamp(min=0), None, gate, ids.shape[1], N, False)


def scatter_launches(
    out: Tensor, base: Tensor | None, y: Tensor | None, ids: Tensor, gate: Tensor | None
) -> list[Launch]:
    op, (B, N, _), keep = "scatter_tokens", out.shape, ids.shape[1]
    if base is not None and base.data_ptr() == out.data_ptr() and base.stride() == out.stride():
        return _launch(op, out, base, y, None, ids, gate, keep, N, False)
    slot = torch.full((B, N), -1, dtype=torch.int32, device=out.device)
    own = torch.arange(keep, dtype=torch.int32, device=out.device).expand(B, keep)
    if N:
        slot.scatter_(1, ids.clamp(0, N - 1).long(), own)
    return _launch(op, out, base, y, slot, None, gate, N, max(keep, 1), True)


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def gather_tokens(out: Tensor, *args: Any) -> None:
    run(gather_launches(out, *args), out)


def scatter_tokens(out: Tensor, *args: Any) -> None:
    run(scatter_launches(out, *args), out)
