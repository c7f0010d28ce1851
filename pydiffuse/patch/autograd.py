"""The gradients of patches.

A step, a noising and a change of prediction are linear in their tensors, per patch a matrix c: the
gradient is the same kernel with c transposed, and so is that gradient's. Levels take no gradient.

patch_loss has d = p - u and the errors e = sum d^2 of every patch, weight w and log-variance l:
    dp = 2 w d,   du = -2 w (1 + nll/2 e^-l) d,   dl = w nll/2 (n - e e^-l),   dw = the patch's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Batched, derive, folded, run, second_derivative
from pydiffuse._core.grids import NOISY, RESIDUAL, X


class Call(NamedTuple):
    """What a call to `mix_patches` is made of, beside its tensors."""

    op: str  # the public name, for messages
    grid: tuple[int, ...]
    rule: tuple[int, int, int, int]  # method, path, source, target
    outs: int  # which places of the matrix the outputs stand for, bit by bit
    terms: int
    dtypes: tuple[torch.dtype, ...]  # of the outputs
    scale: float = 1.0
    eta: float = 1.0
    transposed: bool = False


class Tables(NamedTuple):
    """[B, N], or None; scales [B]."""

    t: Tensor
    t_next: Tensor | None = None
    t_last: Tensor | None = None
    mask: Tensor | None = None
    scales: Tensor | None = None


def fresh(first: Tensor, dtype: torch.dtype) -> Tensor:
    """What an output is written to: contiguous, like the first term but for its dtype."""
    return torch.empty_like(first, dtype=dtype, memory_format=torch.contiguous_format)


def run_mix_patches(
    call: Call, out: list[Tensor], arrived: Tensor | None, tables: Tables, terms: tuple[Tensor, ...]
) -> None:
    like = out[0]
    if not like.numel():
        return
    for t in terms:
        if not t.is_contiguous():
            terms = tuple(t.contiguous() for t in terms)
            break
    op, grid, rule, outs, present, _, scale, eta, transposed = call
    t, t_next, t_last, mask, scales = tables
    mix_patches = ops_for(op, like).mix_patches.default
    run(
        mix_patches,
        out, arrived, terms, t, t_next, t_last, mask, scales, grid, (*rule, outs, present), scale, eta,
        transposed,
    )  # fmt: skip


class MixPatches(Batched):
    """(call, t, t_next, t_last, mask, scales, *terms) -> a tuple of outputs, by `call.outs`."""

    @staticmethod
    def forward(call: Call, *given: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        tables, terms = Tables(*given[:5]), given[5:]
        out = [fresh(terms[0], dtype) for dtype in call.dtypes]
        run_mix_patches(call, out, None, tables, terms)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tables = inputs[:6]
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in inputs[6:]]
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: Call = ctx.call
        there = [g for g in grads if g is not None]
        needs = ctx.needs_input_grad[6:]
        dterms: list[Tensor | None] = [None] * len(needs)
        if there and any(needs):
            flipped = call._replace(
                outs=_among(call.terms, needs),
                terms=_among(call.outs, [g is not None for g in grads]),
                dtypes=tuple(d for d, needed in zip(ctx.dtypes, needs, strict=True) if needed),
                transposed=not call.transposed,
            )
            found = iter(derive(MixPatches, flipped, *ctx.saved_tensors, *there))
            dterms = [next(found) if wanted else None for wanted in needs]
        return *(None,) * 6, *dterms


def _among(places: int, which: Any) -> int:
    """Of the places that are set, those that `which` says."""
    bits = [i for i in range(5) if places >> i & 1]
    return sum(1 << i for i, wanted in zip(bits, which, strict=True) if wanted)


class LossCall(NamedTuple):
    grid: tuple[int, ...]
    nll: float


def _certainty(call: LossCall, elements: int, logvar: Tensor | None, errors: Tensor) -> tuple[Any, Any]:
    """What nll adds to the loss of every patch of `elements`, per error and in all."""
    if logvar is None:
        return 0.0, 0.0
    l = logvar.double()
    each = call.nll / 2 * (-l).exp()
    log_2pi = 1.8378770664093453  # a literal: in a backward Dynamo (torch 2.13) loses floats of modules
    return each, call.nll / 2 * elements * (log_2pi + l) + each * errors


class PatchLoss(Batched):
    """(call, logvar, weight, pred, target) -> the sum over each sample [B], the errors [B, N]; float64."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: LossCall, logvar: Tensor | None, weight: Tensor | None, pred: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, planes, rows, columns, p, r, c = call.grid
        patches = (planes // p) * (rows // r) * (columns // c) if p and r and c else 0
        loss = torch.empty(pred.shape[0], dtype=torch.float64, device=pred.device)
        errors = loss.new_empty(pred.shape[0], patches)
        if not pred.numel():
            return loss.zero_(), errors.zero_()
        tables = (None if t is None else t.float().contiguous() for t in (logvar, weight))
        ops_for("patch_loss", pred).patch_loss.default(
            loss, errors, pred.contiguous(), target.contiguous(), *tables, call.nll, call.grid
        )
        return loss, errors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        if dloss is None:
            return (None,) * 5
        return None, *derive(
            PatchLossBackward, ctx.call, tuple(ctx.needs_input_grad[1:]), dloss, *ctx.saved_tensors
        )


class PatchLossBackward(Batched):
    """(call, which gradients, dloss [B], errors, logvar, weight, pred, target) -> theirs or None."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: LossCall,
        needs: tuple[bool, ...],
        dloss: Tensor,
        errors: Tensor,
        logvar: Tensor | None,
        weight: Tensor | None,
        pred: Tensor,
        target: Tensor,
    ) -> tuple[Tensor | None, ...]:
        g = dloss[:, None]
        gw = g.expand_as(errors) if weight is None else g * weight.double()
        patches = errors.shape[1]
        elements = pred.shape[1:].numel() // patches if patches else 0
        each, certainty = _certainty(call, elements, logvar, errors)
        dlogvar = dweight = None
        if needs[0] and logvar is not None:
            dlogvar = (gw * (call.nll / 2 * elements - each * errors)).to(logvar.dtype)
        if needs[1] and weight is not None:
            dweight = (g * (errors + certainty)).to(weight.dtype)
        dtypes = tuple(t.dtype for t, n in zip((pred, target), needs[2:], strict=True) if n)
        out = [fresh(pred, d) for d in dtypes]
        if out:
            outs = needs[2] + 2 * needs[3]
            rule = (RESIDUAL, 0, 0, 0)
            mix = Call("patch_loss", call.grid, rule, outs, 1 << X | 1 << NOISY, dtypes)
            tables = Tables((2 * gw).float(), (2 * gw * (1 + each)).float())
            run_mix_patches(mix, out, None, tables, (pred, target))
        found = iter(out)
        images = (next(found) if wanted else None for wanted in needs[2:])
        return dlogvar, dweight, *images

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative("patch_loss")


class SelectPatches(Batched):
    """(op, what is wanted, k, steps, dt, score [B, N] float32, t, dts) -> ids and the rest, the mask, or the levels.

    Levels are [steps, B, N]. No gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        op: str, wanted: str, k: int, steps: int, dt: float, score: Tensor, t: Tensor | None, dts: Tensor | None
    ) -> tuple[Tensor, ...]:  # fmt: skip
        B, N = score.shape
        ids = rest = mask = levels = None
        if wanted == "ids":
            ids = torch.empty(B, k, dtype=torch.int64, device=score.device)
            rest = torch.empty(B, N - k, dtype=torch.int64, device=score.device)
        elif wanted == "mask":
            mask = torch.empty(B, N, dtype=torch.bool, device=score.device)
        else:
            levels = torch.empty(steps, B, N, dtype=torch.float32, device=score.device)
        if score.numel():
            select_patches = ops_for(op, score).select_patches.default
            run(select_patches, ids, rest, mask, levels, score.contiguous(), k, t, dts, dt)
        return tuple(out for out in (ids, rest, mask, levels) if out is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None,) * 8

    @classmethod
    def mapped(cls, apply: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        out = apply(*(folded(info, d, t) for d, t in zip(in_dims, args, strict=True)))
        at = 1 if args[1] == "levels" else 0  # the batch's dimension
        return tuple(t.unflatten(at, (info.batch_size, -1)) for t in out), (at,) * len(out)
