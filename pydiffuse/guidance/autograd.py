"""The gradients of guidance.

A guided prediction is g = sum_i c_i(G, s) p_i, so with y its gradient
    dp_i = c_i y + sum_j dG_ij p_j + ds_i,   dG and ds from dc_i = <y, p_i>:
one more Gram pass and one more linear combination, both in `guide_backward`. `gram` and `mix` are each
other's derivatives and differentiate to any order; `guide` once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core.dispatch import ops_for
from pydiffuse._core.functions import Batched, derive, second_derivative
from pydiffuse._core.layouts import all_ordered, new_like, ordered, samples_together
from pydiffuse._core.rules import COMMON, EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES, UPDATE

A, B, H, S, P, Q = range(len(UPDATE))
MOMENTUM = len(UPDATE) + len(COMMON) + RULES["apg"].parameters.index("momentum")


class Call(NamedTuple):
    """What a call to `guide` is made of, beside its tensors."""

    op: str  # the public name, for messages
    rule: int
    params: tuple[float, ...]
    rescaled: bool
    columns: tuple[int, ...]  # parameters that vary over the batch, as the columns of `varied`
    emit: int


def run_guide(
    call: Call,
    out: list[Tensor],
    preds: tuple[Tensor, ...],
    x: Tensor | None,
    history: Tensor | None,
    noise: Tensor | None,
    varied: Tensor | None,
) -> None:
    like = out[0]
    op, rule, params, rescaled, columns, emit = call
    if not all_ordered(preds, like):
        preds = tuple(ordered(p, like) for p in preds)
    if x is not None:
        x, history, noise = (None if t is None else ordered(t, like) for t in (x, history, noise))
    ops_for(op, like).guide.default(
        out, preds, x, history, noise, rule, params, rescaled, varied, columns, emit
    )


def outputs(call: Call, preds: tuple[Tensor, ...], x: Tensor | None) -> list[Tensor]:
    like = preds[0] if x is None else x
    if call.emit == EMIT_UPDATE:
        return [new_like(like)]
    out = []
    if call.emit & EMIT_UPDATE:
        out.append(new_like(like))
    if call.emit & EMIT_PREDICT:
        out.append(new_like(like))
    if call.emit & EMIT_STATE:
        out.append(new_like(like, preds[0].dtype))
    return out


class Guide(Batched):
    """(call, varied, x, history, noise, *preds) -> a tuple of outputs, by `call.emit`."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: Call,
        varied: Tensor | None,
        x: Tensor | None,
        history: Tensor | None,
        noise: Tensor | None,
        *preds: Tensor,
    ) -> tuple[Tensor, ...]:
        out = outputs(call, preds, x)
        run_guide(call, out, preds, x, history, noise, varied)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call, varied, x, history, noise, *preds = inputs
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.dtypes = [None if t is None else t.dtype for t in (x, history, noise)]
        ctx.save_for_backward(varied, *preds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: Call = ctx.call
        varied, *preds = ctx.saved_tensors
        given = iter(grads)
        update = next(given) if call.emit & EMIT_UPDATE else None
        predict = next(given) if call.emit & EMIT_PREDICT else None
        state = next(given) if call.emit & EMIT_STATE else None

        def times(i: int, y: Tensor | None) -> Tensor | None:
            """Parameter i times a gradient."""
            if y is None or i not in call.columns:
                return None if y is None else y if call.params[i] == 1 else call.params[i] * y
            column = varied[:, call.columns.index(i)]
            return column.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1)) * y

        def plus(*terms: Tensor | None) -> Tensor | None:
            there = [t for t in terms if t is not None]
            return sum(there[1:], there[0]) if there else None

        g = plus(times(B, update), times(Q, predict))
        needs = ctx.needs_input_grad
        dextras = [
            plus(times(A, update), times(P, predict)) if needs[2] else None,
            times(H, update) if needs[3] else None,
            times(S, update) if needs[4] else None,
        ]
        dextras = [d if d is None else d.to(t) for d, t in zip(dextras, ctx.dtypes, strict=True)]
        dpreds: list[Tensor | None] = [None] * len(preds)
        dvaried = None
        if g is not None and (any(needs[5:]) or needs[1]):
            dvaried, *given_back = derive(GuideBackward, call, needs[1], varied, g, *preds)
            dpreds = list(given_back)  # Dynamo (torch 2.11) unpacks into a tuple
        if state is not None:  # c - u + momentum state: APG's own output
            for i, d in enumerate((state, -state, times(MOMENTUM, state))[: len(preds)]):
                dpreds[i] = plus(dpreds[i], d)
            if dvaried is not None and MOMENTUM in call.columns and len(preds) == 3:
                G, _ = derive(Gram, call.op, state, preds[2])
                column = torch.arange(dvaried.shape[1], device=G.device)
                mine = column == call.columns.index(MOMENTUM)
                dvaried = dvaried + mine * G[:, 0, 1, None]
        return None, dvaried, *dextras, *dpreds


