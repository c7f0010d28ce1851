"""The arguments of the routing functions, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.checks import _overlap, check_shape, describe, is_integer, plain, values_hidden

INTEGERS = (torch.int32, torch.int64)


def check_tokens(
    op: str, argument: str, t: Tensor, *, like: Tensor | None = None, count: int | None = None
) -> None:
    if not isinstance(t, Tensor) or t.dim() < 2:
        raise TypeError(f"{op}: {argument} is {describe(t)}; accepted: a tensor [B, N, D...]")
    if like is None:
        check_shape(op, argument, t, [None] * t.dim(), "[B, N, D...]")
        return
    sizes = (like.shape[0], count, *like.shape[2:])
    check_shape(op, argument, t, sizes, "[B, keep, D...]", like=like)
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: {argument} is {describe(t)}; accepted: {like.dtype}, as base is")


def check_ids(op: str, ids: Tensor, x: Tensor) -> None:
    B, N = x.shape[:2]
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"{op}: ids is {describe(ids)}; accepted: an int32 or int64 tensor (B, keep)")
    if ids.dim() != 2 or ids.shape[0] != B or ids.device != x.device:
        raise ValueError(f"{op}: ids is {describe(ids)}; accepted: ({B}, keep) on {x.device}")
    if values_hidden(ids) or not ids.numel():
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= N:
        raise ValueError(
            f"{op}: ids holds {low if low < 0 else high}; accepted: 0 to {N - 1}, the tokens of a sample"
        )
    if (ids[:, 1:] > ids[:, :-1]).all():
        return
    row = ids.sort(1).values
    twice = (row[:, 1:] == row[:, :-1]).nonzero()
    if len(twice):
        b, j = twice[0].tolist()
        raise ValueError(f"{op}: ids holds {int(row[b, j])} twice in sample {b}; accepted: unique ids")


def check_apart(op: str, out: Tensor, y: Tensor) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if _overlap(out, y):
        raise ValueError(f"{op}: out shares memory with y; give it its own, or base's")


def gate_of(op: str, gate: Any, ids: Tensor) -> Tensor | None:
    """The gate as float32 (B, keep)."""
    gate = plain(gate)
    if gate is None:
        return None
    if not isinstance(gate, Tensor):
        if isinstance(gate, bool) or not isinstance(gate, int | float):
            raise TypeError(f"{op}: gate is {describe(gate)}; accepted: a number or a float tensor")
        return torch.full(ids.shape, float(gate), dtype=torch.float32, device=ids.device)
    fits = gate.dim() <= 2 and all(
        have == 1 or have == want for have, want in zip(reversed(gate.shape), reversed(ids.shape))
    )
    if not gate.is_floating_point() or not fits or gate.device != ids.device:
        raise ValueError(
            f"{op}: gate is {describe(gate)}; accepted: a number, or a float tensor that broadcasts to"
            f" {tuple(ids.shape)} on {ids.device}"
        )
    return gate.float().expand(ids.shape)


def check_linear(
    x: Tensor, weights: Tensor, modality: Tensor, bias: Tensor | None, sizes: Sequence[int] | None
) -> None:
    op = "routed_linear"
    check_shape(op, "x", x, (None, None, None), "[B, N, Din]")
    check_shape(op, "weights", weights, (None, None, x.shape[2]), "[M, Dout, Din]", like=x)
    M = weights.shape[0]
    if not M:
        raise ValueError(f"{op}: weights has no modality; accepted: [M, Dout, Din] with M > 0")
    if bias is not None:
        check_shape(op, "bias", bias, weights.shape[:2], "[M, Dout]", like=x)
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, t in (("weights", weights), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not autocast:
            raise TypeError(f"{op}: {name} is {describe(t)}; accepted: {x.dtype}, as x is, or autocast")
    check_shape(op, "modality", modality, x.shape[:2], "(B, N)", like=x, dtypes=INTEGERS)
    if not values_hidden(modality) and modality.numel():
        low, high = (int(v) for v in modality.aminmax())
        if low < 0 or high >= M:
            raise ValueError(
                f"{op}: modality holds {low if low < 0 else high}; accepted: 0 to {M - 1}, of weights"
            )
    if sizes is None:
        return
    given = [plain(s) for s in sizes] if isinstance(sizes, Sequence | np.ndarray) else None
    if given is None or len(given) != M or not all(is_integer(s) and s >= 0 for s in given):
        raise ValueError(f"{op}: sizes is {sizes!r}; accepted: {M} counts, one per modality")
    if sum(given) != modality.numel():
        raise ValueError(
            f"{op}: sizes {given} add up to {sum(given)}; accepted: {modality.numel()}, the tokens of x"
        )
    if not values_hidden(modality):
        counts = torch.bincount(modality.flatten(), minlength=M).tolist()
        if counts != given:
            raise ValueError(f"{op}: sizes is {given}; modality holds {counts} of each")


def group_sizes(modality: Tensor, M: int, sizes: Sequence[int] | None) -> list[int]:
    if sizes is not None:
        return [plain(s) for s in sizes]
    if torch._C._are_functorch_transforms_active() and values_hidden(modality):
        raise ValueError(
            "routed_linear: sizes is None within a vmap; accepted: how many tokens each modality has"
        )
    return torch.bincount(modality.flatten(), minlength=M).tolist()


def grouping(modality: Tensor, groups: list[int]) -> Tensor:
    """The tokens by modality, int32 [1, B N]. Where nobody could compare the sizes of the groups, a token of
    another modality than its place's is -1, which the CPU kernels refuse."""
    values, order = modality.flatten().sort(stable=True)
    if values_hidden(modality) and modality.device.type == "cpu":
        wanted = torch.cat([values.new_full((size,), m) for m, size in enumerate(groups)])
        order = torch.where(values == wanted, order, -1)
    return order.to(torch.int32)[None]
