"""Guidance of samples whose elements are split over the ranks of a group.

Each rank holds its part of every prediction, in any shape [B, ...] and of any length; B and the dtype are the
same on every rank. A rule is the Gram matrix of each part, one all-reduce, the coefficients, and the linear
combination of each part. What is sent, forward and again backward, are k(k+1)/2 float64 numbers per sample,
with `rescale` k more, and one, the elements of a sample; `cfg`, `compose` and "linear" send nothing without
`rescale`. The sum over the ranks is the same on all of them, so their coefficients are, too.

Scales and other numbers are the same on every rank. The gradient of one that requires it is this rank's part:
summed over the group (`sum_gradients`) it is that of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydiffuse import guidance
from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_no_grad, check_outs, check_scalar, check_tensors
from pydiffuse._core.functions import differentiable
from pydiffuse._core.rules import EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES, Rule
from pydiffuse.distributed.comm import AllReduce, Group, Ranks
from pydiffuse.guidance import reference
from pydiffuse.guidance.apply import PLAIN, Update, check_guide, guide_arguments, superpose_by, value_of
from pydiffuse.guidance.arguments import Scalar, sequence, weights_of
from pydiffuse.guidance.coefficients import coefficients, tcfg_of_many


def gram(preds: Sequence[Tensor], *, sums: bool = False, group: Group = None) -> Any:
    """`pydiffuse.gram` over the elements of all ranks: (B, k, k) float64, and with `sums` (B, k) float64."""
    ranks = Ranks("gram", group)
    with ranks.checking():
        preds = tuple(sequence("gram", "preds", preds))
        check_tensors("gram", "preds", preds)
    _agree(ranks, preds, sums=sums)
    G, totals, _ = _gram(ranks, preds, sums, False)
    return (G, totals) if sums else G


def combine(
    preds: Sequence[Tensor], coefficients: Tensor, *, out: Tensor | None = None, group: Group = None
) -> Tensor:
    """`pydiffuse.combine` of each rank's part: nothing is sent. coefficients: the same on every rank."""
    Ranks("combine", group)
    return guidance.combine(preds, coefficients, out=out)


