"""From checked arguments to one op call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_no_grad, check_outs
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse._core.grids import METHODS, PatchSize
from pydiffuse._core.structs import numbers
from pydiffuse.patch.arguments import Scalar, remembered
from pydiffuse.patch.autograd import Call, SelectPatches, Tables, fresh, run_mix_patches


def level_of(value: Any) -> Tensor | None:
    """A level as a tensor; None where it is neither a tensor nor a number."""
    if isinstance(value, Tensor):
        return value
    return one_level(value) if value.__class__ in (float, int) else None


@lru_cache(maxsize=256)
def one_level(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def directly(
    op: str,
    rule: tuple[int, ...],
    x: Tensor,
    pred: Tensor | None,
    uncond: Tensor | None,
    noise: Tensor | None,
    t: Scalar,
    t_next: Scalar | None,
    patch_size: PatchSize,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Any:
    """The usual call: contiguous images, float32 levels or numbers, no gradient. What the method makes, and
    of a step where the patches are; None where it is not."""
    steps = rule[0] < len(METHODS)
    now, then = level_of(t), level_of(t_next) if steps else None
    ops = dispatch.direct(op, x, pred, uncond, noise, now, then, mask)
    if ops is None or now is None or (steps and then is None) or x.dim() < 3:
        return None
    facts = numbers(*remembered(op, x.shape, patch_size).grid, *rule, scale)
    first, second, arrived = ops.mix_patches.new(x, pred, uncond, noise, now, then, mask, facts)
    if first is None:
        return None
    return first if second is None and arrived is None else (first, arrived if second is None else second)


def mixed(
    call: Call,
    tables: Tables,
    terms: tuple[Tensor, ...],
    given: tuple[Tensor, ...] = (),
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs of a call, the first of them written to those that are given, and, after a step, where
    the patches are: through autograd if a gradient is due, straight to the op if not."""
    first, steps = terms[0], tables.t_next is not None
    if not given and needs_function(*terms):
        return differentiable("patch.MixPatches", call, *tables, *terms), arrived_at(
            tables
        ) if steps else None
    if given:
        check_outs(call.op, given, (first,) * len(given), terms)
        check_no_grad(call.op, terms, given)
    outs = [o if o.is_contiguous() else fresh(o, o.dtype) for o in given]
    outs += [fresh(first, dtype) for dtype in call.dtypes[len(given) :]]
    arrived = None
    if steps and first.numel():
        arrived = fresh(tables.t, torch.float32)
    elif steps:
        arrived = arrived_at(tables)
    run_mix_patches(call, outs, arrived, tables, terms)
    for i, out in enumerate(given):
        if outs[i] is not out:
            outs[i] = out.copy_(outs[i])
    return tuple(outs), arrived


def select(
    op: str, wanted: str, score: Tensor, k: int, t: Tensor | None = None, dt: Scalar = 0.0, steps: int = 0
) -> tuple[Tensor, ...]:
    """wanted: "ids", "mask" or "levels", of which there are `steps`; t: [B, N] float32, for them."""
    dts = None
    if isinstance(dt, Tensor):
        dts, dt = dt.detach().to(score.device, torch.float32), 0.0
        dts = (dts[:, None] if dts.dim() == 1 else dts).expand(score.shape)
    given = (op, wanted, k, steps, float(dt), score.detach().float(), t, dts)
    if torch._C._are_functorch_transforms_active():
        return differentiable("patch.SelectPatches", *given)
    return SelectPatches.forward(*given)


def arrived_at(tables: Tables) -> Tensor:
    """Where the patches are after a step."""
    assert tables.t_next is not None
    if tables.mask is None:
        return tables.t_next.clone(memory_format=torch.contiguous_format)
    return torch.where(tables.mask, tables.t_next, tables.t)
