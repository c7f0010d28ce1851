"""From checked arguments to one op call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_no_grad, check_outs
from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse._core.grids import METHODS, PatchSize
from pydiffuse._core.structs import numbers
from pydiffuse.patch.arguments import Scalar, remembered
from pydiffuse.patch.autograd import Call, MixPatches, Tables, fresh, run_mix_patches, with_levels


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
        return differentiable(MixPatches, call, *tables, *terms), arrived_at(tables) if steps else None
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


class Picks(NamedTuple):
    """What a selection writes; None is not wanted."""

    ids: Tensor | None = None
    rest: Tensor | None = None
    mask: Tensor | None = None
    levels: Tensor | None = None


def select(
    op: str, picks: Picks, score: Tensor, k: int, t: Tensor | None = None, dt: Scalar = 0.0
) -> None:
    """t: [B, N] float32, for the levels."""
    if not score.numel():
        return
    dts = None
    if isinstance(dt, Tensor):
        dts, dt = dt.detach().to(score.device, torch.float32), 0.0
        dts = (dts[:, None] if dts.dim() == 1 else dts).expand(score.shape)
    scores = score.detach().float().contiguous()
    with_levels(ops_for(op, score).select_patches.default, *picks, scores, k, t, dts, float(dt))


def arrived_at(tables: Tables) -> Tensor:
    """Where the patches are after a step."""
    assert tables.t_next is not None
    if tables.mask is None:
        return tables.t_next.clone(memory_format=torch.contiguous_format)
    return torch.where(tables.mask, tables.t_next, tables.t)
