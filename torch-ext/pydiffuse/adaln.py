"""Adaptive layer norm by rows of a table: the modulation of diffusion transformers.

Tokens are [..., D] of float32, bfloat16 or float16; the table may have another of these dtypes. Every token
names its row of the table, [K, 2 or 3, D]: shift, scale and, where a branch ends, gate. Arithmetic is float32,
rounded once.
"""

from __future__ import annotations

import torch

from ._ops import add_op_namespace_prefix, ops

NORMS = (None, "layer", "rms")  # csrc/adaln.h


@torch.library.register_fake(add_op_namespace_prefix("modulate"))
def _(y, r, x, branch, table, rows, norm, eps, factors):
    return None


@torch.library.register_fake(add_op_namespace_prefix("modulate_backward"))
def _(dx, dbranch, dtable, dy, dr, x, branch, table, rows, norm, eps, factors):
    return None


def modulate(x, table, rows, *, norm="layer", eps=1e-6, weight=None, bias=None):
    """norm(x) (1 + scale[row]) + shift[row].

    x: [..., D]. table: [K, 2, D], shift then scale. rows: int32 or int64, broadcast to x.shape[:-1]. norm:
    "layer", "rms" or None. weight, bias: [D], applied within the norm. Returns [..., D] in x's dtype.
    """
    return _modulated("modulate", x, None, table, rows, norm, eps, weight, bias)[0]


def gate_residual_modulate(
    residual, branch, table, rows, *, norm="layer", eps=1e-6, weight=None, bias=None
):
    """r = residual + gate[row] branch, and its modulation: (r, y), each [..., D].

    residual, branch: [..., D], alike. table: [K, 3, D], shift, scale, gate. The rest as in `modulate`.
    """
    op = "gate_residual_modulate"
    return _modulated(op, residual, branch, table, rows, norm, eps, weight, bias)


def _modulated(op, x, branch, table, rows, norm, eps, weight, bias):
    columns = 2 if branch is None else 3
    if norm not in NORMS:
        raise ValueError(f"{op}: norm is {norm!r}; accepted: {', '.join(map(repr, NORMS))}")
    if table.dim() != 3 or table.shape[1:] != (columns, x.shape[-1]):
        raise ValueError(
            f"{op}: table has shape {tuple(table.shape)}; accepted: (K, {columns}, {x.shape[-1]})"
        )
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"{op}: branch must be like residual, {tuple(x.shape)} {x.dtype}")
    factors = weight is not None or bias is not None
    wide = table.float()
    if factors:  # (n w + b) (1 + s) + t = n w (1 + s) + (t + b (1 + s))
        shift, scale, *gate = wide.unbind(1)
        factor = 1 + scale
        shift = shift if bias is None else shift + bias.float() * factor
        factor = factor if weight is None else weight.float() * factor
        wide = torch.stack([shift, factor, *gate], 1)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    branch = None if branch is None else branch.reshape(tokens.shape).contiguous()
    rows = rows.expand(x.shape[:-1]).reshape(-1).to(torch.int32)
    given = (tokens, branch, wide.contiguous(), rows.contiguous())
    call = (NORMS.index(norm), float(eps), factors)
    due = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    results = _Modulate.apply(call, *given) if due else _run(call, *given)
    return tuple(t.view(x.shape) for t in results)


def _run(call, x, branch, table, rows):
    y = torch.empty_like(x)
    r = None if branch is None else torch.empty_like(x)
    ops.modulate(y, r, x, branch, table, rows, *call)
    return (y,) if r is None else (r, y)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(call, x, branch, table, rows):
        return _run(call, x, branch, table, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *grads):
        x, branch, table, rows = ctx.saved_tensors
        dx, dtable = torch.empty_like(x), torch.empty_like(table)
        dbranch = None if branch is None else torch.empty_like(x)
        dr = None if branch is None else grads[0].contiguous()
        dy = grads[-1].contiguous()
        ops.modulate_backward(dx, dbranch, dtable, dy, dr, x, branch, table, rows, *ctx.call)
        return None, dx, dbranch, dtable, None
