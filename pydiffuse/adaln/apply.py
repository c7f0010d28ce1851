"""From checked arguments to one op call."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse._core.checks import check_no_grad, check_outs, narrowed
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse.adaln.arguments import NORMS
from pydiffuse.adaln.autograd import Call, Modulate, run_modulate


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
        check_no_grad(op, given, out)
    shape = x.shape
    wide = table.float()
    if affine:
        wide = fold(wide, weight, bias)
    x = x.reshape(-1, shape[-1]) if shape[-1] else x.reshape(shape[:-1].numel(), 0)
    branch = None if branch is None else branch.reshape(x.shape)
    rows = narrowed(rows, table.shape[0]).expand(shape[:-1]).reshape(-1)
    if out is None:
        if needs_function(x, branch, wide):
            results = differentiable("adaln.Modulate", call, x, branch, wide, rows)
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
