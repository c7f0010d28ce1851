"""Guidance: per-sample linear combinations of predictions, decided by their inner products.

Predictions are tensors [B, ...] of float32, bfloat16 or float16, alike in shape, dtype and device.
Every scale, weight or coefficient is a number or a (B,) tensor with a value per sample, and may
require a gradient. `original` starts from the conditional prediction instead of the unconditional
one (diffusers' `use_original_formulation`); `rescale` is the factor of arXiv 2305.08891. `out` is a
tensor to write to (it may be one of the inputs); it takes no part in autograd.

Each function raises ValueError or TypeError before touching memory if an argument does not fit.
The formulas stand in pydiffuse.reference.guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pydiffuse import _ops
from pydiffuse.autograd.guidance import (
    EMIT_PREDICT,
    EMIT_STATE,
    EMIT_UPDATE,
    Call,
    Gram,
    Guide,
    Mix,
    needs_function,
    outputs,
    run_guide,
    run_mix,
)
from pydiffuse.checks import (
    check_no_grad,
    check_out,
    check_scalar,
    check_tensors,
    describe,
    writable,
)
from pydiffuse.reference import guidance as reference
from pydiffuse.rules import COMMON, MAX_PREDS, RULES, UPDATE, Rule

Scalar = float | Tensor
_NUMBERS = {float, int, bool}
_PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # a, b, h, s, p, q of a call without an update


def cfg(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): u + w (c - u).

    cond, uncond: [B, ...]. scale: w, a number or (B,). Returns [B, ...] in their dtype.
    """
    return _value("cfg", (cond, uncond), (scale,), original, rescale, out)


