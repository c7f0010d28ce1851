"""From the arguments of tile_attention to one op call."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_shape, describe, plain
from pydiffuse._core.structs import MAX_HEAD_DIM
from pydiffuse.plans import TilePlan


class Scale(NamedTuple):
    """What scores are multiplied by: a number, or one per head."""

    per_head: Tensor | None  # float32 [H]
    number: float


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, here: int | None = None
) -> None:
    """here: how many of the plan's tokens q, k and v hold, all by default."""
    names = "[B, H, S, D]"
    check_shape(op, "q", q, (None,) * 4, names)
    B, H, _, D = q.shape
    check_shape(op, "k", k, (B, None, None, D), names, like=q)
    check_shape(op, "v", v, k.shape, f"{names}, as k is", like=q)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {describe(t)}; accepted: {q.dtype}, as q is")
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        wider = -(-D // 8) * 8
        remedy = f"; pad q, k and v to {wider}" if 0 < D < MAX_HEAD_DIM else ""
        raise ValueError(f"{op}: head_dim {D} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}{remedy}")
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(
            f"{op}: q has {H} heads and k and v have {k.shape[1]}; accepted: a divisor of q's heads"
        )
    if not isinstance(plan, TilePlan):
        raise TypeError(f"{op}: plan is {describe(plan)}; accepted: a TilePlan of pydiffuse.plans")
    for name, t, length in (("q", q, plan.q_length), ("k", k, plan.k_length)):
        if here is not None and t.shape[2] != here:
            raise ValueError(
                f"{op}: {name} has {t.shape[2]} tokens; accepted: {here}, this rank's part of {plan!r}; give"
                " lengths= for other parts"
            )
        if here is None and t.shape[2] != length:
            raise ValueError(
                f"{op}: {name} has {t.shape[2]} tokens and {plan!r} is for {length}; accepted: a plan made"
                " for this length"
            )
    if plan.heads != 1 and plan.heads != H:
        raise ValueError(f"{op}: {plan!r} is for {plan.heads} heads and q has {H}; accepted: 1 or {H}")


def fits(q: Tensor, k: Tensor, plan: Any, scale: Any) -> bool:
    """Whether the plan is for these tokens and heads and on the CPU, and the scale a number: what a direct
    call asks for beside the shapes, which it looks at itself."""
    if plan.__class__ is not TilePlan or q.dim() != 4 or k.dim() != 4:
        return False
    _, H, S, _ = q.shape
    return (
        plan.q_length == S
        and plan.k_length == k.shape[2]
        and plan.heads in (1, H)
        and plan.tensors.spans.is_cpu
        and (scale is None or (scale.__class__ in (float, int) and abs(scale) < 3e38))
    )


def entropy_scale(head_dim: int, length: int, trained_length: int) -> float:
    """The scale that keeps the attention's entropy at another number of tokens than the trained one:
    sqrt(log_T(N) / D), N tokens now, T in training; 1/sqrt(D) at N = T (Jin et al., arXiv 2306.08645)."""
    head_dim, length, trained_length = map(plain, (head_dim, length, trained_length))
    for name, value, least in (
        ("head_dim", head_dim, 1), ("length", length, 1), ("trained_length", trained_length, 2),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"entropy_scale: {name} is {value!r}; accepted: an int, {least} or more")
    return math.sqrt(math.log(length, trained_length) / head_dim)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating-point tensors in its dtype."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def apart(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in two places twice: compiled graphs take no tensor as two arguments of one Function."""
    k = k.view_as(k) if k is q else k
    return q, k, v.view_as(v) if v is q or v is k else v


def scale_of(op: str, scale: Any, q: Tensor) -> Scale:
    if scale is None:
        return Scale(None, 1 / math.sqrt(q.shape[-1]))
    if isinstance(scale, Tensor):
        H = q.shape[1]
        if (
            (scale.shape != () and scale.shape != (H,))
            or not scale.is_floating_point()
            or scale.device != q.device
        ):
            raise ValueError(
                f"{op}: scale is {describe(scale)}; accepted: a number, or a float tensor ({H},), one for"
                f" each head, on {q.device}"
            )
        if scale.requires_grad and torch.is_grad_enabled() and not dispatch.forced_reference():
            raise ValueError(f"{op}: scale takes no gradient; multiply q by it and give scale=1")
        return Scale(scale.detach().float().expand(H).contiguous(), 1.0)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(float(scale)) < 3e38:
        raise ValueError(f"{op}: scale is {scale!r}; accepted: a finite number or a float tensor (H,)")
    return Scale(None, float(scale))
