"""Adaptive layer norm: modulation beside a copy, plain PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pydiffuse
from benchmarks.measure import Contender, copy_seconds, race, sets_for
from benchmarks.row import Bar, Row
from pydiffuse.adaln import reference

TOKENS, D, K = 5000, 1152, 5  # a DiT-XL sequence whose tokens have five noise levels


def plain(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """As a user would write it for torch.compile."""
    shift, scale = table[rows].unbind(-2)
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


def plain_gated(r: Tensor, branch: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale, gate = table[rows].unbind(-2)
    r = r + gate * branch
    return r, F.layer_norm(r, (r.shape[-1],), eps=1e-6) * (1 + scale) + shift


def relative(expected: Tensor) -> Callable[[Any], float]:
    def error(result: Any) -> float:
        first = result[-1] if isinstance(result, tuple) else result
        return ((first.double() - expected).norm() / expected.norm()).item()

    return error


def tensors(columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x, branch = (torch.randn(1, TOKENS, D, device=device).to(dtype) for _ in range(2))
    table = 0.5 * torch.randn(K, columns, D, device=device)
    rows = torch.randint(0, K, (1, TOKENS), device=device)
    return (x, table, rows) if columns == 2 else (x, branch, table, rows)


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 0.5 if quick else 3.0
    for dtype in (torch.float32, torch.bfloat16):
        yield forward_row("modulate", dtype, device, seconds)
        yield forward_row("gate_residual_modulate", dtype, device, seconds)
    for op in ("modulate", "gate_residual_modulate"):
        yield backward_row(op, device, seconds)
    yield embedding_row(device, seconds / 3)


OPS: dict[str, tuple[int, Callable[..., Any], int, int]] = {
    # columns of the table, rival, tensors a forward moves, tensors a backward moves
    "modulate": (2, plain, 2, 3),  # x, y; x, dy, dx
    "gate_residual_modulate": (3, plain_gated, 4, 6),  # x, b, r, y; x, b, dr, dy, dx, db
}


def forward_row(op: str, dtype: torch.dtype, device: str, seconds: float) -> Row:
    columns, formula, moved, _ = OPS[op]
    each = TOKENS * D * dtype.itemsize
    sets = sets_for(moved * each)
    data = [tensors(columns, dtype, device) for _ in range(sets)]
    given = data[0]
    wide = [t.double() if t.is_floating_point() else t for t in given]
    expected = getattr(reference, op)(*wide)
    check = relative(expected[-1] if isinstance(expected, tuple) else expected)
    fast, ours = torch.compile(formula, fullgraph=True, dynamic=False), getattr(pydiffuse, op)
    outs = [[torch.empty_like(given[0]) for _ in range(moved // 2)] for _ in range(sets)]

    def into(i: int) -> Any:
        return ours(*data[i], out=outs[i][0] if moved == 2 else tuple(outs[i]))

    bound = 1e-5 if dtype is torch.float32 else 8e-3
    one = Contender("pydiffuse", lambda i: ours(*data[i]), check, bound)
    two = Contender("out=", into, check, bound)
    eager = Contender("reference", lambda i: getattr(reference, op)(*data[i]), check, bound)
    inductor = Contender("torch.compile", lambda i: fast(*data[i]), check, 2 * bound)
    copy = Contender("copy", lambda i: outs[i][0].copy_(data[i][0]))
    race([one, two, eager, inductor, copy], sets, device=device, seconds=seconds)
    bars = []
    if dtype is torch.float32 and op == "modulate" and device == "cpu":
        bars = [
            Bar("x a copy, with out=", two.ms / copy.ms, 2.0, at_most=True),
            Bar("x torch.compile", inductor.ms / one.ms, 1.3),
        ]
    return Row(
        op=op,
        what=f"{K} rows of the table",
        headline=dtype is torch.float32 and op == "modulate",
        shape=(TOKENS, D),
        dtype=dtype,
        ms=one.ms,
        error=one.error,
        bytes=moved * each,
        floor_ms=copy.ms * moved / 2,
        rivals=[two, eager, inductor],
        bars=bars,
    )


def backward_row(op: str, device: str, seconds: float) -> Row:
    """Forward and backward, gradients of everything."""
    columns, formula, forward, backward = OPS[op]
    each = TOKENS * D * 4
    sets = sets_for((forward + backward) * each)
    data = [tensors(columns, torch.float32, device) for _ in range(sets)]
    weights = [torch.randn(1, TOKENS, D, device=device) for _ in range(forward // 2)]

    def step(function: Callable[..., Any], given: tuple[Tensor, ...]) -> Any:
        *inputs, where = given
        inputs = [t.detach().requires_grad_() for t in inputs]
        results = function(*inputs, where)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, inputs, [w.to(results[0].dtype) for w in weights])

    wide = tuple(t.double() if t.is_floating_point() else t for t in data[0])
    expected = step(getattr(reference, op), wide)

    def check(gradients: Any) -> float:
        pairs = zip(gradients, expected, strict=True)
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)

    fast = torch.compile(formula, fullgraph=True, dynamic=False)
    ours = Contender("pydiffuse", lambda i: step(getattr(pydiffuse, op), data[i]), check)
    eager = Contender("reference", lambda i: step(getattr(reference, op), data[i]), check)
    inductor = Contender("torch.compile", lambda i: step(fast, data[i]), check)
    race([ours, eager, inductor], sets, device=device, seconds=seconds)
    copy = copy_seconds(TOKENS * D, torch.float32, device, seconds / 4)
    return Row(
        op=op,
        what="forward and backward",
        headline=op == "modulate",
        shape=(TOKENS, D),
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=(forward + backward) * each,
        floor_ms=copy * 1e3 * (forward + backward) / 2,
        rivals=[eager, inductor],
        bars=[Bar("x torch.compile", inductor.ms / ours.ms, 4.0)] if device == "cpu" else [],
    )


def embedding_row(device: str, seconds: float) -> Row:
    """The distinct timesteps of a video, beside embedding every token's."""
    t = torch.rand(1, K, device=device).repeat_interleave(TOKENS // K, 1)
    half = torch.exp(-9.210340371976184 * torch.arange(128, device=device) / 128)

    def every() -> Tensor:
        angle = 1000 * t[..., None] * half
        return torch.cat([angle.cos(), angle.sin()], -1)

    def distinct() -> Tensor:
        return pydiffuse.embed_t(t, 256, scale=1000.0, max_distinct=8)[0]

    table, where = pydiffuse.embed_t(t, 256, scale=1000.0, max_distinct=8)
    error = (table[where] - every()).abs().max().item()  # the float32 angles of `every` are off
    ours = Contender("pydiffuse", lambda i: distinct())
    rival = Contender("every token's", lambda i: every())
    race([ours, rival], 1, device=device, seconds=seconds)
    return Row(
        op="embed_t",
        what=f"{K} distinct timesteps of {TOKENS} tokens",
        shape=(TOKENS, 256),
        dtype=torch.float32,
        ms=ours.ms,
        error=error,
        rivals=[rival],
    )
