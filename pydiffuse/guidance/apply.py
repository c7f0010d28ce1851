"""From checked arguments to one op call: a rule, its parameters, and the sampler's update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import (
    check_no_grad,
    check_outs,
    check_scalar,
    check_tensors,
    describe,
    widest,
    writable,
    written,
)
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse._core.rules import EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES, Rule, own_values
from pydiffuse._core.structs import numbers
from pydiffuse.guidance import reference
from pydiffuse.guidance.arguments import Scalar, number_of, parameter_name, sequence, weights_of
from pydiffuse.guidance.autograd import Call, outputs, run_guide

NUMBERS = {float, int, bool}


class Update(NamedTuple):
    """What `guide` adds to a rule: x' = a x + b g + h history + s noise, D = p x + q g."""

    x: Tensor | None = None
    history: Tensor | None = None
    noise: Tensor | None = None
    numbers: tuple[Scalar, ...] = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    """a, b, h, s, p, q."""


PLAIN = Update()


def value_of(
    rule: str,
    preds: tuple[Tensor, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int = EMIT_UPDATE,
    name: str | None = None,
) -> Any:
    """The value of a rule, with no update: the way of every function that is named after one."""
    row = RULES[rule]
    name = name or rule
    if out is None and emit == EMIT_UPDATE:
        ops = dispatch.direct(name, *preds)
        if (
            ops
            and NUMBERS.issuperset(map(type, (original, rescale, *values)))
            and len(preds) in row.counts
        ):
            facts = numbers(row.code, emit, *PLAIN.numbers, original, rescale, *values)
            found = ops.guide.rule(preds, facts)
            if found is not None:
                return found
    else:
        found = directly(name, row, preds, PLAIN, values, original, rescale, out, emit)
        if found is not None:
            return found
    spread = dispatch.over_ranks(*preds)
    if spread:
        return spread.value_of(rule, preds, values, original, rescale, out, emit)
    preds = widest(*preds)
    check_tensors(name, "the predictions", preds)
    if len(preds) not in row.counts:
        raise ValueError(f"{name}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    if dispatch.forced_reference():
        return _reference(row, preds, values, original, rescale, out, emit)
    return call_rule(name, row, preds, PLAIN, values, original, rescale, out, emit)


def _reference(
    row: Rule,
    preds: tuple[Tensor, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int,
) -> Any:
    parameters: dict[str, Any] = dict(zip(row.parameters, values, strict=False))
    if row.weights:
        parameters[row.weights] = values[len(row.parameters) :]
    if row.common:
        parameters.update(original=original, rescale=rescale)
    if row.name == "rescale":
        parameters["rescale"] = rescale
    if row.name == "apg" and not emit & EMIT_STATE:
        del parameters["momentum"]
    if isinstance(out, tuple | list):
        results = reference.apply(row.name, preds, **parameters)
        return tuple(o.copy_(r) for o, r in zip(out, results, strict=True))
    return reference.apply(row.name, preds, out=out, **parameters)


def directly(
    op: str,
    row: Rule,
    preds: tuple[Tensor, ...],
    update: Update,
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int,
) -> Any:
    """The usual call: contiguous tensors, numbers for parameters, no gradient. None where it is not."""
    x, history, noise, of_update = update
    given = (*of_update, original, rescale, *values)
    if not NUMBERS.issuperset(map(type, given)) or len(preds) not in row.counts:
        return None
    outs = () if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
    ops = dispatch.direct(op, *preds, x, history, noise, *outs)
    if ops is None:
        return None
    arguments = (preds, x, history, noise, numbers(row.code, emit, *given))
    if out is not None:
        if not ops.guide.into(outs, *arguments):
            return None
        written(outs)
        return out
    results = ops.guide.new(*arguments)
    return results[0] if emit == EMIT_UPDATE else tuple(r for r in results if r is not None) or None


def call_rule(
    op: str,
    row: Rule,
    preds: tuple[Tensor, ...],
    update: Update,
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int,
) -> Any:
    """One call of `guide`: through autograd if a gradient is due, straight to the op if not."""
    x, history, noise, of_update = update
    given = (*of_update, original, rescale, *values)
    tensors: list[Tensor] = []
    columns: tuple[int, ...] = ()
    varied = None
    if NUMBERS.issuperset(map(type, given)):
        params = tuple(map(float, given))
    else:
        columns = tuple(i for i, value in enumerate(given) if isinstance(value, Tensor))
        tensors = [check_scalar(op, parameter_name(row, i), given[i], preds[0]) for i in columns]
        varied = torch.stack([t.double() for t in tensors], 1) if tensors else None
        params = tuple(
            0.0 if i in columns else number_of(op, row, i, value) for i, value in enumerate(given)
        )
    call = Call(op, row.code, params, params[7] != 0.0 or 7 in columns, columns, emit)
    if out is None:
        if needs_function(varied, x, history, noise, *preds):
            results = differentiable("guidance.Guide", call, varied, x, history, noise, *preds)
            return results[0] if len(results) == 1 else results
        results = outputs(call, preds, x)
        run_guide(call, results, preds, x, history, noise, varied)
        return results[0] if len(results) == 1 else tuple(results)
    outs = [out] if isinstance(out, Tensor) else list(out)
    everything = (*preds, *(t for t in (x, history, noise) if t is not None))
    likes = [preds[0] if x is None else x] * emit.bit_count()
    if emit & EMIT_STATE:
        likes[-1] = preds[0]
    check_outs(op, outs, likes, everything)
    check_no_grad(op, (*everything, *tensors), outs)
    with writable(outs) as targets:
        run_guide(call, targets, preds, x, history, noise, varied)
    return out


def call_in_two(
    row: Rule,
    preds: tuple[Tensor, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    update: Update,
    emit: int,
) -> Any:
    """The rule, then the update: for coefficients of the update that want a gradient."""
    g = call_rule("guide", row, preds, PLAIN, values, original, rescale, None, emit & ~EMIT_PREDICT)
    g, state = g if isinstance(g, tuple) else (g, None)
    x, history, noise, (a, b, h, s, p, q) = update
    assert x is not None
    terms = [(x, a, p), (g, b, q), (history, h, 0.0), (noise, s, 0.0)]
    there = [term for term in terms if term[0] is not None]

    def coefficients(column: int) -> Tensor:
        cs = [check_scalar("guide", "a coefficient", t[column], x) for t in there]
        return torch.stack([c.double() for c in cs], 1)

    matrix = torch.stack([coefficients(1), coefficients(2)][: 2 if emit & EMIT_PREDICT else 1], 1)
    results = list(
        differentiable("guidance.Mix", "guide", matrix.shape[1], matrix, None, *[t[0] for t in there])
    )
    if state is not None:
        results.append(state)
    return results[0] if len(results) == 1 else tuple(results)


def guide_arguments(
    preds: Sequence[Tensor],
    rule: str,
    x: Tensor,
    of_update: tuple[Scalar, Scalar, Scalar, Scalar],
    history: Tensor | None,
    noise: Tensor | None,
    predict: tuple[Scalar, Scalar] | None,
    parameters: dict[str, Any],
) -> tuple[Update, Rule, tuple[Scalar, ...], int]:
    """`guide`'s arguments: the update, the rule, its own parameters, and what is returned. of_update: a, b, h, s."""
    row = RULES.get(rule)
    if row is None:
        raise ValueError(f"guide: unknown rule {rule!r}; accepted: {', '.join(RULES)}")
    if len(preds) not in row.counts:
        raise ValueError(
            f"guide: preds holds {len(preds)} tensors; rule {rule!r} accepts ({', '.join(row.preds)})"
        )
    _, _, h, s = of_update
    if (history is None and not _is_zero(h)) or (noise is None and not _is_zero(s)):
        raise ValueError("guide: h needs history and s needs noise; one of them was left out")
    momentum = parameters.get("momentum")
    if rule == "apg" and len(preds) == 3 and momentum is None:
        raise ValueError("guide: preds holds apg's state, but momentum was left out; give both")
    emit = EMIT_UPDATE
    if predict is not None:
        emit |= EMIT_PREDICT
    if rule == "apg" and momentum is not None:
        emit |= EMIT_STATE
    p, q = (0.0, 1.0) if predict is None else predict
    update = Update(x, history, noise, (*of_update, p, q))
    return update, row, own_values(row, len(preds), parameters, weights_of), emit


def check_guide(preds: Sequence[Tensor], update: Update) -> None:
    """The tensors of `guide` are of one shape and on one device."""
    check_tensors("guide", "preds", preds)
    for name, value in zip(("x", "history", "noise"), update[:3], strict=True):
        if value is not None:
            check_tensors("guide", f"preds[0], {name}", (preds[0], value), same_dtype=False)


def superpose_by(
    inner: Callable[[Sequence[Tensor]], Tensor] | None,
    mix: Callable[[Sequence[Tensor], Tensor], Tensor],
    preds: Sequence[Tensor],
    log_density: Tensor,
    step: Scalar,
    *,
    kind: str,
    noise: Tensor | None,
    uncond: Tensor | None,
    scale: Scalar,
    temperature: float,
    bias: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """`superpose`. inner: what gives the Gram matrix, or None for the reference; mix: `combine`."""
    preds = tuple(sequence("superpose", "preds", preds))
    *preds, uncond, noise = widest(*preds, uncond, noise)
    extra = tuple(t for t in (uncond, noise) if t is not None)
    check_tensors("superpose", "preds, uncond, noise", (*preds, *extra))
    B, k = preds[0].shape[0], len(preds)
    if kind not in ("or", "and"):
        raise ValueError(f"superpose: unknown kind {kind!r}; accepted: 'or', 'and'")
    if not isinstance(log_density, Tensor) or (log_density.shape != (B, k) and log_density.shape != (k,)):
        raise ValueError(
            f"superpose: log_density is {describe(log_density)}; accepted: ({B}, {k}) or ({k},)"
        )
    if not isinstance(step, Tensor) and not step > 0:
        raise ValueError(f"superpose: step is {step}; accepted: a number > 0 or ({B},)")
    for name, value in (("step", step), ("scale", scale)):
        check_scalar("superpose", name, value, preds[0])
    if inner is None:
        return reference.superpose(
            preds, log_density, step, kind=kind, noise=noise, uncond=uncond, scale=scale,
            temperature=temperature, bias=bias,
        )  # fmt: skip
    if uncond is None:
        scale = 1.0
    G = inner((*preds, *extra))
    nothing = torch.zeros_like(G[:, :k, 0])
    with_uncond = nothing if uncond is None else G[:, :k, k]
    with_noise = nothing if noise is None else G[:, :k, -1]
    weights, new = reference.superpose_weights(
        G[:, :k, :k], with_uncond, with_noise, log_density, step, kind, scale, temperature, bias
    )
    if uncond is None:
        return mix(preds, weights), new
    w = check_scalar("superpose", "scale", scale, preds[0]).to(weights)[:, None]
    return mix((*preds, uncond), torch.cat([w * weights, 1 - w], 1)), new


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
