"""Guidance: per-sample linear combinations of predictions, decided by their inner products.

Predictions are tensors [B, ...] of float32, bfloat16 or float16, alike in shape, dtype and device.
Every scale, weight or coefficient is a number or a (B,) tensor with a value per sample, and may
require a gradient. Predictions of several dtypes are an error, but under autocast, where they are taken
in the widest of them. `original` starts from the conditional prediction instead of the unconditional
one (diffusers' `use_original_formulation`); `rescale` is the factor of arXiv 2305.08891. `out` is a
tensor to write to (it may be one of the inputs); it takes no part in autograd.

Each function raises ValueError or TypeError before touching memory if an argument does not fit.
The formulas stand in pydiffuse.reference.guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

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
)
from pydiffuse._core.functions import differentiable, may_learn
from pydiffuse._core.rules import EMIT_STATE, EMIT_UPDATE
from pydiffuse.guidance import reference
from pydiffuse.guidance.apply import (
    call_in_two,
    call_rule,
    check_guide,
    directly,
    guide_arguments,
    superpose_by,
    value_of,
)
from pydiffuse.guidance.arguments import Scalar, sequence, weights_of
from pydiffuse.guidance.autograd import run_mix
from pydiffuse.guidance.coefficients import tcfg_of_many


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
    return value_of("cfg", (cond, uncond), (scale,), original, rescale, out)


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
    return value_of("tcfg", (cond, uncond), (scale,), original, rescale, out)  # type: ignore[arg-type]


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
    return value_of("cfg_zero", (cond, uncond), (scale,), original, rescale, out)


@overload
def apg(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, eta: Scalar = ..., norm_threshold: Scalar = ...,
    momentum: None = None, state: None = None, original: bool = ..., rescale: Scalar = ..., out: Tensor | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def apg(
    cond: Tensor, uncond: Tensor, scale: Scalar, *, eta: Scalar = ..., norm_threshold: Scalar = ...,
    momentum: Scalar, state: Tensor | None = ..., original: bool = ..., rescale: Scalar = ...,
    out: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    return value_of("apg", preds, values, original, rescale, out, emit)


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
    return value_of("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale, out)


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
    negatives = sequence("perp_neg", "negatives", negatives, least=0)
    values = (scale, *weights_of("perp_neg", weights, len(negatives)))
    return value_of("perp_neg", (cond, *negatives, uncond), values, original, rescale, out)


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
    conds = sequence("compose", "conds", conds)
    values = weights_of("compose", weights, len(conds))
    return value_of("compose", (*conds, uncond), values, False, rescale, out)


def slerp(a: Tensor, b: Tensor, weight: Scalar, *, out: Tensor | None = None) -> Tensor:
    """Spherical interpolation per sample, from a (weight 0) to b (weight 1).

    A straight line where the two are collinear or one is zero. Extrapolates outside [0, 1].
    a, b: [B, ...]. weight: a number or (B,). Returns [B, ...] in their dtype.
    """
    return value_of("slerp", (a, b), (weight,), False, 0.0, out)


def rescale(guided: Tensor, cond: Tensor, factor: Scalar, *, out: Tensor | None = None) -> Tensor:
    """Guidance rescale (arXiv 2305.08891): factor std(c)/std(g) g + (1 - factor) g, per sample.

    guided, cond: [B, ...]. factor: a number or (B,). Returns [B, ...]; guided where it is constant.
    """
    return value_of("rescale", (cond, guided), (), False, factor, out)


@overload
def gram(preds: Sequence[Tensor], *, sums: Literal[False] = False) -> Tensor: ...
@overload
def gram(preds: Sequence[Tensor], *, sums: Literal[True]) -> tuple[Tensor, Tensor]: ...


def gram(preds: Sequence[Tensor], *, sums: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The Gram matrix of each sample: G[b,i,j] = <p_i, p_j>, accumulated in float64.

    With `combine` it makes new rules a few lines of Python, differentiable to any order.
    preds: 1 to 16 tensors [B, ...]. Returns (B, k, k) float64; with `sums`, also the sum of each
    prediction, (B, k) float64.
    """
    preds = tuple(sequence("gram", "preds", preds))
    spread = dispatch.over_ranks(*preds)
    if spread:
        return spread.gram(preds, sums)
    preds = widest(*preds)
    check_tensors("gram", "preds", preds)
    if dispatch.forced_reference():
        return reference.gram(preds, sums=sums)
    G, totals = differentiable("guidance.Gram", "gram", *preds)
    return (G, totals) if sums else G


