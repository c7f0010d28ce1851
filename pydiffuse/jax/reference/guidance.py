"""The guidance ops in jax.numpy, from their papers' formulas: see pydiffuse.reference.guidance.

Predictions are [B, ...]; <a, b> is the inner product over everything but the batch, per sample. Computed in
float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from pydiffuse._core.rules import RULES
from pydiffuse.jax.weights import superpose_weights, tcfg_weights

Scalar: TypeAlias = "float | Array"


def _up(t: Array) -> Array:
    return jnp.asarray(t).astype(jnp.promote_types(t.dtype, jnp.float32))


def _rows(value: Scalar, like: Array) -> Any:
    """A value per sample, shaped to multiply [B, ...]."""
    if not hasattr(value, "shape"):
        return value
    column = jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape[:1])
    return column.reshape(-1, *[1] * (like.ndim - 1))


def _dot(a: Array, b: Array) -> Array:
    """<a, b> per sample, as [B, 1, ..., 1]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdims=True)


def _ratio(a: Array, b: Array, otherwise: float) -> Array:
    zero = b == 0
    return jnp.where(zero, otherwise, a / jnp.where(zero, 1, b))


def _norm(squared: Array) -> Array:
    """The root of a squared norm, with slope 0 at 0."""
    zero = squared <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def _spread(guided: Array, cond: Array, factor: Scalar) -> Array:
    """factor std(c)/std(g) g + (1 - factor) g; unchanged where g is constant.  arXiv 2305.08891, eq. 15-16."""
    if not hasattr(factor, "shape") and factor == 0:
        return guided

    def var(t: Array) -> Array:
        n = max(t[:1].size, 1)
        centred = t - t.sum(tuple(range(1, t.ndim)), keepdims=True) / n
        spread = _dot(centred, centred)
        return jnp.where(spread <= 1e-13 * _dot(t, t), 0, spread)

    var_g = var(guided)
    ratio = jnp.where(var_g == 0, 1, _norm(_ratio(var(cond), var_g, 1.0)))
    return guided + _rows(factor, guided) * (ratio - 1) * guided


def _guided(c: Array, u: Array, shift: Array, original: bool, rescale: Scalar, dtype: Any) -> Array:
    return _spread((c if original else u) + shift, c, rescale).astype(dtype)


def gram(preds: Sequence[Array], *, sums: bool = False) -> Any:
    """G[b,i,j] = <p_i, p_j>; with `sums`, also the sum of each p_i."""
    p = [_up(t).reshape(t.shape[0], -1) if t.size else jnp.zeros((t.shape[0], 1)) for t in preds]
    G = jnp.stack([jnp.stack([(a * b).sum(1) for b in p], 1) for a in p], 1)
    return (G, jnp.stack([a.sum(1) for a in p], 1)) if sums else G


def combine(preds: Sequence[Array], coefficients: Array) -> Array:
    """sum_i c[b,i] p_i."""
    c = jnp.broadcast_to(coefficients, (preds[0].shape[0], len(preds)))
    terms = [_rows(c[:, i], _up(p)) * _up(p) for i, p in enumerate(preds)]
    return sum(terms[1:], terms[0]).astype(preds[0].dtype)