class GuideBackward(Batched):
    """(call, with_varied, varied, gradient of g, *preds) -> (dvaried or None, *dpreds)."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: Call, with_varied: bool, varied: Tensor | None, grad: Tensor, *preds: Tensor
    ) -> tuple[Tensor | None, ...]:
        dpreds = [new_like(preds[0]) for _ in preds]
        like = dpreds[0]
        dvaried = torch.empty_like(varied) if with_varied and varied is not None else None
        ops_for(call.op, grad).guide_backward.default(
            dpreds,
            dvaried,
            ordered(grad, like),
            [ordered(p, like) for p in preds],
            call.rule,
            call.params,
            call.rescaled,
            varied,
            call.columns,
        )
        return dvaried, *dpreds

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0].op

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise second_derivative(ctx.op, ", or write it with gram and combine")


class Gram(Batched):
    """(op, *preds) -> G [B, k, k] and the sums [B, k], float64."""

    @staticmethod
    def forward(op: str, *preds: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        like, k = preds[0], len(preds)
        if not samples_together(like, written=False):
            like = like.contiguous()
            preds = (like, *preds[1:])
        gram = torch.empty(like.shape[0], k, k, dtype=torch.float64, device=like.device)
        sums = gram.new_empty(like.shape[0], k)
        ops_for(op, like).gram.default(gram, sums, [ordered(p, like) for p in preds])
        return gram, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, *preds = inputs
        ctx.save_for_backward(*preds)

    @staticmethod
    def backward(ctx: Any, dgram: Tensor, dsums: Tensor) -> Any:  # type: ignore[override]
        preds = ctx.saved_tensors
        dpreds = derive(Mix, ctx.op, len(preds), (dgram + dgram.mT).contiguous(), dsums, *preds)
        return None, *(d.to(p.dtype) for d, p in zip(dpreds, preds, strict=True))


class Mix(Batched):
    """(op, outs, matrix [B, J, M], shift [B, J] or None, *terms) -> shift_j + sum_m matrix_jm t_m.

    Outputs have the dtype and order of the first term. `outs` = J.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        op: str, outs: int, matrix: Tensor, shift: Tensor | None, *terms: Tensor
    ) -> tuple[Tensor, ...]:
        out = [new_like(terms[0]) for _ in range(outs)]
        run_mix(op, out, terms, matrix, shift)
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.outs, matrix, shift, *terms = inputs
        ctx.shifted = shift is not None
        ctx.save_for_backward(matrix, *terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        matrix, *terms = ctx.saved_tensors
        J, M = ctx.outs, len(terms)
        dmatrix = dshift = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            G, sums = derive(Gram, ctx.op, *grads, *terms)
            dmatrix, dshift = G[:, :J, J:], sums[:, :J] if ctx.shifted else None
        dterms: tuple[Tensor | None, ...] = (None,) * M
        if any(ctx.needs_input_grad[4:]):
            wide = derive(Mix, ctx.op, M, matrix.mT.contiguous(), None, *grads)
            dterms = tuple(d.to(t.dtype) for d, t in zip(wide, terms, strict=True))
        return None, None, dmatrix, dshift, *dterms


def run_mix(
    op: str, out: list[Tensor], terms: tuple[Tensor, ...], matrix: Tensor, shift: Tensor | None
) -> None:
    like = out[0]
    ops_for(op, like).mix.default(
        out,
        [ordered(t, like) for t in terms],
        matrix.contiguous(),
        None if shift is None else shift.contiguous(),
    )
