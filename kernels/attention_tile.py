"""What the attention kernels share: heads cut into pieces, blocks of a plan, a mask's bits.

A block's own side are its ROWS queries, or keys in the kernel for dk and dv; it walks the spans of the
other side in steps of STEP. D is cut into pieces whose widths are powers of two (96 = 64 + 32), so that no
matrix product runs over padding; only a last piece of 8 is one of 16 with half of it masked. What has D
features is a tuple of tensors, one for each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.structs import BLOCK, PlanTensors, Spans
from pydiffuse.kernels.common import INTERPRETED, capability, inner, integer, narrow, unspecialised

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NARROWEST = 16  # features of a piece: what matrix units take


class Arguments(NamedTuple):
    """What both ops get after their outputs."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, Hk, Sk, D]
    v: Tensor
    scales: Tensor | None  # float32 [H]
    scale: float
    plan: PlanTensors

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, scale: float, *plan: Any
    ) -> Arguments:
        return cls(q, k, v, scales, scale, PlanTensors(*plan))

    @property
    def by_q(self) -> Spans:
        return Spans(*self.plan[:4])

    @property
    def by_k(self) -> Spans:
        return Spans(*self.plan[4:8])

    @property
    def masks(self) -> tuple[Tensor, Tensor] | None:
        """Words, and each mask's first; None where all that is kept is kept whole."""
        return (self.plan.words, self.plan.mask_at) if self.plan.mask_at.numel() else None


class Tile(NamedTuple):
    """The launch parameters of one kernel for one head_dim and dtype."""

    rows: int  # own: a power of two to BLOCK, from 16 for queries and 32 for keys
    step: int  # of the other side, a power of two from the same
    warps: int
    stages: int  # of loads under way
    widest: int = 256  # features of a piece at most
    registers: int | None = 255  # all there are; None where ptxas spills less by itself
    precision: str = "ieee"  # of float32 products: tf32x3 is three on matrix units, about as exact

    def constants(self, D: int, vector: int) -> dict[str, Any]:
        return {
            "D": D, "WIDEST": self.widest, "ROWS": self.rows, "STEP": self.step,
            "PARTS": BLOCK // self.rows, "VECTOR": vector, "PRECISION": self.precision,
        }  # fmt: skip


# Cards whose blocks have 99 kB of shared memory, where others have 163 or 227.
SMALL = (86, 89, 120, 121)


def tile_of(kernel: str, a: Arguments) -> Tile:
    """By kernel, head_dim, dtype and GPU."""
    tile = largest_tile(kernel, a)
    if capability(a.q) not in SMALL or a.q.shape[3] <= 128:
        return tile
    tile = tile._replace(stages=1)  # of wide heads two loads under way do not fit
    if a.q.dtype != torch.float32 or kernel == "forward":
        return tile
    # Nor do four operands of 32: queries are taken 16 at a time, whichever side they are.
    return tile._replace(rows=16) if kernel == "dq" else tile._replace(step=16)


def largest_tile(kernel: str, a: Arguments) -> Tile:
    """The largest that needs no more registers than there are."""
    D, masked, gpu = a.q.shape[3], a.masks is not None, capability(a.q)
    if a.q.dtype == torch.float32:
        return _float32_tile(kernel, D, gpu)
    if gpu < 90:
        if kernel == "forward" and D <= 64:
            return Tile(128, 64, 8, 2) if D > 32 else Tile(64, 64, 4, 2)
        if kernel == "forward":
            return Tile(64, 32, 8, 2)
        if kernel == "dq":
            return Tile(64, 32, 4, 2) if D <= 64 else Tile(64, 32, 8, 2, 256, None)
        return Tile(64, 32, 8, 2, 256 if D in (64, 128, 256) else 32, 255 if D <= 32 else None)
    if gpu < 100:
        return next(tile for most, whole, tile in HOPPER[kernel] if most >= D and not (whole and masked))
    if D <= 32:
        return Tile(64, 64, 4, 2)
    if kernel == "forward":
        return Tile(128, 64, 8, 3) if D <= 128 else Tile(64, 32, 8, 2)
    if D > 128:
        return Tile(64, 32, 8, 2 if kernel == "dv" else 1, 128 if kernel == "dk" else 256)
    if kernel == "dq":
        return Tile(128, 64, 8, 2)
    return Tile(64, 32 if masked else 64, 8, 2)


