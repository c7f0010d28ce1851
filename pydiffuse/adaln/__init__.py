"""Adaptive layer norm by rows of a table: the modulation of diffusion transformers.

A step has few distinct noise levels, one per sample, per frame or per group of patches. Their shifts,
scales and gates are the K rows of a small table, and every token names its row: nothing of the size
of the tokens is ever made of them.

    table, rows = pydiffuse.embed_t(t, 256, scale=1000.0, max_distinct=8)  # t: (B, N) or (B, 1)
    table = mlp(table).unflatten(-1, (2, D))                               # (8, 2, D) = (shift, scale)
    y = pydiffuse.modulate(x, table, rows)                                 # x: (B, N, D)

Tokens are [..., D] of float32, bfloat16 or float16; tables, weights and biases may have another of these
dtypes. Arithmetic is float32, rounded once. Each function raises ValueError or TypeError before touching
memory if an argument does not fit. On a GPU the values of `rows` are not looked at beforehand (that
would be a sync): rows outside the table give garbage in their tokens, but read nothing outside it.
The formulas stand in pydiffuse.reference.adaln.
"""

from __future__ import annotations

from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import describe, is_integer, plain, widest
from pydiffuse.adaln import reference
from pydiffuse.adaln.apply import call_modulate
from pydiffuse.adaln.arguments import NORMS, check_modulation, usual_norm


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
    """norm(x) (1 + scale[row]) + shift[row]: normalise, then scale and shift by the token's row.

    x: [..., D]. table: [K, 2, D], shift then scale. rows: int32 or int64, broadcast to x.shape[:-1];
    (B, 1) for a row per sample of (B, N, D). norm: "layer" (zero mean, unit variance), "rms" (unit
    second moment) or None. weight, bias: [D], applied within the norm. out: a tensor like x to write
    to, x itself included; it takes no part in autograd. Returns [..., D] in x's dtype.
    """
    ops = dispatch.direct("modulate", x, table, rows)
    if ops and weight is None and bias is None and out is None and usual_norm(norm, eps):
        y, _ = ops.modulate.new(x, None, table, rows, NORMS.index(norm), eps)
        if y is not None:
            return y
    check_modulation("modulate", x, None, table, rows, norm, eps, weight, bias)
    if dispatch.forced_reference():
        return reference.modulate(x, table, rows, norm=norm, eps=eps, weight=weight, bias=bias, out=out)
    outs = None if out is None else (out,)
    return call_modulate("modulate", x, None, table, rows, norm, eps, weight, bias, outs)[0]


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
    """r = residual + gate[row] branch and its modulation, in one pass: what stands between the two
    halves of a transformer block. The norm sees r before it is rounded. Under autocast a residual and a
    branch of two dtypes are taken in the wider one; elsewhere they must be alike.

    residual, branch: [..., D], alike. table: [K, 3, D], shift, scale, gate: the gate of the branch that
    ends, the shift and scale of the one that begins. rows, norm, eps, weight, bias: as in `modulate`.
    out: (r, y); r may be residual. Returns (r, y), each [..., D].
    """
    op = "gate_residual_modulate"
    ops = dispatch.direct(op, residual, branch, table, rows)
    if ops and weight is None and bias is None and out is None and usual_norm(norm, eps):
        y, r = ops.modulate.new(residual, branch, table, rows, NORMS.index(norm), eps)
        if y is not None:
            return r, y
    residual, branch = widest(residual, branch)
    check_modulation(op, residual, branch, table, rows, norm, eps, weight, bias)
    if out is not None and not (isinstance(out, tuple | list) and len(out) == 2):
        raise TypeError(f"{op}: out is {describe(out)}; accepted: a pair of tensors (r, y)")
    if dispatch.forced_reference():
        return reference.gate_residual_modulate(
            residual, branch, table, rows, norm=norm, eps=eps, weight=weight, bias=bias, out=out
        )
    outs = None if out is None else (out[0], out[1])
    r, y = call_modulate(op, residual, branch, table, rows, norm, eps, weight, bias, outs)
    return r, y


def embed_t(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    scale: float = 1.0,
    max_distinct: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sinusoidal embedding of the distinct values of t, and the row of each t among them.

    The order is DiT's, cosines before sines. Rows follow the values, lowest first. No host sync: the
    table has K = max_distinct rows, t.numel() without it, and those left over repeat the last. With
    more than max_distinct values a ValueError on the CPU, an assertion of the device on a GPU.

    t: any shape, a float tensor; it gets no gradient. dim: features; an odd one ends in a zero.
    scale: multiplies t; 1000 for t in [0, 1] and a network that knows steps of 0 to 1000. max_period:
    the longest of the wavelengths is 2 pi times this. Returns the table (K, dim), float32, and the
    rows, int64, in t's shape.
    """
    dim, max_period, scale, max_distinct = map(plain, (dim, max_period, scale, max_distinct))
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"embed_t: t is {describe(t)}; accepted: a float tensor of any shape")
    for name, value in (("dim", dim), ("max_distinct", 1 if max_distinct is None else max_distinct)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"embed_t: {name} is {value!r}; accepted: an integer, 1 or more")
    if isinstance(max_period, bool) or not isinstance(max_period, int | float) or not max_period > 0:
        raise ValueError(f"embed_t: max_period is {max_period!r}; accepted: a number > 0")
    return reference.embed_t(t, dim, max_period=max_period, scale=scale, max_distinct=max_distinct)