def tcfg(
    cond: Tensor | Sequence[Tensor],
    uncond: Tensor,
    scale: Scalar | Sequence[Scalar],
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Tangential damping guidance (TCFG, arXiv 2503.18137): u_f + w (c - u_f).

    u_f is u's part along the top right singular vector of [c; u], in closed form from three inner
    products: no SVD. Where no direction is the top one (orthogonal, of equal norm; or both zero)
    u_f = u/2.

    cond, uncond: [B, ...]. scale: w, a number or (B,). Returns [B, ...] in their dtype.
    cond may be a list of m conditions: then u_f comes from all m + 1 predictions, scale may be a list
    of m, and the result is u_f + sum_i w_i (c_i - u_f).
    """
    if not isinstance(cond, Tensor):
        return _tcfg_of_many(list(cond), uncond, scale, original, rescale, out)
    if isinstance(scale, list | tuple):
        raise TypeError(
            "tcfg: scale is a list, cond a tensor; accepted: a list of conditions, or one scale"
        )
    return _value("tcfg", (cond, uncond), (scale,), original, rescale, out)  # type: ignore[arg-type]


def cfg_zero(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): u' + w (c - u'), u' = alpha u, alpha = <c,u>/(<u,u> + 1e-8).

    The zero initialisation of the first steps is the sampler's: it needs no prediction.
    cond, uncond: [B, ...]. scale: w, a number or (B,). Returns [B, ...] in their dtype.
    """
    return _value("cfg_zero", (cond, uncond), (scale,), original, rescale, out)


def apg(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    eta: Scalar = 1.0,
    norm_threshold: Scalar = 0.0,
    momentum: Scalar | None = None,
    state: Tensor | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Any = None,
) -> Any:
    """Adaptive projected guidance (arXiv 2410.02416): u + w (d_orth + eta d_par).

    d = c - u + momentum * state, cut to the norm `norm_threshold` where that is positive; d_par is
    its part along c, d_orth the rest.

    cond, uncond: [B, ...]. scale, eta, norm_threshold, momentum: a number or (B,).
    Returns [B, ...]; with `momentum`, (result, new state): pass the state to the next step (None at
    the first). `out` is then a pair too.
    """
    preds = (cond, uncond) if state is None else (cond, uncond, state)
    if state is not None and momentum is None:
        raise ValueError("apg: state was given without momentum; give both, or neither")
    values = (scale, eta, norm_threshold, 0.0 if momentum is None else momentum)
    emit = EMIT_UPDATE if momentum is None else EMIT_UPDATE | EMIT_STATE
    return _value("apg", preds, values, original, rescale, out, emit)


def magnitude_aware(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    alpha: Scalar = 8.0,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Magnitude-aware guidance (MAMBO-G): the scale shrinks where c - u is large beside u.

    w' = 1 + (w - 1) exp(-alpha ||c - u|| / ||u||), or w exp(..) if `original`.
    cond, uncond: [B, ...]. scale, alpha: a number or (B,). Returns [B, ...] in their dtype.
    """
    return _value("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale, out)


def perp_neg(
    cond: Tensor,
    uncond: Tensor,
    negatives: Sequence[Tensor],
    scale: Scalar,
    weights: Sequence[Scalar] | Tensor,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Perp-Neg (arXiv 2304.04968): negative prompts pushed away from, across the positive direction.

    u + w (e - sum_i v_i perp(n_i - u, e)), e = c - u; perp takes out the part along e.
    cond, uncond, each of the m negatives: [B, ...]. scale: w, a number or (B,). weights: v, m numbers
    or (B,) tensors, or one (B, m) tensor. Returns [B, ...] in their dtype.
    """
    negatives = _sequence("perp_neg", "negatives", negatives, least=0)
    values = (scale, *_weights("perp_neg", weights, len(negatives)))
    return _value("perp_neg", (cond, *negatives, uncond), values, original, rescale, out)


def compose(
    conds: Sequence[Tensor],
    uncond: Tensor,
    weights: Sequence[Scalar] | Tensor,
    *,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Composable Diffusion (arXiv 2206.01714): u + sum_i w_i (c_i - u); a negative weight is NOT.

    Each of the m conds, uncond: [B, ...]. weights: m numbers or (B,) tensors, or one (B, m) tensor.
    `rescale` keeps the spread of the first condition. Returns [B, ...] in their dtype.
    """
    conds = _sequence("compose", "conds", conds)
    values = _weights("compose", weights, len(conds))
    return _value("compose", (*conds, uncond), values, False, rescale, out)


def slerp(a: Tensor, b: Tensor, weight: Scalar, *, out: Tensor | None = None) -> Tensor:
    """Spherical interpolation per sample, from a (weight 0) to b (weight 1).

    A straight line where the two are collinear or one is zero. Extrapolates outside [0, 1].
    a, b: [B, ...]. weight: a number or (B,). Returns [B, ...] in their dtype.
    """
    return _value("slerp", (a, b), (weight,), False, 0.0, out)


def rescale(guided: Tensor, cond: Tensor, factor: Scalar, *, out: Tensor | None = None) -> Tensor:
    """Guidance rescale (arXiv 2305.08891): factor std(c)/std(g) g + (1 - factor) g, per sample.

    guided, cond: [B, ...]. factor: a number or (B,). Returns [B, ...]; guided where it is constant.
    """
    return _value("rescale", (cond, guided), (), False, factor, out)


def gram(preds: Sequence[Tensor], *, sums: bool = False) -> Any:
    """The Gram matrix of each sample: G[b,i,j] = <p_i, p_j>, accumulated in float64.

    With `combine` it makes new rules a few lines of Python, differentiable to any order.
    preds: 1 to 16 tensors [B, ...]. Returns (B, k, k) float64; with `sums`, also the sum of each
    prediction, (B, k) float64.
    """
    preds = tuple(_sequence("gram", "preds", preds))
    check_tensors("gram", "preds", preds)
    if _ops.forced_reference():
        return reference.gram(preds, sums=sums)
    G, totals = Gram.apply("gram", *preds)
    return (G, totals) if sums else G


def combine(preds: Sequence[Tensor], coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
    """sum_i c[b,i] p_i, rounded once.

    preds: k <= 16 tensors [B, ...]. coefficients: (B, k) or (k,), any float dtype. Returns [B, ...].
    """
    preds = tuple(_sequence("combine", "preds", preds))
    check_tensors("combine", "preds", preds)
    B, k = len(preds[0]), len(preds)
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise TypeError(
            f"combine: coefficients is {describe(coefficients)}; accepted: a float tensor (B, k) or (k,)"
        )
    if coefficients.shape not in ((B, k), (k,)) or coefficients.device != preds[0].device:
        raise ValueError(
            f"combine: coefficients has shape {tuple(coefficients.shape)} on {coefficients.device};"
            f" accepted: ({B}, {k}) or ({k},) on {preds[0].device}"
        )
    check_out("combine", out, preds[0], preds)
    if _ops.forced_reference():
        return reference.combine(preds, coefficients, out=out)
    matrix = coefficients.double().expand(B, k)[:, None].contiguous()
    if out is not None:
        check_no_grad("combine", (*preds, coefficients))
        with writable([out]) as targets:
            run_mix("combine", targets, preds, matrix, None)
        return out
    return Mix.apply("combine", 1, matrix, None, *preds)[0]


def superpose(
    preds: Sequence[Tensor],
    log_density: Tensor,
    step: Scalar,
    *,
    kind: str = "or",
    noise: Tensor | None = None,
    uncond: Tensor | None = None,
    scale: Scalar = 1.0,
    temperature: float = 1.0,
    bias: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """SuperDiff (arXiv 2412.17762): a mixture of noise predictions, weighed by their log-densities.

    kind "or" follows whichever model finds the sample likely (softmax of temperature * l + bias);
    "and" keeps all of them equally likely. Each step's change of l comes from Ito's estimator, from
    the same inner products; l is known up to a constant common to the models.

    preds: k noise predictions [B, ...]. log_density: l, (B, k) or (k,), zeros at the start. step: the
    variance of this reverse step in units of sigma^2, a number > 0 or (B,). noise: the standard
    normal noise that the sampler adds in this step, if any. uncond, scale: guidance around the
    mixture. Returns the mixture [B, ...] and the new l (B, k) float64.
    """
    preds = tuple(_sequence("superpose", "preds", preds))
    extra = tuple(t for t in (uncond, noise) if t is not None)
    check_tensors("superpose", "preds, uncond, noise", (*preds, *extra))
    B, k = len(preds[0]), len(preds)
    if kind not in ("or", "and"):
        raise ValueError(f"superpose: unknown kind {kind!r}; accepted: 'or', 'and'")
    if not isinstance(log_density, Tensor) or log_density.shape not in ((B, k), (k,)):
        raise ValueError(
            f"superpose: log_density is {describe(log_density)}; accepted: ({B}, {k}) or ({k},)"
        )
    if not isinstance(step, Tensor) and not step > 0:
        raise ValueError(f"superpose: step is {step}; accepted: a number > 0 or ({B},)")
    for name, value in (("step", step), ("scale", scale)):
        check_scalar("superpose", name, value, preds[0])
    if _ops.forced_reference():
        return reference.superpose(
            preds, log_density, step, kind=kind, noise=noise, uncond=uncond, scale=scale,
            temperature=temperature, bias=bias,
        )  # fmt: skip
    if uncond is None:
        scale = 1.0
    G = gram((*preds, *extra))
    nothing = torch.zeros_like(G[:, :k, 0])
    with_uncond = nothing if uncond is None else G[:, :k, k]
    with_noise = nothing if noise is None else G[:, :k, -1]
    weights, new = reference.superpose_weights(
        G[:, :k, :k], with_uncond, with_noise, log_density, step, kind, scale, temperature, bias
    )
    if uncond is None:
        return combine(preds, weights), new
    w = torch.as_tensor(scale, dtype=weights.dtype, device=weights.device).expand(B)[:, None]
    return combine((*preds, uncond), torch.cat([w * weights, 1 - w], 1)), new


def guide(
    preds: Sequence[Tensor],
    rule: str,
    *,
    x: Tensor,
    a: Scalar = 1.0,
    b: Scalar = 1.0,
    history: Tensor | None = None,
    h: Scalar = 0.0,
    noise: Tensor | None = None,
    s: Scalar = 0.0,
    predict: tuple[Scalar, Scalar] | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Any = None,
    **parameters: Any,
) -> Any:
    """A guidance rule and the sampler's update in one pass: x' = a x + b g + h history + s noise.

    Euler on a flow is a=1, b=dt. DDIM is a = alpha'/alpha, b = sigma' - sigma alpha'/alpha for noise
    predictions. DPM-Solver++ 2M is a = sigma'/sigma, x and history weighing the data predictions, and
    predict=(p, q), which returns this step's data prediction D = p x + q g as the next history.

    preds: the rule's predictions [B, ...] in the order of its function, the unconditional one last
    (apg: cond, uncond, and its state from the second step on). rule: "linear" (weights=), "cfg",
    "tcfg", "cfg_zero", "apg", "magnitude_aware", "perp_neg", "compose", "slerp", "rescale" (cond,
    guided, rescale=). parameters: what that rule's function takes, by name. x, history, noise: [B, ...]
    of any accepted dtype. a, b, h, s, p, q: a number or (B,). out: a tensor, or one for each result.

    Returns x' in x's dtype; with `predict`, (x', D); apg with momentum adds its new state.
    """
    preds = tuple(_sequence("guide", "preds", preds))
    row = RULES.get(rule)
    if row is None:
        raise ValueError(f"guide: unknown rule {rule!r}; accepted: {', '.join(RULES)}")
    check_tensors("guide", "preds", preds)
    for name, value in (("x", x), ("history", history), ("noise", noise)):
        if value is not None:
            check_tensors("guide", f"preds[0], {name}", (preds[0], value), same_dtype=False)
    if len(preds) not in row.counts:
        raise ValueError(
            f"guide: preds holds {len(preds)} tensors; rule {rule!r} accepts ({', '.join(row.preds)})"
        )
    if (history is None and not _is_zero(h)) or (noise is None and not _is_zero(s)):
        raise ValueError("guide: h needs history and s needs noise; one of them was left out")
    momentum = parameters.get("momentum")
    if rule == "apg" and len(preds) == 3 and momentum is None:
        raise ValueError("guide: preds holds apg's state, but momentum was left out; give both")
    if _ops.forced_reference():
        common = {"original": original, "rescale": rescale} if row.common else {}
        if rule == "rescale":
            common = {"rescale": rescale}
        return reference.guide(
            preds, rule, x=x, a=a, b=b, history=history, h=h, noise=noise, s=s, predict=predict, out=out,
            **common, **parameters,
        )  # fmt: skip
    emit = EMIT_UPDATE
    if predict is not None:
        emit |= EMIT_PREDICT
    if rule == "apg" and momentum is not None:
        emit |= EMIT_STATE
    p, q = (0.0, 1.0) if predict is None else predict
    update = (a, b, h, s, p, q)
    values = own_values(row, len(preds), parameters)
    if any(isinstance(c, Tensor) and c.requires_grad for c in update) and torch.is_grad_enabled():
        return _guide_in_two(row, preds, values, original, rescale, x, history, noise, update, emit)
    return _call("guide", row, preds, update, values, original, rescale, out, emit, x, history, noise)


def _guide_in_two(
    row: Rule,
    preds: tuple[Tensor, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    x: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    update: tuple[Scalar, ...],
    emit: int,
) -> Any:
    """The rule, then the update: for coefficients of the update that want a gradient."""
    g = _call("guide", row, preds, _PLAIN, values, original, rescale, None, emit & ~EMIT_PREDICT)
    g, state = g if isinstance(g, tuple) else (g, None)
    a, b, h, s, p, q = update
    terms = [(x, a, p), (g, b, q), (history, h, 0.0), (noise, s, 0.0)]
    there = [term for term in terms if term[0] is not None]

    def coefficients(column: int) -> Tensor:
        cs = [torch.as_tensor(t[column], dtype=torch.float64, device=x.device) for t in there]
        return torch.stack([c.expand(len(x)) for c in cs], 1)

    matrix = torch.stack([coefficients(1), coefficients(2)][: 2 if emit & EMIT_PREDICT else 1], 1)
    results = list(Mix.apply("guide", matrix.shape[1], matrix, None, *[t[0] for t in there]))
    if state is not None:
        results.append(state)
    return results[0] if len(results) == 1 else tuple(results)


def _tcfg_of_many(
    conds: list[Tensor],
    uncond: Tensor,
    scale: Scalar | Sequence[Scalar],
    original: bool,
    rescale: Scalar,
    out: Tensor | None,
) -> Tensor:
    """From the Gram matrix's top projector P: u_f = sum_j P[u,j] p_j."""
    preds = (*_sequence("tcfg", "cond", conds), uncond)
    check_tensors("tcfg", "cond, uncond", preds)
    m, B = len(conds), len(uncond)
    scales = _weights("tcfg", scale if isinstance(scale, Sequence) else [scale] * m, m)
    if _ops.forced_reference():
        return reference.tcfg(conds, uncond, scales, original=original, rescale=rescale, out=out)
    if m == 1:
        return tcfg(conds[0], uncond, scales[0], original=original, rescale=rescale, out=out)
    w = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=uncond.device).expand(B) for v in scales], 1
    )
    u = reference.top_projector(gram(preds))[:, -1]  # (B, m + 1)
    total = w.sum(1, keepdim=True)
    weights = torch.cat([w, torch.zeros_like(total)], 1) - total * u
    if original:
        weights = weights + torch.eye(m + 1, dtype=w.dtype, device=w.device)[0]
    else:
        weights = weights + u
    return _value("linear", preds, tuple(weights.unbind(1)), False, rescale, out, name="tcfg")


def _value(
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
    check_tensors(name, "the predictions", preds)
    if len(preds) not in row.counts:
        raise ValueError(f"{name}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    if _ops.forced_reference():
        return _reference(row, preds, values, original, rescale, out, emit)
    return _call(name, row, preds, _PLAIN, values, original, rescale, out, emit)


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


def _call(
    op: str,
    row: Rule,
    preds: tuple[Tensor, ...],
    update: tuple[Scalar, ...],
    values: tuple[Scalar, ...],
    original: bool,
    rescale: Scalar,
    out: Any,
    emit: int,
    x: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> Any:
    given = (*update, original, rescale, *values)
    tensors: list[Tensor] = []
    columns: tuple[int, ...] = ()
    varied = None
    if _NUMBERS.issuperset(map(type, given)):
        params = tuple(map(float, given))
    else:
        columns = tuple(i for i, value in enumerate(given) if isinstance(value, Tensor))
        tensors = [check_scalar(op, _parameter_name(row, i), given[i], preds[0]) for i in columns]
        varied = torch.stack([t.double() for t in tensors], 1) if tensors else None
        params = tuple(
            0.0 if i in columns else _number(op, row, i, value) for i, value in enumerate(given)
        )
    call = Call(op, row.code, params, params[7] != 0.0 or 7 in columns, columns, emit)
    if out is None:
        if needs_function(varied, x, history, noise, *preds):
            results = Guide.apply(call, varied, x, history, noise, *preds)
            return results[0] if len(results) == 1 else results
        results = outputs(call, preds, x)
        run_guide(call, results, preds, x, history, noise, varied)
        return results[0] if len(results) == 1 else tuple(results)
    outs = [out] if isinstance(out, Tensor) else list(out)
    everything = (*preds, *(t for t in (x, history, noise) if t is not None))
    likes = [preds[0] if x is None else x] * emit.bit_count()
    if emit & EMIT_STATE:
        likes[-1] = preds[0]
    if len(outs) != len(likes):
        raise ValueError(f"{op}: out holds {len(outs)} tensors; accepted: {len(likes)}")
    for i, (o, like) in enumerate(zip(outs, likes, strict=True)):
        check_out(op, o, like, everything, "out" if isinstance(out, Tensor) else f"out[{i}]")
        if any(o is other for other in outs[:i]):
            raise ValueError(f"{op}: out[{i}] is given twice; give each result its own tensor")
    check_no_grad(op, (*everything, *tensors))
    with writable(outs) as targets:
        run_guide(call, targets, preds, x, history, noise, varied)
    return out


def _parameter_name(row: Rule, i: int) -> str:
    """The name of the i-th parameter of a call, for messages."""
    names = (*UPDATE, *COMMON, *row.parameters)
    return names[i] if i < len(names) else f"{row.weights}[{i - len(names)}]"


def _number(op: str, row: Rule, i: int, value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(
            f"{op}: {_parameter_name(row, i)} is {describe(value)}; accepted: a number or a (B,) tensor"
        )
    return float(value)


def _sequence(op: str, argument: str, value: Any, least: int = 1) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a list of tensors [B, ...]")
    if not least <= len(value) <= MAX_PREDS:
        raise ValueError(f"{op}: {argument} holds {len(value)} tensors; accepted: {least} to {MAX_PREDS}")
    return list(value)


def _weights(op: str, weights: Any, count: int) -> tuple[Scalar, ...]:
    """One weight for each of `count` predictions, from a sequence or the columns of (B, count)."""
    if isinstance(weights, Tensor) and weights.dim() == 2:
        weights = weights.unbind(1)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(weights) != count:
        given = f"{len(weights)} values" if isinstance(weights, Sequence) else describe(weights)
        raise ValueError(
            f"{op}: weights is {given}; accepted: {count} numbers or (B,) tensors, or (B, {count})"
        )
    return tuple(weights)


def own_values(row: Rule, preds: int, parameters: dict[str, Any]) -> tuple[Scalar, ...]:
    """A rule's own parameters in the kernels' order, from keywords."""
    defaults = dict(row.defaults)
    accepted = [*row.parameters, *([row.weights] if row.weights else [])]
    for name in parameters:
        if name not in accepted:
            raise TypeError(f"guide: rule {row.name!r} takes no {name!r}; accepted: {accepted}")
    values: list[Scalar] = []
    for name in row.parameters:
        value = parameters.get(name, defaults.get(name))
        if value is None and name == "momentum":
            value = 0.0
        if value is None:
            raise TypeError(f"guide: rule {row.name!r} needs {name}=; accepted: {accepted}")
        values.append(value)
    if row.weights:
        if row.weights not in parameters:
            raise TypeError(f"guide: rule {row.name!r} needs {row.weights}=; accepted: {accepted}")
        count = preds - sum(not name.endswith("...") for name in row.preds)
        values += _weights("guide", parameters[row.weights], count)
    return tuple(values)


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