# The largest head_dim, whether it is for plans without masks alone, and the tile: the fastest without spills
# of those that benchmarks/attention_tiles.py measured on an H100.
HOPPER = {
    "forward": (
        (32, False, Tile(64, 64, 4, 2)), (56, False, Tile(64, 64, 4, 3)), (64, True, Tile(128, 64, 4, 3)),
        (128, False, Tile(64, 64, 4, 3)), (256, True, Tile(64, 64, 8, 2)), (256, False, Tile(64, 32, 8, 2)),
    ),
    "dq": (
        (32, False, Tile(64, 64, 4, 2)), (96, False, Tile(64, 64, 4, 3)), (128, False, Tile(64, 32, 4, 3)),
        (256, False, Tile(64, 32, 8, 2)),
    ),
    "dkv": (
        (32, False, Tile(64, 64, 4, 2)), (56, False, Tile(64, 32, 4, 2)), (64, True, Tile(64, 64, 4, 3)),
        (64, False, Tile(64, 32, 4, 2)), (96, False, Tile(128, 32, 8, 3)), (120, True, Tile(64, 32, 4, 2)),
        (120, False, Tile(64, 32, 8, 2)), (128, False, Tile(64, 32, 4, 2)),
    ),
    "dk": ((256, False, Tile(64, 32, 8, 2)),),
    "dv": ((256, False, Tile(64, 32, 8, 2)),),
}  # fmt: skip


def _float32_tile(kernel: str, D: int, gpu: int) -> Tile:
    """tf32x3 where both halves of its operands fit registers, else products on the ordinary cores."""
    if 90 <= gpu < 100:
        if D <= 64:
            return Tile(128, 32, 8, 2, 64, precision="tf32x3")
        if (kernel == "forward" and D <= 128) or (kernel == "dq" and D <= 96):
            return Tile(64, 32, 8, 2, 32, precision="tf32x3")
    return Tile(32, 32, 8, 2, 32)


def heads(t: Tensor) -> tuple[Tensor, int, int, int]:
    """[B, H, S, D], features side by side: the strides of the others are what kernels ask for."""
    return t, t.stride(0), t.stride(1), t.stride(2)


def side_of(spans: Spans) -> tuple[Any, ...]:
    """A plan's side as kernels take it: with its tiles, and its blocks of one head."""
    return (*spans, *unspecialised(spans.bounds.numel() - 1, spans.blocks.shape[1]))


def check_sides(op: str, heads: Sequence[Tensor], rows: Sequence[Tensor | None]) -> None:
    for t in heads:
        if t.dim() != 4 or t.stride(3) != 1:
            raise ValueError(f"{op}: tensors must be [B, H, S, D], features side by side")
    for t in rows:
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous()):
            raise ValueError(f"{op}: lse and its gradient must be contiguous float32")


def vector_of(tensors: Sequence[Tensor]) -> int:
    """Features that are loaded at once: 16 bytes where all rows begin on 16, else 1. Kernels are told,
    so that nothing depends on what Triton finds out."""
    for t in tensors:
        steps = (s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1)
        if t.data_ptr() % 16 or any(s * t.element_size() % 16 for s in steps):
            return 1
    return 16 // tensors[0].element_size()


@triton.constexpr_function
def pieces(D, widest):
    """(first feature, width) of every piece, widest first."""
    cut, at = [], 0
    while at < D:
        width = max(NARROWEST, 1 << min(D - at, widest).bit_length() - 1)
        cut.append((at, width))
        at += width
    return cut


@triton.constexpr_function
def count(D, widest):
    return len(pieces(D, widest))


@triton.constexpr_function
def first_of(D, widest, i):
    return pieces(D, widest)[i][0]


@triton.constexpr_function
def width_of(D, widest, i):
    return pieces(D, widest)[i][1]


@inner
def head_at(t, b, h, VECTOR: tl.constexpr):
    at = t[0] + b * t[1] + h * t[2]
    if VECTOR > 1:
        at = tl.multiple_of(at, 16)
    return at


@inner
def tokens_of(order, positions, live):
    # int64: what follows is multiplied by strides. live: None where all are.
    if order is not None:
        positions = tl.load(order + positions, mask=live, other=None if live is None else 0)
    return positions.to(tl.int64)


@inner
def piece_at(at, t, tokens, i, D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr):
    offsets = tl.multiple_of(tokens * t[3], VECTOR)[:, None]
    feature = first_of(D, WIDEST, i) + tl.arange(0, width_of(D, WIDEST, i))
    return at + offsets + feature[None, :]


@triton.constexpr_function
def cut_off(D, widest, i):
    """Whether the piece goes past D."""
    return sum(pieces(D, widest)[i]) > D


@inner
def known_features(i, D: tl.constexpr, WIDEST: tl.constexpr):
    return (first_of(D, WIDEST, i) + tl.arange(0, width_of(D, WIDEST, i)) < D)[None, :]


