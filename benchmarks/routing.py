"""Token routing: moved bytes beside a copy, plain PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pydiffuse
from benchmarks.measure import Contender, race, sets_for
from benchmarks.row import Bar, Row
from pydiffuse.routing import reference

SHAPE = (32, 256, 1152)  # a batch of DiT-XL at 256 x 256
KEEP = 0.5


def plain(x: Tensor, ids: Tensor) -> Tensor:
    """As a user would write it for torch.compile, with nothing between the two."""
    where = ids[..., None].expand(-1, -1, x.shape[2])
    return x.scatter(1, where, x.gather(1, where))


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 0.5 if quick else 3.0
    for dtype in (torch.float32, torch.bfloat16):
        yield round_trip_row(dtype, device, seconds)
    yield backward_row(device, seconds / 2)
    yield linear_row(device, seconds / 2)


def tokens(dtype: torch.dtype, device: str, sets: int) -> list[tuple[Tensor, Tensor]]:
    B, N, _ = SHAPE
    ids = [pydiffuse.route(B, N, KEEP).to(device) for _ in range(sets)]
    return [(torch.randn(SHAPE, device=device).to(dtype), i) for i in ids]


def round_trip_row(dtype: torch.dtype, device: str, seconds: float) -> Row:
    """Half the tokens leave and come back: x and y read once each, y and the result written."""
    numel = torch.Size(SHAPE).numel()
    # gather: half read, half written. scatter: half of x and all of y read, everything written.
    moved = 3 * numel * dtype.itemsize
    sets = sets_for(moved)
    data = tokens(dtype, device, sets)
    outs = [torch.empty(SHAPE, dtype=dtype, device=device) for _ in range(sets)]

    def ours(i: int, out: Tensor | None = None) -> Tensor:
        x, ids = data[i]
        return pydiffuse.scatter_tokens(x, pydiffuse.gather_tokens(x, ids), ids, out=out)

    def eager(i: int) -> Tensor:
        x, ids = data[i]
        return reference.scatter_tokens(x, reference.gather_tokens(x, ids), ids)

    def check(result: Tensor) -> float:
        return 0.0 if torch.equal(result, data[0][0]) else 1.0

    fast = torch.compile(plain, fullgraph=True, dynamic=False)
    one = Contender("pydiffuse", ours, check)
    into = Contender("out=", lambda i: ours(i, outs[i]), check)
    back = Contender("out=base", lambda i: ours(i, data[i][0]), check)
    plain_ = Contender("reference", eager, check)
    inductor = Contender("torch.compile", lambda i: fast(*data[i]), check)
    copy = Contender("copy", lambda i: outs[i].copy_(data[i][0]))
    race([one, into, back, plain_, inductor, copy], sets, device=device, seconds=seconds)
    floor = copy.ms * 1.5
    bars = [Bar("x the moved bytes, with out=", into.ms / floor, 1.3, at_most=True)]
    return Row(
        op="scatter_tokens",
        what=f"of gather_tokens, keep {KEEP}",
        shape=SHAPE,
        dtype=dtype,
        ms=one.ms,
        error=one.error,
        bytes=moved,
        floor_ms=floor,
        rivals=[into, back, plain_, inductor],
        bars=bars if device == "cpu" and dtype is torch.float32 else [],
    )


def backward_row(device: str, seconds: float) -> Row:
    sets = 3
    data = tokens(torch.float32, device, sets)
    weight = torch.randn(SHAPE, device=device)

    def step(module: Any, i: int) -> Tensor:
        x, ids = data[i][0].detach().requires_grad_(), data[i][1]
        out = module.scatter_tokens(x, module.gather_tokens(x, ids), ids)
        return torch.autograd.grad(out, x, weight)[0]

    def check(result: Tensor) -> float:
        return ((result - weight).norm() / weight.norm()).item()

    ours = Contender("pydiffuse", lambda i: step(pydiffuse, i), check)
    eager = Contender("reference", lambda i: step(reference, i), check)
    race([ours, eager], sets, device=device, seconds=seconds)
    return Row(
        op="scatter_tokens",
        what=f"of gather_tokens, keep {KEEP}, forward and backward",
        shape=SHAPE,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        rivals=[eager],
    )


def linear_row(device: str, seconds: float) -> Row:
    """Three modalities in runs, as text, image and speech lie in a sequence."""
    B, N, D = 2, 1024, 768
    x, weights = torch.randn(B, N, D, device=device), torch.randn(3, D, D, device=device) / D**0.5
    modality = (torch.arange(N, device=device) // 128 % 3).expand(B, N).contiguous()
    sizes = torch.bincount(modality.flatten(), minlength=3).tolist()

    def masked() -> Tensor:
        out = x.new_empty(B, N, D)
        for m in range(3):
            mask = modality == m
            out[mask] = x[mask] @ weights[m].T
        return out

    expected = reference.routed_linear(x.double(), weights.double(), modality)

    def check(result: Tensor) -> float:
        return ((result.double() - expected).norm() / expected.norm()).item()

    ours = Contender(
        "pydiffuse", lambda i: pydiffuse.routed_linear(x, weights, modality, sizes=sizes), check
    )
    rival = Contender("boolean masks", lambda i: masked(), check)
    dense = Contender("one weight for all", lambda i: torch.nn.functional.linear(x, weights[0]))
    every = Contender("reference", lambda i: reference.routed_linear(x, weights, modality), check)
    race([ours, rival, dense, every], 1, device=device, seconds=seconds)
    return Row(
        op="routed_linear",
        what="3 modalities",
        shape=(B, N, D),
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        rivals=[rival, dense, every],
    )
