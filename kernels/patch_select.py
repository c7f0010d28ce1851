"""Which patches advance, in Triton, and where the dual loop takes all of them.

select_kernel  one program per sample: the k-th highest score bit by bit, then one pass in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.kernels.common import WARPS, Launch, inner, integers, run, unspecialised

BLOCK = 1024


@inner
def keys(score, p, count):
    # Scores as integers in the same order: -0 is 0, NaN is below all numbers, no patch below NaN.
    s = tl.load(score + p, mask=p < count, other=0.0)
    u = tl.where(s == 0, 0.0, s).to(tl.uint32, bitcast=True).to(tl.int64)
    key = tl.where(u >= 0x80000000, 0xFFFFFFFF - u, u + 0x80000000)
    return tl.where(p < count, tl.where(s != s, 0, key), -1)


@triton.jit(do_not_specialize=["parts", "batch", "k"])
def select_kernel(
    ids,  # [B, k] int64, or None
    rest,  # [B, N - k] int64, or None
    mask,  # [B, N] bytes, or None
    levels,  # [parts, B, N] float32, or None: chosen patches at t + dt at once, the others in parts
    score,  # [B, N] float32
    t,  # [B, N] float32 with strides, where there are levels
    dts,  # the same, or None: dt for all
    strides,  # of t, dts
    dt,
    parts,
    batch,
    k,
    count,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    strides = integers(strides)
    score += sample * count
    least = tl.zeros([1], tl.int64)
    for bit in range(32):
        more = least + (tl.full([1], 1, tl.int64) << (31 - bit))
        seen = tl.zeros([1], tl.int32)
        for start in range(0, count, BLOCK):
            key = keys(score, start + tl.arange(0, BLOCK), count)
            seen += tl.sum((key >= more).to(tl.int32), 0)
        least = tl.where(seen >= k, more, least)
    ties = tl.full([1], 0, tl.int32) + k  # how many of those equal to the least are chosen
    for start in range(0, count, BLOCK):
        key = keys(score, start + tl.arange(0, BLOCK), count)
        ties -= tl.sum((key > least).to(tl.int32), 0)
    done = tl.zeros([1], tl.int32)
    for start in range(0, count, BLOCK):
        p = start + tl.arange(0, BLOCK)
        live = p < count
        key = keys(score, p, count)
        equal = (key == least).to(tl.int32)
        chosen = ((key > least) | ((equal == 1) & (tl.cumsum(equal, 0) <= ties))).to(tl.int32)
        if ids is not None:
            place = done + tl.cumsum(chosen, 0)
            tl.store(ids + sample * k + place - 1, p.to(tl.int64), mask=chosen == 1)
            others = rest + sample * (count - k)
            tl.store(others + p - place, p.to(tl.int64), mask=(chosen == 0) & live)
            done += tl.sum(chosen, 0)
        if mask is not None:
            tl.store(mask + sample * count + p, chosen.to(tl.uint8), mask=live)
        if levels is not None:
            now = tl.load(t + sample * strides[0] + p * strides[1], mask=live, other=0.5)
            step = dt
            if dts is not None:
                step = tl.load(dts + sample * strides[2] + p * strides[3], mask=live, other=0.0)
            whole = now + step
            goal = tl.where(whole > 1.0, 1.0, whole)
            goal = tl.where((now >= 0) & (now <= 1), goal, float("nan"))
            for part in range(parts):
                along = now + (goal - now) * ((part + 1) / parts)
                there = (chosen == 1) | (part + 1 == parts) | (along >= goal)
                to = levels + (part * batch + sample) * count + p
                tl.store(to, tl.where(there, goal, along), mask=live)
        ties -= tl.sum(equal, 0)


def select_patches_launches(
    ids: Tensor | None,
    rest: Tensor | None,
    mask: Tensor | None,
    levels: Tensor | None,
    score: Tensor,
    k: int,
    t: Tensor | None,
    dts: Tensor | None,
    dt: float,
) -> list[Launch]:
    strides: tuple[int, ...] = ()
    for table in (t, dts):
        strides += (0, 0) if table is None else table.stride()
    flags = None if mask is None else mask.view(torch.uint8)
    parts = 0 if levels is None else len(levels)
    B, count = score.shape
    args = (
        ids,
        rest,
        flags,
        levels,
        score,
        t,
        dts,
        unspecialised(*strides),
        float(dt),
        parts,
        B,
        k,
        count,
    )
    return [Launch(select_kernel, B, args, {"BLOCK": BLOCK}, WARPS)]


def select_patches(
    ids: Tensor | None,
    rest: Tensor | None,
    mask: Tensor | None,
    levels: Tensor | None,
    score: Tensor,
    *args: Any,
) -> None:
    run(select_patches_launches(ids, rest, mask, levels, score, *args), score)