def combine(preds: Sequence[Tensor], coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
    """sum_i c[b,i] p_i, rounded once.

    preds: k <= 16 tensors [B, ...]. coefficients: (B, k) or (k,), any float dtype. Returns [B, ...].
    """
    preds = tuple(sequence("combine", "preds", preds))
    spread = dispatch.over_ranks(*preds)
    if spread:
        return spread.combine(preds, coefficients, out)
    preds = widest(*preds)
    check_tensors("combine", "preds", preds)
    B, k = preds[0].shape[0], len(preds)
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise TypeError(
            f"combine: coefficients is {describe(coefficients)}; accepted: a float tensor (B, k) or (k,)"
        )
    if (coefficients.shape != (B, k) and coefficients.shape != (k,)) or coefficients.device != preds[
        0
    ].device:
        raise ValueError(
            f"combine: coefficients has shape {tuple(coefficients.shape)} on {coefficients.device};"
            f" accepted: ({B}, {k}) or ({k},) on {preds[0].device}"
        )
    if dispatch.forced_reference():
        return reference.combine(preds, coefficients, out=out)
    matrix = coefficients.double().expand(B, k)[:, None].contiguous()
    if out is not None:
        check_outs("combine", [out], [preds[0]], preds)
        check_no_grad("combine", (*preds, coefficients), [out])
        with writable([out]) as targets:
            run_mix("combine", targets, preds, matrix, None)
        return out
    return differentiable("guidance.Mix", "combine", 1, matrix, None, *preds)[0]


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
    spread = dispatch.over_ranks(*preds)
    if spread:
        return spread.superpose(
            preds, log_density, step, kind=kind, noise=noise, uncond=uncond, scale=scale,
            temperature=temperature, bias=bias,
        )  # fmt: skip
    inner = None if dispatch.forced_reference() else gram
    return superpose_by(
        inner, combine, preds, log_density, step, kind=kind, noise=noise, uncond=uncond, scale=scale,
        temperature=temperature, bias=bias,
    )  # fmt: skip


@overload
def guide(
    preds: Sequence[Tensor], rule: Literal["apg"], *, x: Tensor, a: Scalar = ..., b: Scalar = ...,
    history: Tensor | None = ..., h: Scalar = ..., noise: Tensor | None = ..., s: Scalar = ...,
    predict: tuple[Scalar, Scalar] | None = ..., original: bool = ..., rescale: Scalar = ..., out: Any = ...,
    **parameters: Any,
) -> Any: ...  # fmt: skip
@overload
def guide(
    preds: Sequence[Tensor], rule: str, *, x: Tensor, a: Scalar = ..., b: Scalar = ...,
    history: Tensor | None = ..., h: Scalar = ..., noise: Tensor | None = ..., s: Scalar = ..., predict: None = None,
    original: bool = ..., rescale: Scalar = ..., out: Tensor | None = ..., **parameters: Any,
) -> Tensor: ...  # fmt: skip
@overload
def guide(
    preds: Sequence[Tensor], rule: str, *, x: Tensor, a: Scalar = ..., b: Scalar = ...,
    history: Tensor | None = ..., h: Scalar = ..., noise: Tensor | None = ..., s: Scalar = ...,
    predict: tuple[Scalar, Scalar], original: bool = ..., rescale: Scalar = ...,
    out: tuple[Tensor, Tensor] | None = ..., **parameters: Any,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    preds = tuple(sequence("guide", "preds", preds))
    update, row, values, emit = guide_arguments(
        preds, rule, x, (a, b, h, s), history, noise, predict, parameters
    )
    found = directly("guide", row, preds, update, values, original, rescale, out, emit)
    if found is not None:
        return found
    spread = dispatch.over_ranks(*preds, x)
    if spread:
        return spread.guide(
            preds, rule, x=x, a=a, b=b, history=history, h=h, noise=noise, s=s, predict=predict,
            original=original, rescale=rescale, out=out, **parameters,
        )  # fmt: skip
    preds = widest(*preds)
    check_guide(preds, update)
    if dispatch.forced_reference():
        common = {"original": original, "rescale": rescale} if row.common else {}
        if rule == "rescale":
            common = {"rescale": rescale}
        return reference.guide(
            preds, rule, x=x, a=a, b=b, history=history, h=h, noise=noise, s=s, predict=predict, out=out,
            **common, **parameters,
        )  # fmt: skip
    tensors = [c for c in update.numbers if isinstance(c, Tensor)]
    learned = tensors and (may_learn() or any(t.requires_grad for t in tensors))
    if learned and out is None and torch.is_grad_enabled():
        return call_in_two(row, preds, values, original, rescale, update, emit)
    return call_rule("guide", row, preds, update, values, original, rescale, out, emit)


def _tcfg_of_many(
    conds: list[Tensor],
    uncond: Tensor,
    scale: Scalar | Sequence[Scalar],
    original: bool,
    rescale: Scalar,
    out: Tensor | None,
) -> Tensor:
    """From the Gram matrix's top projector P: u_f = sum_j P[u,j] p_j."""
    preds = (*sequence("tcfg", "cond", conds), uncond)
    spread = dispatch.over_ranks(*preds)
    if spread:
        return spread.tcfg(conds, uncond, scale, original, rescale, out)
    *conds, uncond = preds = widest(*preds)
    check_tensors("tcfg", "cond, uncond", preds)
    m = len(conds)
    scales = weights_of("tcfg", scale if isinstance(scale, Sequence) else [scale] * m, m)
    if dispatch.forced_reference():
        return reference.tcfg(conds, uncond, scales, original=original, rescale=rescale, out=out)
    if m == 1:
        return tcfg(conds[0], uncond, scales[0], original=original, rescale=rescale, out=out)
    w = torch.stack(
        [check_scalar("tcfg", f"scale[{i}]", v, uncond).double() for i, v in enumerate(scales)], 1
    )
    weights = tcfg_of_many(gram(preds), w, original)
    return value_of("linear", preds, tuple(weights.unbind(1)), False, rescale, out, name="tcfg")
