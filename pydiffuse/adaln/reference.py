"""The definition of every adaln op in plain PyTorch: same names, same signatures, any device.

Computed in float32, or in float64 for float64 inputs (the oracle of the tests), rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pydiffuse._core.checks import values_hidden


def _up(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _normed(
    v: Tensor, norm: str | None, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if norm == "layer":
        v = v - v.mean(-1, keepdim=True)
    if norm is not None:
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        v = v * _up(weight)
    return v if bias is None else v + _up(bias)


def modulate(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    norm: str | None = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """norm(x) (1 + scale[row]) + shift[row], table = (shift, scale).  DiT, arXiv 2212.09748, 3.2."""
    shift, scale = _up(table)[rows.long()].unbind(-2)
    y = (_normed(_up(x), norm, eps, weight, bias) * (1 + scale) + shift).to(x.dtype)
    return y if out is None else out.copy_(y)


def gate_residual_modulate(
    residual: Tensor,
    branch: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    norm: str | None = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """r = residual + gate[row] branch, and modulate(r); table = (shift, scale, gate)."""
    shift, scale, gate = _up(table)[rows.long()].unbind(-2)
    r = _up(residual) + gate * _up(branch)
    y = _normed(r, norm, eps, weight, bias) * (1 + scale) + shift
    results = r.to(residual.dtype), y.to(residual.dtype)
    return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))


def embed_t(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    scale: float = 1.0,
    max_distinct: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos(t scale f_i), sin(t scale f_i)), f_i = max_period^(-2i/dim), of the distinct t: their table
    and the row of each t.

    Sorted, every t that differs from the one before it begins a row; rows that are left over repeat
    the last.
    """
    ordered, order = t.detach().flatten().sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    row = first.cumsum(0) - 1
    K = t.numel() if max_distinct is None else max_distinct
    _check_distinct(row, K)
    rows = torch.empty_like(order).scatter_(0, order, row)
    begins = torch.searchsorted(row, torch.arange(K, device=t.device))
    distinct = ordered[begins.clamp(max=max(t.numel() - 1, 0))] if t.numel() else ordered.new_zeros(K)
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float64) / max(half, 1)
    angle = scale * distinct.double()[:, None] * torch.exp(-math.log(max_period) * exponent)
    table = torch.cat([angle.cos(), angle.sin(), angle.new_zeros(K, dim % 2)], 1)
    return table.to(torch.promote_types(t.dtype, torch.float32)), rows.reshape(t.shape)


def _check_distinct(row: Tensor, K: int) -> None:
    """More distinct values than K: an error here on the CPU, an assertion of the device elsewhere."""
    if not row.numel() or row.numel() <= K:
        return
    if not values_hidden(row):
        found = int(row[-1]) + 1
        if found > K:
            raise ValueError(
                f"embed_t: t has {found} distinct values; accepted: at most max_distinct = {K}"
            )
    elif torch._C._are_functorch_transforms_active():  # which know no assertion: what is wrong has no row
        return
    else:
        torch._assert_async(row[-1] < K, "embed_t: t has more distinct values than max_distinct")
