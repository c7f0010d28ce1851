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

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Operation, derive, folded, run, second_derivative, unfolded
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
    run(
        ops_for(call.op, x).modulate.default,
        out[-1],
        r,
        features_contiguous(x),
        branch,
        table.contiguous(),
        rows.contiguous(),
        *call[1:],
    )


# vmap: one more batch dimension is more tokens, and, where the tables differ, more rows of the table.


def _rows(info: Any, dim: int | None, rows: Tensor, K: int, tables: bool) -> Tensor:
    """Rows of K rows, or of V tables of K rows. One that is outside its own table is -1: outside all."""
    rows = folded(info, dim, rows).unflatten(0, (info.batch_size, -1))
    if tables:
        first = K * torch.arange(info.batch_size, device=rows.device, dtype=rows.dtype)[:, None]
        rows = torch.where((rows >= 0) & (rows < K), rows + first, -1)
    return rows.flatten(0, 1)


class Modulate(Operation):
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

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call, x, branch, table, rows = args
        _, *dims = in_dims
        K, tables = table.shape[1 if dims[2] == 0 else 0], dims[2] is not None
        x, branch = folded(info, dims[0], x), None if branch is None else folded(info, dims[1], branch)
        rows = _rows(info, dims[3], rows, K, tables)
        table = folded(info, dims[2], table) if tables else table
        return unfolded(info, apply(call, x, branch, table, rows))


class ModulateBackward(Operation):
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

    @classmethod
    def mapped(cls, apply: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        call, *tensors, table, rows = args
        _, *dims = in_dims
        K = table.shape[1 if dims[4] == 0 else 0]
        flat = [folded(info, dim, t) for dim, t in zip(dims, (*tensors, table), strict=False)]
        return unfolded(info, apply(call, *flat, _rows(info, dims[5], rows, K, True)))
