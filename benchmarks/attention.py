"""Tile attention: against the floor of its arithmetic, dense attention and attention with a mask."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pydiffuse
from benchmarks.measure import Contender, race
from benchmarks.row import Bar, Row
from pydiffuse import plans
from pydiffuse.plans import TilePlan
from pydiffuse.plans.patterns import _frames

B, H, S, D = SHAPE = (1, 8, 4096, 64)
PLAN = plans.frames(16, 256, 2)
# Efficient-vDiT's own table: frames of 3,600 tokens, 24 heads of 96, so many reference frames.
VIDEO_HEADS, VIDEO_DIM, VIDEO_FRAME = 24, 96, 3600
VIDEO = {8: (4, 3, 2, 1), 24: (12, 8, 6, 4, 3)}


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 1.0 if quick else 6.0
    yield from accuracy_rows(device)
    times: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        yield forward_row(dtype, device, seconds, times, flex=not quick)
    for dtype in (torch.float32, torch.bfloat16):
        yield backward_row(dtype, device, seconds, times)
    yield from sizes_rows(device, seconds / 3)
    yield plan_row()
    if device == "cuda":
        for frames, references in VIDEO.items():
            yield from video_rows(frames, references, device, seconds)
        yield sliding_row(device, seconds)


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, kv_heads: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    kv = (shape[0], kv_heads or shape[1], *shape[2:])
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in (shape, kv, kv)]


def exact(args: list[Tensor], plan: TilePlan, heads: int = 1) -> Tensor:
    """The float64 reference of the first heads: it is dense."""
    with pydiffuse.use_backend("reference"):
        out = pydiffuse.tile_attention(*(t[:, :heads].double() for t in args), plan)
    assert isinstance(out, Tensor)
    return out


def relative(expected: Tensor) -> Callable[[Any], float]:
    def error(result: Tensor) -> float:
        found = result.detach()[:, : expected.shape[1]].double()
        return ((found - expected).norm() / expected.norm()).item()

    return error


def ours(args: list[Tensor], plan: TilePlan) -> Tensor:
    out = pydiffuse.tile_attention(*args, plan)
    assert isinstance(out, Tensor)
    return out


def floor_ms(dim: int, pairs: int, dtype: torch.dtype, backward: bool, seconds: float) -> float:
    """Two products of `dim` and an exponential for each pair of query and key, and with the backward five
    and one more; in cache, on all threads."""
    from pydiffuse import _host

    _host.set_threads(torch.get_num_threads())
    count = (7, 2) if backward else (2, 1)
    c = Contender("floor", lambda i: _host.attention_floor(dim, *count, pairs, dtype is torch.bfloat16))
    race([c], 1, seconds=seconds, least=5)
    return c.ms


def pairs_of(shape: tuple[int, ...], plan: TilePlan) -> int:
    return round(shape[0] * shape[1] * plan.density * plan.q_length * plan.k_length)


def flex_attention(plan: TilePlan, device: str) -> Any:
    """FlexAttention, to be compiled at its first call, and its block mask of a plan of frames."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    given = dict(plan.parameters)
    frames, count, tokens_per_frame = given["num_frames"], given["references"], given["tokens_per_frame"]
    references = [i * frames // count for i in range(count)]
    is_reference = torch.zeros(plan.q_length // tokens_per_frame, dtype=torch.bool, device=device)
    is_reference[references] = True

    def allow(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        fq, fk = q // tokens_per_frame, k // tokens_per_frame
        return (fq == fk) | is_reference[fq] | is_reference[fk]

    mask = create_block_mask(
        allow, None, None, plan.q_length, plan.k_length, device=device, _compile=device == "cuda"
    )  # on a GPU videos are long: the whole mask would not fit
    return torch.compile(flex_attention, dynamic=False), mask


def forward_row(
    dtype: torch.dtype, device: str, seconds: float, float32_ms: dict[str, float], flex: bool
) -> Row:
    args = make(SHAPE, dtype, device)
    expected = exact(args, PLAN)
    check, bound = relative(expected), 1e-5 if dtype is torch.float32 else 6e-3
    mine = Contender("pydiffuse", lambda i: ours(args, PLAN), check, bound)
    dense = Contender("dense SDPA", lambda i: F.scaled_dot_product_attention(*args))
    seen = PLAN.to_dense().to(device)
    masked = Contender(
        "SDPA with the mask",
        lambda i: F.scaled_dot_product_attention(*args, attn_mask=seen),
        check,
        bound,
    )
    rivals = [dense, masked]
    race([mine, *rivals], 1, device=device, seconds=seconds, least=7)
    bars = [Bar("relative error", mine.error or 0.0, bound, at_most=True)]
    what = "16 frames of 256, 2 references"
    if dtype is torch.float32 and flex:
        call, mask = flex_attention(PLAN, device)
        begin = time.perf_counter()
        with torch._inductor.config.patch(force_disable_caches=True):
            call(*args, block_mask=mask)
        compiling = time.perf_counter() - begin
        flexible = Contender(
            f"FlexAttention (compiled in {compiling:.0f} s)", lambda i: call(*args, block_mask=mask),
            check, bound,
        )  # fmt: skip
        again = Contender("pydiffuse", mine.call)
        race([again, flexible], 1, device=device, seconds=seconds, least=7)  # its threads spin
        rivals.append(flexible)
        bars.append(Bar("x FlexAttention", flexible.ms / again.ms, 1.4))
    if device == "cpu":
        ideal = PLAN.density * dense.ms
        bars.append(Bar("of density x dense SDPA's time", mine.ms / ideal, 1 / 0.9, at_most=True))
        float32_ms[str(dtype)] = mine.ms
        if dtype is torch.bfloat16 and multiplies_bf16():
            bars.append(Bar("x float32", float32_ms["torch.float32"] / mine.ms, 1.5))
    floor = floor_ms(D, pairs_of(SHAPE, PLAN), dtype, False, seconds / 6) if device == "cpu" else None
    return Row(
        "tile_attention", what, SHAPE, dtype, mine.ms, mine.error, floor_ms=floor, rivals=rivals,
        bars=bars, headline=dtype is torch.float32,
    )  # fmt: skip


def multiplies_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def gradients(call: Callable[..., Tensor], args: list[Tensor], dout: Tensor) -> Callable[[int], Any]:
    leaves = [t.detach().requires_grad_() for t in args]
    return lambda i: torch.autograd.grad(call(*leaves), leaves, dout)


def slopes(args: list[Tensor], plan: TilePlan, dout: Tensor) -> Callable[[Any], float]:
    """The error of gradients, at the first head: the float64 reference is dense."""
    leaves = [t[:, :1].double().requires_grad_() for t in args]
    with pydiffuse.use_backend("reference"):
        expected = torch.autograd.grad(ours(leaves, plan), leaves, dout[:, :1].double())

    def error(found: Any) -> float:
        pairs = zip(found, expected, strict=True)
        return max(relative(e)(f) for f, e in pairs)

    return error


def backward_row(dtype: torch.dtype, device: str, seconds: float, float32_ms: dict[str, float]) -> Row:
    args = make(SHAPE, dtype, device)
    dout = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    bound = 2e-5 if dtype is torch.float32 else 1.2e-2
    check = slopes(args, PLAN, dout)
    mine = Contender("pydiffuse", gradients(lambda *a: ours(list(a), PLAN), args, dout), check, bound)
    dense = Contender("dense SDPA", gradients(F.scaled_dot_product_attention, args, dout))
    race([mine, dense], 1, device=device, seconds=seconds, least=5)
    bars = [Bar("relative error of gradients", mine.error or 0.0, bound, at_most=True)]
    if device == "cpu":
        ideal = PLAN.density * dense.ms
        bars.append(Bar("of density x dense SDPA's time", mine.ms / ideal, 1 / 0.85, at_most=True))
        float32_ms[f"{dtype}, backward"] = mine.ms
        if dtype is torch.bfloat16 and multiplies_bf16():
            bars.append(Bar("x float32", float32_ms["torch.float32, backward"] / mine.ms, 1.5))
    floor = floor_ms(D, pairs_of(SHAPE, PLAN), dtype, True, seconds / 6) if device == "cpu" else None
    return Row(
        "tile_attention", "16 frames of 256, 2 references, forward and backward", SHAPE, dtype, mine.ms,
        mine.error, floor_ms=floor, rivals=[dense], bars=bars, headline=dtype is torch.float32,
    )  # fmt: skip


def accuracy_rows(device: str) -> Iterator[Row]:
    """Against float64, for the head sizes, frames and groups that the bars name."""
    worst = slope = 0.0
    for dim, frame, kv_heads in itertools.product((40, 64, 96, 128), (37, 61), (4, 1)):
        plan, shape = plans.frames(5, frame, 2), (1, 4, 5 * frame, dim)
        args = [t.requires_grad_() for t in make(shape, torch.float32, device, kv_heads)]
        wide = [t.detach().double().requires_grad_() for t in args]
        out = ours(args, plan)
        with pydiffuse.use_backend("reference"):
            expected = ours(wide, plan)
        dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        found = torch.autograd.grad(out, args, dout)
        exact = torch.autograd.grad(expected, wide, dout.double())
        worst = max(worst, relative(expected.detach())(out))
        pairs = zip(found, exact, strict=True)
        slope = max(slope, *(((a.double() - b).norm() / b.norm()).item() for a, b in pairs))
    bars = [
        Bar("relative error", worst, 1e-5, at_most=True),
        Bar("relative error of gradients", slope, 2e-5, at_most=True),
    ]
    what = "error to float64, D 40 to 128, frames of 37 and 61, 1 and 4 key heads"
    yield Row("tile_attention", what, (1, 4, 305, 128), torch.float32, error=worst, bars=bars)


def sizes_rows(device: str, seconds: float) -> Iterator[Row]:
    """Other head sizes, and frames that fill no vectors."""
    for dim, count, frame, references in (
        (40, 16, 256, 2),
        (96, 16, 256, 2),
        (128, 16, 256, 2),
        (64, 67, 61, 8),
    ):
        plan, shape = plans.frames(count, frame, references), (B, H, count * frame, dim)
        args = make(shape, torch.float32, device)
        mine = Contender(
            "pydiffuse", lambda i, a=args, p=plan: ours(a, p), relative(exact(args, plan)), 1e-5
        )
        dense = Contender("dense SDPA", lambda i, a=args: F.scaled_dot_product_attention(*a))
        race([mine, dense], 1, device=device, seconds=seconds, least=5)
        floor = None
        if device == "cpu":
            floor = floor_ms(dim, pairs_of(shape, plan), torch.float32, False, seconds / 4)
        yield Row(
            "tile_attention", f"{count} frames of {frame}, {references} references", shape, torch.float32,
            mine.ms, mine.error, floor_ms=floor, rivals=[dense],
        )  # fmt: skip


def plan_row() -> Row:
    """Making a plan, where no cache has it."""
    c = Contender("plan", lambda i: _frames.__wrapped__(24, 3600, 3, 0))
    race([c], 1, seconds=0.5)
    return Row(
        "plans.frames", "24 frames of 3,600 tokens, 3 references", (86400, 86400), torch.int32, c.ms,
        bars=[Bar("ms", c.ms, 20, at_most=True)],
    )  # fmt: skip


def video_rows(frames: int, references: tuple[int, ...], device: str, seconds: float) -> Iterator[Row]:
    """Efficient-vDiT's op table on a GPU."""
    shape = (1, VIDEO_HEADS, frames * VIDEO_FRAME, VIDEO_DIM)
    args = make(shape, torch.bfloat16, device)
    dense = Contender("dense SDPA", lambda i: F.scaled_dot_product_attention(*args))
    whole = plans.frames(frames, VIDEO_FRAME, frames)
    own = Contender("own dense", lambda i: ours(args, whole))
    race([dense, own], 1, device=device, seconds=seconds, least=5)
    for count in references:
        plan = plans.frames(frames, VIDEO_FRAME, count)
        mine = Contender("pydiffuse", lambda i, p=plan: ours(args, p))
        call, mask = flex_attention(plan, device)
        flexible = Contender("FlexAttention", lambda i, c=call, m=mask: c(*args, block_mask=m))
        race([mine, flexible], 1, device=device, seconds=seconds, least=5)
        yield Row(
            "tile_attention", f"{frames} frames of {VIDEO_FRAME}, {count} references", shape, torch.bfloat16,
            mine.ms, rivals=[dense, flexible],
            bars=[
                Bar("of the own dense rate", plan.density * own.ms / mine.ms, 0.9),
                Bar("x FlexAttention", flexible.ms / mine.ms, 1.3),
            ],
        )  # fmt: skip


def sliding_row(device: str, seconds: float) -> Row:
    """Sliding tiles over HunyuanVideo's 115,200 tokens, on a GPU."""
    plan = plans.sliding_tile((30, 48, 80), (6, 8, 8), (18, 24, 24))
    shape = (1, VIDEO_HEADS, plan.q_length, 128)
    args = make(shape, torch.bfloat16, device)
    mine = Contender("pydiffuse", lambda i: ours(args, plan))
    dense = Contender("dense SDPA", lambda i: F.scaled_dot_product_attention(*args))
    race([mine, dense], 1, device=device, seconds=seconds, least=3)
    return Row(
        "tile_attention", "sliding tiles of 6 x 8 x 8, window 18 x 24 x 24", shape, torch.bfloat16, mine.ms,
        rivals=[dense],
    )  # fmt: skip