def cfg(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0,
    out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.cfg` over the elements of all ranks."""
    return value_over("cfg", (cond, uncond), (scale,), original, rescale, out, group)


def tcfg(
    cond: Tensor | Sequence[Tensor], uncond: Tensor, scale: Scalar | Sequence[Scalar], *,
    original: bool = False, rescale: Scalar = 0.0, out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.tcfg` over the elements of all ranks; cond may be a list of m conditions."""
    if isinstance(cond, Tensor):
        one: Any = scale
        return value_over("tcfg", (cond, uncond), (one,), original, rescale, out, group)
    ranks = Ranks("tcfg", group)
    with ranks.checking():
        preds = (*sequence("tcfg", "cond", cond), uncond)
        check_tensors("tcfg", "cond, uncond", preds)
        m = len(preds) - 1
        given = weights_of("tcfg", scale if isinstance(scale, Sequence) else [scale] * m, m)
        scales = torch.stack([_number("tcfg", "scale", v, uncond) for v in given], 1)
    rescaled = _rescales(rescale)
    _agree(ranks, preds, rescaled=rescaled)
    G, sums, n = _gram(ranks, preds, rescaled, rescaled)
    c = tcfg_of_many(G, scales, original)
    if rescaled:
        phi = _number("tcfg", "rescale", rescale, uncond)
        c = coefficients("linear", G, c.unbind(1), rescale=phi, sums=sums, n=n)
    return _written("tcfg", _mix("tcfg", c[:, None], preds), preds, out)


def cfg_zero(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0,
    out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.cfg_zero` over the elements of all ranks."""
    return value_over("cfg_zero", (cond, uncond), (scale,), original, rescale, out, group)


def apg(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, eta: Scalar = 1.0, norm_threshold: Scalar = 0.0,
    momentum: Scalar | None = None, state: Tensor | None = None, original: bool = False,
    rescale: Scalar = 0.0, out: Any = None, group: Group = None,
) -> Any:  # fmt: skip
    """`pydiffuse.apg` over the elements of all ranks; norm_threshold is of the whole sample."""
    preds = (cond, uncond) if state is None else (cond, uncond, state)
    if state is not None and momentum is None:
        raise ValueError("apg: state was given without momentum; give both, or neither")
    values = (scale, eta, norm_threshold, 0.0 if momentum is None else momentum)
    emit = EMIT_UPDATE if momentum is None else EMIT_UPDATE | EMIT_STATE
    return value_over("apg", preds, values, original, rescale, out, group, emit)


def magnitude_aware(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, alpha: Scalar = 8.0, original: bool = False,
    rescale: Scalar = 0.0, out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.magnitude_aware` over the elements of all ranks."""
    return value_over("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale, out, group)


def perp_neg(
    cond: Tensor, uncond: Tensor, negatives: Sequence[Tensor], scale: Scalar,
    weights: Sequence[Scalar] | Tensor, *, original: bool = False, rescale: Scalar = 0.0,
    out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.perp_neg` over the elements of all ranks."""
    negatives = sequence("perp_neg", "negatives", negatives, least=0)
    values = (scale, *weights_of("perp_neg", weights, len(negatives)))
    return value_over("perp_neg", (cond, *negatives, uncond), values, original, rescale, out, group)


def compose(
    conds: Sequence[Tensor], uncond: Tensor, weights: Sequence[Scalar] | Tensor, *,
    rescale: Scalar = 0.0, out: Tensor | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """`pydiffuse.compose` over the elements of all ranks."""
    conds = sequence("compose", "conds", conds)
    values = weights_of("compose", weights, len(conds))
    return value_over("compose", (*conds, uncond), values, False, rescale, out, group)


def slerp(
    a: Tensor, b: Tensor, weight: Scalar, *, out: Tensor | None = None, group: Group = None
) -> Tensor:
    """`pydiffuse.slerp` over the elements of all ranks."""
    return value_over("slerp", (a, b), (weight,), False, 0.0, out, group)


def rescale(
    guided: Tensor, cond: Tensor, factor: Scalar, *, out: Tensor | None = None, group: Group = None
) -> Tensor:
    """`pydiffuse.rescale` over the elements of all ranks."""
    return value_over("rescale", (cond, guided), (), False, factor, out, group)


def superpose(
    preds: Sequence[Tensor], log_density: Tensor, step: Scalar, *, kind: str = "or",
    noise: Tensor | None = None, uncond: Tensor | None = None, scale: Scalar = 1.0,
    temperature: float = 1.0, bias: Tensor | float = 0.0, group: Group = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pydiffuse.superpose` over the elements of all ranks; log_density is the same on every rank."""
    ranks = Ranks("superpose", group)

    def inner(tensors: Sequence[Tensor]) -> Tensor:
        _agree(ranks, tensors, kind=kind)
        return _gram(ranks, tuple(tensors), False, False)[0]

    with ranks.checking():
        return superpose_by(
            inner, guidance.combine, preds, log_density, step, kind=kind, noise=noise, uncond=uncond, scale=scale,
            temperature=temperature, bias=bias,
        )  # fmt: skip


def guide(
    preds: Sequence[Tensor], rule: str, *, x: Tensor, a: Scalar = 1.0, b: Scalar = 1.0,
    history: Tensor | None = None, h: Scalar = 0.0, noise: Tensor | None = None, s: Scalar = 0.0,
    predict: tuple[Scalar, Scalar] | None = None, original: bool = False, rescale: Scalar = 0.0,
    out: Any = None, group: Group = None, **parameters: Any,
) -> Any:  # fmt: skip
    """`pydiffuse.guide` over the elements of all ranks; x, history and noise are this rank's parts."""
    ranks = Ranks("guide", group)
    with ranks.checking():
        update, row, values, emit = guide_arguments(
            preds, rule, x, (a, b, h, s), history, noise, predict, parameters
        )
        check_guide(preds, update)
    preds = tuple(preds)
    if ranks.size == 1 or not (row.curved or _rescales(rescale)):
        options: dict[str, Any] = {**parameters, "predict": predict, "original": original, "out": out}
        return guidance.guide(
            preds, rule, x=x, a=a, b=b, history=history, h=h, noise=noise, s=s, rescale=rescale, **options
        )
    return _guided(ranks, row, preds, update, values, original, rescale, out, emit)


def value_over(
    rule: str,
    preds: tuple[Tensor, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    group: Group,
    emit: int = EMIT_UPDATE,
) -> Any:
    """What pydiffuse.guidance.apply.value_of is on one process."""
    ranks, row = Ranks(rule, group), RULES[rule]
    if ranks.size == 1 or not (row.curved or _rescales(rescale)):
        return value_of(rule, preds, values, original, rescale, out, emit)
    with ranks.checking():
        check_tensors(rule, "the predictions", preds)
        if len(preds) not in row.counts:
            raise ValueError(f"{rule}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    return _guided(ranks, row, preds, PLAIN, values, original, rescale, out, emit)


def _guided(
    ranks: Ranks,
    row: Rule,
    preds: tuple[Tensor, ...],
    update: Update,
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int,
) -> Any:
    op, like, rescaled = ranks.op, preds[0], _rescales(rescale)
    x, history, noise, of_update = update
    with ranks.checking():
        own = [_number(op, "a parameter", v, like) for v in values]
        a, b, h, s, p, q = (_number(op, "a coefficient of the update", v, like) for v in of_update)
        phi = _number(op, "rescale", rescale, like) if rescaled else None
    _agree(ranks, preds, rule=row.name, rescaled=rescaled)
    G, sums, n = _gram(ranks, preds, rescaled, rescaled)
    c = coefficients(row.name, G, own, original=original, rescale=phi, sums=sums, n=n)
    # Outputs are like the first term: x where there is one.
    extras: list[tuple[Any, Tensor, Tensor]] = [(x, a, p), (history, h, 0 * h), (noise, s, 0 * s)]
    there = [extra for extra in extras if extra[0] is not None]
    terms = [extra[0] for extra in there]

    def combination(by: Tensor, column: int) -> Tensor:
        return torch.cat(
            [*(e[column][:, None] for e in there[:1]), by[:, None] * c, *(e[column][:, None] for e in there[1:])], 1
        )  # fmt: skip

    lines = [combination(b, 1), *([combination(q, 2)] if emit & EMIT_PREDICT else [])]
    results = list(_mix(op, torch.stack(lines, 1), (*terms[:1], *preds, *terms[1:])))  # type: ignore[arg-type]
    if emit & EMIT_STATE:
        one = torch.ones_like(own[0])
        state = torch.stack([one, -one, own[3]], 1)[:, : len(preds)]
        results += _mix(op, state[:, None], preds)
    everything = (*preds, *(t for t in (x, history, noise) if t is not None))
    return _written(op, results, everything, out)


def _agree(ranks: Ranks, preds: Sequence[Tensor], **facts: Any) -> None:
    due = torch.is_grad_enabled() and any(t.requires_grad for t in preds)
    dtype = str(preds[0].dtype).removeprefix("torch.")
    ranks.agree(predictions=len(preds), batch=len(preds[0]), dtype=dtype, gradient=due, **facts)


def _gram(
    ranks: Ranks, preds: tuple[Tensor, ...], sums: bool, count: bool
) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """G [B, k, k], the sums [B, k] and the elements of a sample over all ranks, the last two where asked for."""
    k = len(preds)
    G, *more = guidance.gram(preds, sums=True) if sums else (guidance.gram(preds),)
    if ranks.size == 1:
        return G, more[0] if sums else None, preds[0].numel() / max(len(G), 1)
    i, j = torch.triu_indices(k, k, device=G.device)
    packed = torch.cat([G[:, i, j], *more], 1)
    elements = preds[0].numel() / max(len(G), 1)
    flat = [packed.flatten(), *([packed.new_full((1,), elements)] if count else [])]
    total = AllReduce.apply(ranks, torch.cat(flat))
    n = total[-1].detach() if count else 0.0
    packed = total[: packed.numel()].view_as(packed)
    place = torch.zeros(k, k, dtype=torch.int64, device=G.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=G.device)
    return packed[:, place], packed[:, len(i) :] if sums else None, n


def _mix(op: str, matrix: Tensor, terms: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """sum_m matrix[b, j, m] terms_m for each j, like the first term."""
    if dispatch.forced_reference():
        wide = torch.promote_types(terms[0].dtype, torch.float32)
        wider = [t.to(wide) for t in terms]
        return tuple(reference.combine(wider, c).to(terms[0].dtype) for c in matrix.unbind(1))
    return differentiable("guidance.Mix", op, matrix.shape[1], matrix.contiguous(), None, *terms)


def _written(op: str, results: Sequence[Tensor], inputs: Sequence[Tensor], out: Any) -> Any:
    """The result, or a tuple of several; in `out` where that is given."""
    if out is None:
        return results[0] if len(results) == 1 else tuple(results)
    outs = [out] if isinstance(out, Tensor) else list(out)
    check_outs(op, outs, results, inputs)
    check_no_grad(op, inputs, outs)
    for o, r in zip(outs, results, strict=True):
        o.copy_(r)
    return out


def _number(op: str, argument: str, value: Scalar, like: Tensor) -> Tensor:
    return check_scalar(op, argument, value, like).double()


def _rescales(value: Scalar) -> bool:
    return isinstance(value, Tensor) or value != 0
