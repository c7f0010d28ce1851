"""From the arguments of a public adaln function to one op call."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse.autograd.adaln import Call, Modulate, run_modulate
from pydiffuse.autograd.functions import needs_function
from pydiffuse.checks import check_no_grad, check_outs, check_shape, describe

NORMS = (None, "layer", "rms")  # as in csrc/adaln.h
INTEGERS = (torch.int32, torch.int64)


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
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"{op}: eps is {eps!r}; accepted: a number, 0 or more")
    _check_rows(op, rows, x, table.shape[0])


def _check_rows(op: str, rows: Tensor, x: Tensor, K: int) -> None:
    tokens = tuple(x.shape[:-1])
    if not isinstance(rows, Tensor) or rows.dtype not in INTEGERS:
        raise TypeError(f"{op}: rows is {describe(rows)}; accepted: an int32 or int64 tensor")
    fits = rows.dim() <= len(tokens) and all(
        have in (1, want) for have, want in zip(reversed(rows.shape), reversed(tokens))
    )
    if not fits:
        raise ValueError(
            f"{op}: rows has shape {tuple(rows.shape)}; accepted: what broadcasts to {tokens}, a row of"
            " table for each token"
        )
    if rows.device != x.device:
        raise ValueError(f"{op}: rows is on {rows.device}; the input is on {x.device}")
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if rows.device.type == "cpu" and rows.numel() and x.numel() and not hidden:
        low, high = (int(v) for v in rows.aminmax())
        if low < 0 or high >= K:
            raise ValueError(
                f"{op}: rows holds {low if low < 0 else high}; accepted: 0 to {K - 1}, the rows of table"
            )


def fold(table: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The table with the affine part of the norm inside: (n w + b) (1 + s) + shift is n f + shift'
    with f = w (1 + s), shift' = shift + b (1 + s). K rows of arithmetic, and autograd knows it."""
    shift, scale, *gate = table.unbind(1)
    factor = 1 + scale
    if bias is not None:
        shift = shift + bias.float() * factor
    if weight is not None:
        factor = weight.float() * factor
    return torch.stack([shift, factor, *gate], 1)


def call_modulate(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    table: Tensor,
    rows: Tensor,
    norm: str | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    out: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    """(y,), or (r, y) with a branch: through autograd if a gradient is due, else straight to the op."""
    given = [t for t in (x, branch, table, weight, bias) if t is not None]
    affine = weight is not None or bias is not None
    call = Call(op, NORMS.index(norm), float(eps), affine)
    likes = [x] * (1 if branch is None else 2)
    if out is not None:
        check_outs(op, out, likes, given)
        check_no_grad(op, given)
    shape = x.shape
    wide = table.float()
    if affine:
        wide = fold(wide, weight, bias)
    x = x.reshape(-1, shape[-1]) if shape[-1] else x.reshape(shape[:-1].numel(), 0)
    branch = None if branch is None else branch.reshape(x.shape)
    rows = rows.expand(shape[:-1]).reshape(-1).to(torch.int32)
    if out is None:
        if needs_function(x, branch, wide):
            results = Modulate.apply(call, x, branch, wide, rows)
        else:
            results = Modulate.forward(call, x, branch, wide, rows)
        return tuple(t.view(shape) for t in results)
    targets = [
        t.view(x.shape) if t.is_contiguous() else torch.empty(x.shape, dtype=t.dtype, device=t.device)
        for t in out
    ]
    run_modulate(call, targets, x, branch, wide, rows)
    for t, target in zip(out, targets, strict=True):
        if not t.is_contiguous():
            t.copy_(target.view(shape))
    return out
