"""The gradients of adaptive layer norm.

With v = x + gate branch, u = norm(v), g = dy (1 + scale):
    dv = rstd (g - mean(g) - u mean(g u)) + dr;  dx = dv,  dbranch = gate dv;
    dshift = sum dy,  dscale = sum dy u,  dgate = sum dv branch  over the tokens of a row of the table.
Only the inputs are saved; u is computed again from a token that is in the cache anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import derive, second_derivative
from pydiffuse._core.layouts import features_contiguous


class Call(NamedTuple):
    """What a call is made of, beside its tensors."""

    op: str  # the public name, for messages
    norm: int
    eps: float
    factors: bool  # the table holds 1 + scale


def run_modulate(
    call: Call, out: list[Tensor], x: Tensor, branch: Tensor | None, table: Tensor, rows: Tensor
) -> None:
    """out: [y], or [r, y] with a branch."""
    r = None if branch is None else out[0]
    branch = None if branch is None else features_contiguous(branch)
    ops_for(call.op, x).modulate.default(
        out[-1], r, features_contiguous(x), branch, table.contiguous(), rows.contiguous(), *call[1:]
    )


# vmap: one more batch dimension is more tokens, and, where the tables differ, more rows of the table.


def _fold(V: int, dim: int | None, t: Tensor | None) -> Any:
    if t is None:
        return None
    t = t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _fold_rows(V: int, dim: int | None, rows: Tensor, K: int) -> Tensor:
    rows = rows.expand(V, *rows.shape) if dim is None else rows.movedim(dim, 0)
    if K:
        rows = rows + K * torch.arange(V, device=rows.device, dtype=rows.dtype)[:, None]
    return rows.flatten(0, 1)


def _unfold(V: int, results: tuple[Tensor | None, ...]) -> Any:
    parts = tuple(None if t is None else t.unflatten(0, (V, t.shape[0] // V)) for t in results)
    return parts, tuple(None if t is None else 0 for t in parts)


class Modulate(Function):
    """(call, x [R, D], branch, table [K, 2 or 3, D] float32, rows [R] int32) -> (y,) or (r, y)."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: Call, x: Tensor, branch: Tensor | None, table: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        out = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for _ in range(1 if branch is None else 2)
        ]
        run_modulate(call, out, x, branch, table, rows)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, branch, table, rows = ctx.saved_tensors
        dr, dy = (None, grads[0]) if branch is None else grads
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dbranch, dtable = derive(ModulateBackward, ctx.call, dy, dr, x, branch, table, rows)
        return None, dx, dbranch, dtable, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call, x, branch, table, rows = args
        _, *dims = in_dims
        V, K = info.batch_size, 0 if dims[2] is None else table.shape[0 if dims[2] else 1]
        x, branch = _fold(V, dims[0], x), _fold(V, dims[1], branch)
        table = table if dims[2] is None else _fold(V, dims[2], table)
        return _unfold(V, Modulate.apply(call, x, branch, table, _fold_rows(V, dims[3], rows, K)))


class ModulateBackward(Function):
    """(call, dy, dr or None, x, branch, table, rows) -> dx, dbranch or None, dtable."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: Call,
        dy: Tensor,
        dr: Tensor | None,
        x: Tensor,
        branch: Tensor | None,
        table: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor | None, ...]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dbranch = None if branch is None else torch.empty_like(dx)
        dtable = torch.empty(table.shape, dtype=table.dtype, device=table.device)
        dr, branch = (None if t is None else features_contiguous(t) for t in (dr, branch))
        tensors = (
            features_contiguous(dy),
            dr,
            features_contiguous(x),
            branch,
            table.contiguous(),
            rows.contiguous(),
        )
        ops_for(call.op, x).modulate_backward.default(dx, dbranch, dtable, *tensors, *call[1:])
        return dx, dbranch, dtable

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0].op

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call, *tensors, table, rows = args
        _, *dims = in_dims
        V, K = info.batch_size, table.shape[1 if dims[4] == 0 else 0]
        folded = [_fold(V, dim, t) for dim, t in zip(dims, (*tensors, table), strict=False)]
        return _unfold(V, ModulateBackward.apply(call, *folded, _fold_rows(V, dims[5], rows, K)))