@inner
def read(at, t, tokens, live, D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr):
    # The rows of the tokens, piece by piece; zeros where they are not live.
    parts = ()
    for i in tl.static_range(count(D, WIDEST)):
        piece = piece_at(at, t, tokens, i, D, WIDEST, VECTOR)
        if cut_off(D, WIDEST, i):
            if live is None:
                x = tl.load(piece, mask=known_features(i, D, WIDEST), other=0.0)
            else:
                x = tl.load(piece, mask=known_features(i, D, WIDEST) & live[:, None], other=0.0)
        else:
            if live is None:
                x = tl.load(piece)
            else:
                x = tl.load(piece, mask=live[:, None], other=0.0)
        parts = parts + (wide(x),)
    return parts


@inner
def write(at, t, tokens, live, parts, D: tl.constexpr, WIDEST: tl.constexpr, VECTOR: tl.constexpr):
    for i in tl.static_range(count(D, WIDEST)):
        mask = live[:, None]
        if cut_off(D, WIDEST, i):
            mask = mask & known_features(i, D, WIDEST)
        to = piece_at(at, t, tokens, i, D, WIDEST, VECTOR)
        tl.store(to, narrow(parts[i], t[0].dtype.element_ty), mask=mask)


@inner
def wide(x):
    if INTERPRETED:  # its products of bfloat16 are wrong
        x = x.to(tl.float32)
    return x


@inner
def like(x, t):
    # Rounded to what matrix units multiply.
    return wide(narrow(x, t[0].dtype.element_ty))


@inner
def zeros(ROWS: tl.constexpr, D: tl.constexpr, WIDEST: tl.constexpr):
    parts = ()
    for i in tl.static_range(count(D, WIDEST)):
        parts = parts + (tl.zeros([ROWS, width_of(D, WIDEST, i)], tl.float32),)
    return parts


@inner
def scaled(parts, factor, D: tl.constexpr, WIDEST: tl.constexpr):
    new = ()
    for i in tl.static_range(count(D, WIDEST)):
        new = new + (parts[i] * factor,)
    return new


@inner
def inner_products(a, b, D: tl.constexpr, WIDEST: tl.constexpr, PRECISION: tl.constexpr):
    # [rows of a, rows of b]
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, count(D, WIDEST)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@inner
def add_products(sums, weights, rows, D: tl.constexpr, WIDEST: tl.constexpr, PRECISION: tl.constexpr):
    # sums + weights rows
    new = ()
    for i in tl.static_range(count(D, WIDEST)):
        new = new + (tl.dot(weights, rows[i], sums[i], input_precision=PRECISION),)
    return new


@inner
def base_of(lse):
    # In base 2. Of a row that sees nothing, inf: its probabilities are 0.
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@inner
def weights_of(s, lse, keep, factor):
    # The probabilities again. lse: of base_of, broadcast over the other side.
    p = tl.exp2(s * factor - lse)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    return p


@inner
def block_of(program, side, batch, heads, head_plans, ROWS: tl.constexpr, PARTS: tl.constexpr):
    # Programs: the heaviest block of all heads and samples, then the next, so that what runs last is
    # short; heads are neighbours, since those of a group read the same keys. head_plans: heads of the
    # plan for each of `heads`, 0 where all share one.
    _bounds, _starts, _spans, blocks, _tiles, per_plan = side
    part, program = program % PARTS, program // PARTS
    h, program = program % heads, program // heads
    b, block = program % batch, program // batch
    at = blocks + (h * head_plans * integer(per_plan) + block) * 3
    tile, first, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return b.to(tl.int64), h.to(tl.int64), tile, first + part * ROWS, end


@inner
def spans_of(side, plan, tile):
    at = side[1] + plan * (integer(side[4]) + 1) + tile
    return tl.load(at), tl.load(at + 1)


@inner
def span_of(side, span, STEP: tl.constexpr):
    # begin .. whole is taken in whole steps that keep everything, whole .. end element by element.
    at = side[2] + span * 3
    begin, end, mask = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    whole = tl.where(mask < 0, end - (end - begin) % STEP, begin)
    return begin, whole, end, mask


@inner
def mask_words(masks, mask):
    return masks[0] + tl.load(masks[1] + tl.maximum(mask, 0))


@inner
def words_of(words, mask, row, word, per_row, live):
    # The masks' words for queries `row`, keys 32 word ..; all ones where there is no mask, or nothing live.
    there = live & (word < per_row) & (mask >= 0)
    return tl.load(words + row.to(tl.int64) * per_row + word, mask=there, other=-1)


@inner
def across(w):
    # Words [n, m] to elements [n, 32 m].
    w = w[:, :, None] >> tl.arange(0, 32)[None, None, :] & 1
    return tl.reshape(w, [w.shape[0], 32 * w.shape[1]]) != 0


@inner
def down(w):
    # Words [m, n] to elements [32 m, n].
    w = w[:, None, :] >> tl.arange(0, 32)[None, :, None] & 1
    return tl.reshape(w, [32 * w.shape[0], w.shape[2]]) != 0
