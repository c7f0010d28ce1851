"""The arguments of the adaln functions, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.checks import check_shape, describe, plain, values_hidden

NORMS = (None, "layer", "rms")  # as in csrc/adaln.h
INTEGERS = (torch.int32, torch.int64)


def usual_norm(norm: Any, eps: Any) -> bool:
    return (norm is None or norm.__class__ is str) and norm in NORMS and eps.__class__ is float


def check_modulation(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    table: Tensor,
    rows: Tensor,
    norm: str | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    name = "x" if branch is None else "residual"
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"{op}: {name} is {describe(x)}; accepted: a tensor [..., D]")
    check_shape(op, name, x, [None] * x.dim(), "[..., D]")
    if branch is not None:
        check_shape(op, "branch", branch, x.shape, "[..., D] like residual", like=x)
        if branch.dtype != x.dtype:
            raise TypeError(f"{op}: branch is {describe(branch)}; accepted: residual's {x.dtype}")
    D, columns = x.shape[-1], 2 if branch is None else 3
    names = "[K, 2, D] (shift, scale)" if branch is None else "[K, 3, D] (shift, scale, gate)"
    check_shape(op, "table", table, (None, columns, D), names, like=x)
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_shape(op, argument, t, (D,), "[D]", like=x)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}; accepted: 'layer', 'rms', None")
    eps = plain(eps)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"{op}: eps is {eps!r}; accepted: a number, 0 or more")
    _check_rows(op, rows, x, table.shape[0])


def _check_rows(op: str, rows: Tensor, x: Tensor, K: int) -> None:
    tokens = tuple(x.shape[:-1])
    if not isinstance(rows, Tensor) or rows.dtype not in INTEGERS:
        raise TypeError(f"{op}: rows is {describe(rows)}; accepted: an int32 or int64 tensor")
    fits = rows.dim() <= len(tokens) and all(
        have == 1 or have == want for have, want in zip(reversed(rows.shape), reversed(tokens))
    )
    if not fits:
        raise ValueError(
            f"{op}: rows has shape {tuple(rows.shape)}; accepted: what broadcasts to {tokens}, a row of"
            " table for each token"
        )
    if rows.device != x.device:
        raise ValueError(f"{op}: rows is on {rows.device}; the input is on {x.device}")
    if rows.numel() and x.numel() and not values_hidden(rows):
        low, high = (int(v) for v in rows.aminmax())
        if low < 0 or high >= K:
            raise ValueError(
                f"{op}: rows holds {low if low < 0 else high}; accepted: 0 to {K - 1}, the rows of table"
            )