def cfg(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """u + w (c - u), or c + w (c - u) if `original`.  arXiv 2207.12598."""
    c, u = _up(cond), _up(uncond)
    return _guided(c, u, _rows(scale, c) * (c - u), original, rescale, cond.dtype)


def tcfg(cond: Any, uncond: Array, scale: Any, *, original: bool = False, rescale: Scalar = 0.0) -> Array:
    """Classifier-free guidance from u's part along the top right singular vector of [c; u].  arXiv 2503.18137.

    u_f = (cu/D) c + 1/2 (1 + (uu - cc)/D) u,  D = hypot(cc - uu, 2 cu);  u/2 where D = 0.
    """
    if isinstance(cond, list | tuple):
        return _tcfg_of_many(cond, uncond, scale, original, rescale)
    c, u = _up(cond), _up(uncond)
    cc, cu, uu = _dot(c, c), _dot(c, u), _dot(u, u)
    tie = (cc == uu) & (cu == 0)
    D = jnp.hypot(jnp.where(tie, 1, cc - uu), 2 * cu)
    u = jnp.where(tie, 0, cu / D) * c + jnp.where(tie, 0.5, (1 + (uu - cc) / D) / 2) * u
    return _guided(c, u, _rows(scale, c) * (c - u), original, rescale, cond.dtype)


def _tcfg_of_many(
    conds: Sequence[Array], uncond: Array, scale: Any, original: bool, rescale: Scalar
) -> Array:
    preds = [*map(_up, conds), _up(uncond)]
    scales = scale if isinstance(scale, list | tuple) else [scale] * len(conds)
    columns = [jnp.broadcast_to(jnp.asarray(w, jnp.float32), preds[0].shape[:1]) for w in scales]
    weights = tcfg_weights(gram(preds), jnp.stack(columns, 1), original)
    return _spread(combine(preds, weights), preds[0], rescale).astype(uncond.dtype)


def cfg_zero(
    cond: Array, uncond: Array, scale: Scalar, *, original: bool = False, rescale: Scalar = 0.0
) -> Array:
    """u' + w (c - u'), u' = alpha u, alpha = <c,u>/(<u,u> + 1e-8).  arXiv 2503.18886."""
    c, u = _up(cond), _up(uncond)
    u = _dot(c, u) / (_dot(u, u) + 1e-8) * u
    return _guided(c, u, _rows(scale, c) * (c - u), original, rescale, cond.dtype)


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
    """u + w (d_orth + eta d_par), d = c - u + momentum state, cut to `norm_threshold`.  arXiv 2410.02416."""
    c, u = _up(cond), _up(uncond)
    d = new_state = c - u
    if momentum is not None and state is not None:
        d = new_state = d + _rows(momentum, c) * _up(state)
    threshold = jnp.asarray(_rows(norm_threshold, c))
    norm = _norm(_dot(d, d))
    keep = (threshold <= 0) | (norm <= threshold)
    d = d * jnp.where(keep, 1, threshold / jnp.where(keep, 1, norm))
    parallel = _ratio(_dot(d, c), _dot(c, c), 0.0) * c
    shift = _rows(scale, c) * (d - (1 - _rows(eta, c)) * parallel)
    g = _guided(c, u, shift, original, rescale, cond.dtype)
    return g if momentum is None else (g, new_state.astype(cond.dtype))


def magnitude_aware(
    cond: Array,
    uncond: Array,
    scale: Scalar,
    *,
    alpha: Scalar = 8.0,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """w' = 1 + (w - 1) e^{-alpha r}, r = ||c - u|| / ||u||; w' = w e^{-alpha r} if `original`.  MAMBO-G."""
    c, u = _up(cond), _up(uncond)
    dd, uu = _dot(c - u, c - u), _dot(u, u)
    alpha = jnp.asarray(_rows(alpha, c))
    decay = jnp.exp(-alpha * _norm(_ratio(dd, uu, 0.0)))
    decay = jnp.where((uu == 0) & (dd > 0), (alpha <= 0).astype(c.dtype), decay)
    w = _rows(scale, c)
    w = w * decay if original else 1 + (w - 1) * decay
    return _guided(c, u, w * (c - u), original, rescale, cond.dtype)


def perp_neg(
    cond: Array,
    uncond: Array,
    negatives: Sequence[Array],
    scale: Scalar,
    weights: Any,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
) -> Array:
    """u + w (e - sum_i v_i perp(n_i - u, e)), e = c - u, perp(y, e) = y - <y,e>/<e,e> e.  arXiv 2304.04968."""
    c, u = _up(cond), _up(uncond)
    e = shift = c - u
    for v, negative in zip(_columns(weights), negatives, strict=True):
        y = _up(negative) - u
        shift = shift - _rows(v, c) * (y - _ratio(_dot(y, e), _dot(e, e), 0.0) * e)
    return _guided(c, u, _rows(scale, c) * shift, original, rescale, cond.dtype)


def compose(conds: Sequence[Array], uncond: Array, weights: Any, *, rescale: Scalar = 0.0) -> Array:
    """u + sum_i w_i (c_i - u); a negative weight is NOT.  arXiv 2206.01714."""
    u = _up(uncond)
    terms = [_rows(w, u) * (_up(c) - u) for w, c in zip(_columns(weights), conds, strict=True)]
    return _guided(_up(conds[0]), u, sum(terms[1:], terms[0]), False, rescale, uncond.dtype)


def slerp(a: Array, b: Array, weight: Scalar) -> Array:
    """sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, theta the angle between a and b.

    Where sin(theta)^2 <= 1e-12 (collinear, or a zero), the straight line (1-t) a + t b.
    """
    x, y = _up(a), _up(b)
    t = _rows(weight, x)
    xx, xy, yy = _dot(x, x), _dot(x, y), _dot(y, y)
    cross = xx * yy - xy * xy
    line = cross <= 1e-12 * xx * yy
    theta = jnp.arctan2(jnp.sqrt(jnp.where(line, 1, cross)), jnp.where(line, 0, xy))
    wa = jnp.where(line, 1 - t, jnp.sin((1 - t) * theta) / jnp.sin(theta))
    wb = jnp.where(line, t, jnp.sin(t * theta) / jnp.sin(theta))
    return (wa * x + wb * y).astype(a.dtype)


def rescale(guided: Array, cond: Array, factor: Scalar) -> Array:
    """factor std(c)/std(g) g + (1 - factor) g.  arXiv 2305.08891, eq. 15-16."""
    return _spread(_up(guided), _up(cond), factor).astype(guided.dtype)


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
    """Noise predictions mixed by their log-densities.  SuperDiff, arXiv 2412.17762."""
    arrays = [*preds, *(t for t in (uncond, noise) if t is not None)]
    weights, new = superpose_weights(
        gram(arrays), len(preds), uncond is not None, noise is not None, log_density, step, scale, kind,
        temperature, bias,
    )  # fmt: skip
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
    donate_x: bool = False,
    **parameters: Any,
) -> Any:
    """x' = a x + b g + h history + s noise, g the rule's value; with `predict` = (p, q), D = p x + q g."""
    g = _apply(rule, [_up(p) for p in preds], **parameters)
    g, state = g if isinstance(g, tuple) else (g, None)
    y = _up(x)
    new = _rows(a, y) * y + _rows(b, y) * g
    for term, c in ((history, h), (noise, s)):
        if term is not None:
            new = new + _rows(c, y) * _up(term)
    results = [new.astype(x.dtype)]
    if predict is not None:
        results.append((_rows(predict[0], y) * y + _rows(predict[1], y) * g).astype(x.dtype))
    if state is not None:
        results.append(state.astype(preds[0].dtype))
    return results[0] if len(results) == 1 else tuple(results)


def _columns(weights: Any) -> Sequence[Any]:
    return [weights[:, i] for i in range(weights.shape[1])] if hasattr(weights, "shape") else weights


def _apply(rule: str, preds: list[Array], **parameters: Any) -> Any:
    """A rule by name, from its predictions in the order of pydiffuse._core.rules."""
    names, p = RULES[rule].preds, list(preds)
    if rule == "linear":
        terms = [_rows(w, t) * t for w, t in zip(_columns(parameters["weights"]), p, strict=True)]
        return _spread(sum(terms[1:], terms[0]), p[0], parameters.get("rescale", 0.0))
    arguments: dict[str, Any] = {}
    for name in names:
        if name.endswith("..."):
            arguments[name[:-3]] = [p.pop(0) for _ in range(len(p) - (names[-1] == "uncond"))]
        elif p:
            arguments[name] = p.pop(0)
    if rule == "rescale":
        parameters = {"factor": parameters["rescale"]}
    if rule == "compose":
        parameters.pop("original", None)
    if rule == "apg" and "state" in arguments:
        parameters.setdefault("momentum", 0.0)
    return _BY_NAME[rule](**arguments, **parameters)


_BY_NAME: dict[str, Any] = {
    f.__name__: f for f in (cfg, tcfg, cfg_zero, apg, magnitude_aware, perp_neg, compose, slerp, rescale)
}
