"""Patches in Triton: combinations whose coefficients are constant per patch, losses; the selection stands
in patch_select.

mix_patches_kernel  a program owns a block of a sample's elements, in the order of memory; every element
                    finds its patch by division, loads its levels (neighbours share them: they come from
                    the cache) and computes its coefficients in registers.
errors_kernel       a program owns some patches; a patch's elements are added in blocks of fixed places.
loss_kernel         one program per sample adds its patches.

Levels outside [0, 1] make their patch NaN: looking at them ahead of the launch would be a sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.grids import HISTORY, METHODS, PRED, RESIDUAL, UNCOND, X
from pydiffuse.kernels.common import (
    WARPS,
    Launch,
    cdiv,
    check_doubles,
    integers,
    narrow,
    run,
    unspecialised,
)
from pydiffuse.kernels.patch_rules import coefficients
from pydiffuse.kernels.patch_select import select_patches

__all__ = ["mix_patches", "patch_loss", "select_patches"]
BLOCK = 1024
GUIDED = 1 << X | 1 << PRED | 1 << UNCOND  # terms, bit by bit
MULTISTEP, RESIDUAL_OF = tl.constexpr(METHODS.index("multistep")), tl.constexpr(RESIDUAL)


@triton.jit(do_not_specialize=["blocks"])
def mix_patches_kernel(
    outs,  # each [B, n]
    terms,
    arrived,  # [B, N], or None
    t,  # tables [B, N] with strides
    t_next,
    t_last,
    mask,  # [B, N] bytes, or None
    scales,  # [B], or None
    strides,  # of t, t_next, t_last
    scale,
    eta,
    n,
    blocks,
    sizes,  # channels, planes, rows, columns
    patch,  # planes, rows, columns
    METHOD: tl.constexpr,
    PATH: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    PLACES: tl.constexpr,  # per output and term: its coefficient of those ten, or -1
    GUIDED: tl.constexpr,  # terms 1 and 2 are c and u of u + w (c - u)
    KEPT: tl.constexpr,  # per output: the term that takes over where a patch stays, or -1
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    e = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < n
    if not WIDE:
        e = e.to(tl.int32)
    _, planes, rows, columns = integers(sizes)
    strides = integers(strides)
    column, up = e % columns, e // columns
    row, up = up % rows, up // rows
    plane, channel = up % planes, up // planes
    at = (plane // patch[0] * (rows // patch[1]) + row // patch[1]) * (columns // patch[2])
    at = (at + column // patch[2]).to(tl.int64)
    count = (planes // patch[0]).to(tl.int64) * (rows // patch[1]) * (columns // patch[2])

    now = tl.load(t + sample * strides[0] + at * strides[1], mask=live, other=0.5)
    valid = live
    following, before = now, now
    if METHOD != RESIDUAL_OF:
        valid = (now >= 0) & (now <= 1)
    if t_next is not None:
        following = tl.load(t_next + sample * strides[2] + at * strides[3], mask=live, other=0.5)
        if METHOD != RESIDUAL_OF:
            valid = valid & (following >= 0) & (following <= 1)
    if t_last is not None:
        before = tl.load(t_last + sample * strides[4] + at * strides[5], mask=live, other=0.5)
    stays = e < 0
    if METHOD <= MULTISTEP:
        stays = now == following
        if mask is not None:
            stays = stays | (tl.load(mask + sample * count + at, mask=live, other=0) == 0)
    w = scale
    if scales is not None:
        w = tl.load(scales + sample)
    c = coefficients(now, following, before, w, eta, METHOD, PATH, SOURCE, TARGET, GUIDED)

    x = ()
    for m in tl.static_range(len(terms)):
        x = x + (tl.load(terms[m] + sample * n + e, mask=live, other=0.0).to(tl.float32),)
    if GUIDED:
        x = (x[0], x[1] - x[2]) + x[2:]
    results = ()
    for j in tl.static_range(len(outs)):
        y = tl.full([BLOCK], -0.0, tl.float32)  # -0 + y = y, always
        kept = tl.zeros([BLOCK], tl.float32)
        for m in tl.static_range(len(terms)):
            if PLACES[j * len(terms) + m] >= 0:
                y += c[PLACES[j * len(terms) + m]] * x[m]
        if KEPT[j] >= 0:
            kept = x[KEPT[j]]
        results = results + (tl.where(valid, tl.where(stays, kept, y), float("nan")),)
    if len(outs) > 1:  # another thread may still have to read what this one overwrites
        tl.debug_barrier()
    for j in tl.static_range(len(outs)):
        tl.store(outs[j] + sample * n + e, narrow(results[j], outs[j].dtype.element_ty), mask=live)
    if arrived is not None:
        first = (
            (column % patch[2] == 0) & (row % patch[1] == 0) & (plane % patch[0] == 0) & (channel == 0)
        )
        there = tl.where(valid, tl.where(stays, now, following), float("nan"))
        tl.store(arrived + sample * count + at, there, mask=live & first)


@triton.jit(do_not_specialize=["n", "count", "blocks", "per_patch"])
def errors_kernel(
    errors,  # [B, N] float64
    pred,
    target,
    n,
    count,
    blocks,
    per_patch,
    sizes,
    patch,
    PATCHES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    p = program % blocks * PATCHES + tl.arange(0, PATCHES)
    _, planes, rows, columns = integers(sizes)
    across, down = columns // patch[2], rows // patch[1]
    corner = (p // across // down * patch[0]).to(tl.int64) * rows + p // across % down * patch[1]
    corner = corner * columns + p % across * patch[2]
    total = tl.zeros([PATCHES], tl.float64)
    for start in range(0, per_patch, ELEMENTS):
        k = start + tl.arange(0, ELEMENTS)
        column, up = k % patch[2], k // patch[2]
        row, up = up % patch[1], up // patch[1]
        plane, channel = up % patch[0], up // patch[0]
        place = (channel.to(tl.int64) * planes + plane) * rows + row
        place = place * columns + column
        live = (p < count)[:, None] & (k < per_patch)[None, :]
        at = sample * n + corner[:, None] + place[None, :]
        a = tl.load(pred + at, mask=live, other=0.0).to(tl.float32)
        b = tl.load(target + at, mask=live, other=0.0).to(tl.float32)
        total += tl.sum((a - b) * (a - b), 1).to(tl.float64)
    tl.store(errors + sample * count + p, total, mask=p < count)


@triton.jit(do_not_specialize=["count", "per_patch"])
def loss_kernel(
    loss,  # [B] float64
    errors,  # [B, N] float64
    logvar,  # [B, N] float32, or None
    weight,
    nll,
    count,
    per_patch,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        p = start + tl.arange(0, BLOCK)
        at = sample * count + p
        each = tl.load(errors + at, mask=p < count, other=0.0)
        if logvar is not None:
            l = tl.load(logvar + at, mask=p < count, other=0.0).to(tl.float64)
            sure = per_patch * (1.8378770664093453 + l) + each * tl.exp(-l)
            each += tl.where(p < count, 0.5 * nll * sure, 0.0)
        if weight is not None:
            each *= tl.load(weight + at, mask=p < count, other=0.0).to(tl.float64)
        total += each
    tl.store(loss + sample, tl.sum(total, 0))


def _matrix(outs: int, terms: int, transposed: bool) -> dict[str, Any]:
    """Which coefficient stands where: rows are outputs, columns terms, as the bits of both say."""
    rows, columns = ([i for i in range(5) if mask >> i & 1] for mask in (outs, terms))
    pairs = [[(m, j) if transposed else (j, m) for m in columns] for j in rows]
    stay = ((0, X), (1, HISTORY))
    kept = (next((i for i, pair in enumerate(row) if pair in stay), -1) for row in pairs)
    # Only a step looks back, and history becomes what was predicted now.
    places = (5 * j + m if (j, m) != (1, HISTORY) else -1 for row in pairs for j, m in row)
    guided = not transposed and terms & GUIDED == GUIDED
    return {"PLACES": tuple(places), "GUIDED": guided, "KEPT": tuple(kept)}


def _images(op: str, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        if not t.is_contiguous() or t.shape != tensors[0].shape:
            raise ValueError(f"{op}: images must be contiguous and of one shape")


def mix_patches_launches(
    out: Sequence[Tensor],
    arrived: Tensor | None,
    terms: Sequence[Tensor],
    t: Tensor,
    t_next: Tensor | None,
    t_last: Tensor | None,
    mask: Tensor | None,
    scales: Tensor | None,
    grid: Sequence[int],
    rule: Sequence[int],
    scale: float,
    eta: float,
    transposed: bool,
) -> list[Launch]:
    _images("mix_patches", (*out, *terms))
    n = out[0][0].numel()
    blocks = cdiv(n, BLOCK)
    strides: tuple[int, ...] = ()
    for table in (t, t_next, t_last):
        strides += (0, 0) if table is None else table.stride()
    method, path, source, target, outs, present = rule
    constants = {
        "METHOD": method,
        "PATH": path,
        "SOURCE": source,
        "TARGET": target,
        **_matrix(outs, present, transposed),
        "WIDE": n >= 2**31 - BLOCK,
        "BLOCK": BLOCK,
    }
    args = (
        tuple(out), tuple(terms), arrived, t, t_next, t_last,
        None if mask is None else mask.view(torch.uint8), scales, unspecialised(*strides),
        float(scale), float(eta), n, blocks, unspecialised(*grid[:4]), tuple(grid[4:]),
    )  # fmt: skip
    return [Launch(mix_patches_kernel, len(t) * blocks, args, constants, WARPS)]


def patch_loss_launches(
    loss: Tensor,
    errors: Tensor,
    pred: Tensor,
    target: Tensor,
    logvar: Tensor | None,
    weight: Tensor | None,
    nll: float,
    grid: Sequence[int],
) -> list[Launch]:
    _images("patch_loss", (pred, target))
    check_doubles("patch_loss", loss, errors)
    sizes, patch = unspecialised(*grid[:4]), tuple(grid[4:])
    count, n = errors.shape[1], pred[0].numel()
    per_patch, patches = n // count, 32
    blocks = cdiv(count, patches)
    args = (errors, pred, target, n, count, blocks, per_patch, sizes, patch)
    tiles = {"PATCHES": patches, "ELEMENTS": 64}
    last = (loss, errors, logvar, weight, float(nll), count, per_patch)
    return [
        Launch(errors_kernel, len(loss) * blocks, args, tiles, WARPS),
        Launch(loss_kernel, len(loss), last, {"BLOCK": BLOCK}, WARPS),
    ]


# The ops: arguments as in the schemas of pydiffuse/_schemas.py.


def mix_patches(out: Sequence[Tensor], *args: Any) -> None:
    run(mix_patches_launches(out, *args), out[0])


def patch_loss(loss: Tensor, *args: Any) -> None:
    run(patch_loss_launches(loss, *args), loss)
