"""Guidance on JAX arrays: see pydiffuse.guidance, whose names and arguments these are.

Predictions are arrays [B, ...] of float32, bfloat16 or float16, alike in shape and dtype. A scale, weight
or coefficient is a number, which is compiled in, or an array () or (B,), which may be traced and has a
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from pydiffuse._core.rules import (
    COMMON,
    EMIT_PREDICT,
    EMIT_STATE,
    EMIT_UPDATE,
    MAX_PREDS,
    RULES,
    UPDATE,
    own_values,
)
from pydiffuse.jax import rules as kernels
from pydiffuse.jax.arrays import (
    Scalar,
    columns,
    describe,
    floats,
    is_array,
    samples,
    scalar,
    sequence,
    wide,
)
from pydiffuse.jax.weights import superpose_weights, tcfg_weights

_PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""a, b, h, s, p, q: the value of a rule, with no update."""


def cfg(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """u + w (c - u).  See pydiffuse.cfg."""
    return _value("cfg", (cond, uncond), (scale,), original, rescale)


def tcfg(
    cond: Array | Sequence[Array],
    uncond: Array,
    scale: Scalar | Sequence[Scalar],
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """u_f + w (c - u_f); cond may be a list, and scale then, too.  See pydiffuse.tcfg."""
    if not isinstance(cond, list | tuple):
        return _value("tcfg", (cond, uncond), (scale,), original, rescale)
    m = len(cond)
    given = scale if isinstance(scale, Sequence) else [scale] * m
    if len(given) != m:
        raise ValueError(f"tcfg: scale holds {len(given)} values; accepted: {m}, one per condition")
    if m == 1:
        return _value("tcfg", (*cond, uncond), (given[0],), original, rescale)
    preds = _predictions("tcfg", [*cond, uncond])
    batch = preds[0].shape[0]
    scales = [jnp.broadcast_to(scalar("tcfg", "scale", w, batch), (batch,)) for w in given]
    weights = tcfg_weights(gram(preds), jnp.stack(scales, 1), original)
    values = tuple(weights[:, i] for i in range(m + 1))
    return _value("linear", preds, values, False, rescale, op="tcfg")


def cfg_zero(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """alpha u + w (c - alpha u).  See pydiffuse.cfg_zero."""
    return _value("cfg_zero", (cond, uncond), (scale,), original, rescale)


def magnitude_aware(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    alpha: Scalar = 8.0,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """See pydiffuse.magnitude_aware."""
    return _value("magnitude_aware", (cond, uncond), (scale, alpha), original, rescale)


def apg(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    eta: Scalar = 1.0,
    norm_threshold: Scalar = 0.0,
    momentum: Scalar | None = None,
    state: Array | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Any:
    """See pydiffuse.apg: with momentum, (result, new state)."""
    if state is not None and momentum is None:
        raise ValueError("apg: state was given without momentum; give both, or neither")
    preds = (cond, uncond) if state is None else (cond, uncond, state)
    values = (scale, eta, norm_threshold, 0.0 if momentum is None else momentum)
    emit = EMIT_UPDATE if momentum is None else EMIT_UPDATE | EMIT_STATE
    return _value("apg", preds, values, original, rescale, emit=emit)


def perp_neg(
    cond: Array,
    uncond: Array,
    negatives: Sequence[Array],
    scale: Scalar,
    weights: Sequence[Scalar] | Array,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """See pydiffuse.perp_neg."""
    negatives = sequence("perp_neg", "negatives", negatives, least=0)
    values = (scale, *columns("perp_neg", weights, len(negatives)))
    return _value("perp_neg", (cond, *negatives, uncond), values, original, rescale)


def compose(
    conds: Sequence[Array],
    uncond: Array,
    weights: Sequence[Scalar] | Array,
    *,
    rescale: Scalar = 0.0,
) -> Array:
    """u + sum_i w_i (c_i - u).  See pydiffuse.compose."""
    conds = sequence("compose", "conds", conds)
    values = columns("compose", weights, len(conds))
    return _value("compose", (*conds, uncond), values, False, rescale)


def slerp(a: Array, b: Array, weight: Scalar) -> Array:
    """See pydiffuse.slerp."""
    return _value("slerp", (a, b), (weight,), False, 0.0)


def rescale(guided: Array, cond: Array, factor: Scalar) -> Array:
    """See pydiffuse.rescale."""
    return _value("rescale", (cond, guided), (), False, factor)


def gram(preds: Sequence[Array], *, sums: bool = False) -> Any:
    """G[b,i,j] = <p_i, p_j>, accumulated in float64; with `sums`, also the sums (B, k).

    Results are float64 where JAX has it (jax_enable_x64), else rounded to float32.
    """
    G, totals = kernels.gram(*_predictions("gram", sequence("gram", "preds", preds)))
    return (G, totals) if sums else G


def combine(preds: Sequence[Array], coefficients: Array) -> Array:
    """sum_i c[b,i] p_i, coefficients (B, k) or (k,)."""
    arrays = _predictions("combine", sequence("combine", "preds", preds))
    shape = (arrays[0].shape[0], len(arrays))
    if not is_array(coefficients) or not jnp.issubdtype(coefficients.dtype, jnp.floating):
        raise TypeError(
            f"combine: coefficients is {describe(coefficients)}; accepted: a float array (B, k) or (k,)"
        )
    if coefficients.shape not in (shape, shape[1:]):
        raise ValueError(
            f"combine: coefficients has shape {tuple(coefficients.shape)}; accepted: {shape} or {shape[1:]}"
        )
    matrix = jnp.broadcast_to(jnp.asarray(coefficients).astype(wide()), shape)[:, None]
    return kernels.mix(1, matrix, None, *arrays)[0]


def superpose(
    preds: Sequence[Array],
    log_density: Array,
    step: Scalar,
    *,
    kind: str = "or",
    noise: Array | None = None,
    uncond: Array | None = None,
    scale: Scalar = 1.0,
    temperature: float = 1.0,
    bias: Array | float = 0.0,
) -> tuple[Array, Array]:
    """A mixture of noise predictions by their log-densities l, and the new l (B, k).  See pydiffuse.superpose.

    l is float64 where JAX has it (jax_enable_x64), else float32.
    """
    op = "superpose"
    preds = sequence(op, "preds", preds)
    arrays = _predictions(op, [*preds, *(t for t in (uncond, noise) if t is not None)])
    batch, k = arrays[0].shape[0], len(preds)
    if kind not in ("or", "and"):
        raise ValueError(f"superpose: unknown kind {kind!r}; accepted: 'or', 'and'")
    if not is_array(log_density) or log_density.shape not in ((batch, k), (k,)):
        raise ValueError(
            f"superpose: log_density is {describe(log_density)}; accepted: ({batch}, {k}) or ({k},)"
        )
    if not is_array(step) and not step > 0:
        raise ValueError(f"superpose: step is {step}; accepted: a number > 0 or ({batch},)")
    r = scalar(op, "step", step, batch)
    w = 1.0 if uncond is None else scalar(op, "scale", scale, batch)
    weights, new = superpose_weights(
        gram(arrays), k, uncond is not None, noise is not None, log_density, r, w, kind, temperature, bias
    )
    return combine(arrays[: weights.shape[1]], weights), new


def guide(
    preds: Sequence[Array],
    rule: str,
    *,
    x: Array,
    a: Scalar = 1.0,
    b: Scalar = 1.0,
    history: Array | None = None,
    h: Scalar = 0.0,
    noise: Array | None = None,
    s: Scalar = 0.0,
    predict: tuple[Scalar, Scalar] | None = None,
    original: bool = False,
    rescale: Scalar = 0.0,
    donate_x: bool = False,
    **parameters: Any,
) -> Any:
    """x' = a x + b g + h history + s noise in one pass.  See pydiffuse.guide.

    donate_x: x' is written into x's memory. That saves a copy in a loop (lax.scan) or under jit with x
    donated; where x is still needed XLA copies it first.
    """
    if rule not in RULES:
        raise ValueError(f"guide: unknown rule {rule!r}; accepted: {', '.join(RULES)}")
    preds = sequence("guide", "preds", preds)
    zero = [not is_array(v) and v == 0 for v in (h, s)]
    if (history is None and not zero[0]) or (noise is None and not zero[1]):
        raise ValueError("guide: h needs history and s needs noise; one of them was left out")
    momentum = parameters.get("momentum")
    if rule == "apg" and len(preds) == 3 and momentum is None:
        raise ValueError("guide: preds holds apg's state, but momentum was left out; give both")
    values = own_values(RULES[rule], len(preds), parameters, columns)
    p, q = (0.0, 1.0) if predict is None else predict
    emit = EMIT_UPDATE | (EMIT_PREDICT if predict is not None else 0)
    if rule == "apg" and momentum is not None:
        emit |= EMIT_STATE
    extras, update = (floats("guide", "x", x), history, noise), (a, b, h, s, p, q)
    return _value(rule, preds, values, original, rescale, update, extras, emit, "guide", donate_x)


def _predictions(op: str, preds: Sequence[Any]) -> list[Array]:
    if not 1 <= len(preds) <= MAX_PREDS:
        raise ValueError(f"{op}: {len(preds)} predictions; accepted: 1 to {MAX_PREDS}")
    return samples(op, "the predictions", preds)


def _value(
    rule: str,
    preds: Sequence[Any],
    values: tuple[Any, ...],
    original: bool,
    rescale: Scalar,
    update: tuple[Any, ...] = _PLAIN,
    extras: tuple[Any, ...] = (None, None, None),
    emit: int = EMIT_UPDATE,
    op: str | None = None,
    donate: bool = False,
) -> Any:
    """A rule's value, with the update x' = a x + b g + h history + s noise. extras: x, history, noise."""
    row = RULES[rule]
    op = op or rule
    if len(preds) not in row.counts:
        raise ValueError(f"{op}: {len(preds)} predictions; accepted: ({', '.join(row.preds)})")
    arrays = _predictions(op, preds)
    batch = arrays[0].shape[0]
    given: list[Any] = []
    for name, t in zip(("x", "history", "noise"), extras, strict=True):
        if t is not None:
            _, t = samples(op, f"preds[0], {name}", (arrays[0], floats(op, name, t)), same_dtype=False)
        given.append(t)
    names = (*UPDATE, *COMMON, *row.parameters)
    params: list[float] = []
    varied: dict[int, Array] = {}
    for i, value in enumerate((*update, original, rescale, *values)):
        number = scalar(op, names[i] if i < len(names) else row.weights, value, batch)
        if not isinstance(number, float):
            varied[i], number = number, 0.0
        params.append(number)
    table = jnp.stack(list(varied.values()), 1) if varied else None
    rescaled = params[7] != 0.0 or 7 in varied
    call = kernels.Rule(op, row.code, tuple(params), rescaled, tuple(varied), emit, donate)
    results = kernels.guide(call, table, *given, *arrays)
    return results[0] if len(results) == 1 else results
