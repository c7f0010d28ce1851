"""The definition of every guidance op in plain PyTorch: same names, same signatures, any device.

Predictions are [B, ...]; <a, b> is the inner product over everything but the batch, per sample.
Computed in float32, or in float64 for float64 inputs (the oracle of the tests), rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.rules import RULES

Scalar = float | Tensor


def _up(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _rows(value: Scalar, like: Tensor) -> Scalar:
    """A value per sample, shaped to multiply [B, ...]."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.dtype).expand(like.shape[0]).reshape(-1, *[1] * (like.dim() - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> per sample, as [B, 1, ..., 1]."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))


def _ratio(a: Tensor, b: Tensor, otherwise: float) -> Tensor:
    """a / b, and `otherwise` where b = 0; its gradient is 0 there."""
    zero = b == 0
    return torch.where(zero, otherwise, a / torch.where(zero, 1, b))


def _norm(squared: Tensor) -> Tensor:
    """The root of a squared norm, with slope 0 at 0."""
    zero = squared == 0
    return torch.where(zero, squared, torch.sqrt(torch.where(zero, 1, squared)))


def _finish(g: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    g = g.to(dtype)
    return g if out is None else out.copy_(g)


def _spread(guided: Tensor, cond: Tensor, factor: Scalar) -> Tensor:
    """g <- factor std(c)/std(g) g + (1 - factor) g; unchanged where g is constant.

    A variance under 1e-13 of the second moment is rounding, hence 0.  arXiv 2305.08891, eq. 15-16.
    """
    if not isinstance(factor, Tensor) and factor == 0:
        return guided

    def var(t: Tensor) -> Tensor:
        mean = t.flatten(1).mean(1).reshape(-1, *[1] * (t.dim() - 1))
        centred = dot(t - mean, t - mean)
        return torch.where(centred <= 1e-13 * dot(t, t), 0 * centred, centred)

    var_c, var_g = var(cond), var(guided)
    ratio = _norm(_ratio(var_c, var_g, 1.0))
    ratio = torch.where(var_g == 0, torch.ones_like(ratio), ratio)
    return guided + _rows(factor, guided) * (ratio - 1) * guided


def _guided(
    cond: Tensor,
    uncond: Tensor,
    shift: Tensor,
    original: bool,
    rescale: Scalar,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    g = (cond if original else uncond) + shift
    return _finish(_spread(g, cond, rescale), dtype, out)


def gram(preds: Sequence[Tensor], *, sums: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """G[b,i,j] = <p_i, p_j> of sample b, in float64; with `sums`, also the sum of each p_i."""
    p = torch.stack([t.double().flatten(1) for t in preds], 1)
    g = p @ p.mT
    return (g, p.sum(2)) if sums else g


def combine(preds: Sequence[Tensor], coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
    """sum_i c[b,i] p_i."""
    c = coefficients.expand(preds[0].shape[0], len(preds))
    terms = [_rows(c[:, i], _up(p)) * _up(p) for i, p in enumerate(preds)]
    return _finish(sum(terms[1:], terms[0]), preds[0].dtype, out)


def cfg(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """u + w (c - u), or c + w (c - u) if `original`.  arXiv 2207.12598."""
    c, u = _up(cond), _up(uncond)
    return _guided(c, u, _rows(scale, c) * (c - u), original, rescale, cond.dtype, out)


def project(cond: Tensor, uncond: Tensor) -> Tensor:
    """u's part along the top right singular vector of [c; u].

    u_f = (cu/D) c + 1/2 (1 + (uu - cc)/D) u,  D = hypot(cc - uu, 2 cu);  u/2 where D = 0.
    """
    cc, cu, uu = dot(cond, cond), dot(cond, uncond), dot(uncond, uncond)
    zero = (cc == uu) & (cu == 0)
    D = torch.hypot(torch.where(zero, 1, cc - uu), 2 * cu)
    return torch.where(zero, 0, cu / D) * cond + torch.where(zero, 0.5, (1 + (uu - cc) / D) / 2) * uncond


def tcfg(
    cond: Tensor | Sequence[Tensor],
    uncond: Tensor,
    scale: Scalar | Sequence[Scalar],
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance from u_f in place of u.  Tangential damping, arXiv 2503.18137.

    Of several conditions u_f is u's part along the top right singular vector of [c_1; ..; c_k; u],
    and g = u_f + sum_i w_i (c_i - u_f).
    """
    if isinstance(cond, Tensor):
        c, u = _up(cond), _up(uncond)
        u = project(c, u)
        w: Any = scale  # one condition, one scale
        return _guided(c, u, _rows(w, c) * (c - u), original, rescale, cond.dtype, out)
    conds, u = [_up(c) for c in cond], _up(uncond)
    scales = scale if isinstance(scale, Sequence) else [scale] * len(conds)
    p = torch.stack([t.flatten(1) for t in (*conds, u)], 1)
    projector = top_projector(p @ p.mT).to(p.dtype)
    u = (projector[:, -1:] @ p).reshape(uncond.shape)
    shift = sum((_rows(w, u) * (c - u) for w, c in zip(scales, conds, strict=True)), 0 * u)
    return _guided(conds[0], u, shift, original, rescale, uncond.dtype, out)


def top_projector(gram: Tensor) -> Tensor:
    """The projector [B, k, k] on the top eigenvector of G [B, k, k]: the limit of G^n / tr G^n.

    Squared 60 times; equal eigenvalues share, as in `project`; G = 0 gives I/k.
    """
    k = gram.shape[-1]
    eye = torch.eye(k, dtype=gram.dtype, device=gram.device) / k

    def unit_trace(m: Tensor) -> Tensor:
        trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        return torch.where(trace == 0, eye, m / torch.where(trace == 0, 1, trace))

    p = unit_trace(gram)
    for _ in range(60):
        p = unit_trace(p @ p)
    return p


def cfg_zero(
    cond: Tensor,
    uncond: Tensor,
    scale: Scalar,
    *,
    original: bool = False,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """u' + w (c - u') with u' = alpha u, alpha = <c,u> / (<u,u> + 1e-8).  arXiv 2503.18886."""
    c, u = _up(cond), _up(uncond)
    u = dot(c, u) / (dot(u, u) + 1e-8) * u
    return _guided(c, u, _rows(scale, c) * (c - u), original, rescale, cond.dtype, out)


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
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """u + w (d_orth + eta d_par), d = c - u + momentum * state, cut to `norm_threshold`.

    d_par is d's part along c.  With `momentum`, d is returned as the new state.  arXiv 2410.02416.
    """
    c, u = _up(cond), _up(uncond)
    d = new_state = c - u
    if momentum is not None and state is not None:
        d = new_state = d + _rows(momentum, c) * _up(state)
    threshold = _rows(norm_threshold, c)
    if isinstance(threshold, Tensor) or threshold > 0:
        threshold = torch.as_tensor(threshold, dtype=c.dtype)
        norm = _norm(dot(d, d))
        keep = (threshold <= 0) | (norm <= threshold)
        d = d * torch.where(keep, 1, threshold / torch.where(keep, 1, norm))
    parallel = _ratio(dot(d, c), dot(c, c), 0.0) * c
    shift = _rows(scale, c) * (d - (1 - _rows(eta, c)) * parallel)
    g = _guided(c, u, shift, original, rescale, cond.dtype, out)
    return g if momentum is None else (g, new_state.to(cond.dtype))


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
    """MAMBO-G: w' = 1 + (w - 1) e^{-alpha r}, r = ||c - u|| / ||u||; w' = w e^{-alpha r} if `original`.

    Where c = u, r = 0; where only u = 0, r is infinite.
    """
    c, u = _up(cond), _up(uncond)
    dd, uu = dot(c - u, c - u), dot(u, u)
    apart = (uu == 0) & (dd > 0)
    decay = torch.exp(-_rows(alpha, c) * _norm(_ratio(dd, uu, 0.0)))
    far = (torch.as_tensor(_rows(alpha, c), dtype=c.dtype) <= 0).to(c.dtype)
    decay = torch.where(apart, far, decay)
    w = _rows(scale, c)
    w = w * decay if original else 1 + (w - 1) * decay
    return _guided(c, u, w * (c - u), original, rescale, cond.dtype, out)


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
    """u + w (e - sum_i v_i perp(n_i - u, e)), e = c - u, perp(y, e) = y - <y,e>/<e,e> e.

    arXiv 2304.04968.
    """
    c, u = _up(cond), _up(uncond)
    e = shift = c - u
    for v, negative in zip(_columns(weights), negatives, strict=True):
        y = _up(negative) - u
        shift = shift - _rows(v, c) * (y - _ratio(dot(y, e), dot(e, e), 0.0) * e)
    return _guided(c, u, _rows(scale, c) * shift, original, rescale, cond.dtype, out)


def compose(
    conds: Sequence[Tensor],
    uncond: Tensor,
    weights: Sequence[Scalar] | Tensor,
    *,
    rescale: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """u + sum_i w_i (c_i - u); a negative weight is NOT.  arXiv 2206.01714."""
    u = _up(uncond)
    shift = torch.zeros_like(u)
    for w, c in zip(_columns(weights), conds, strict=True):
        shift = shift + _rows(w, u) * (_up(c) - u)
    return _guided(_up(conds[0]), u, shift, False, rescale, uncond.dtype, out)


def _columns(weights: Sequence[Scalar] | Tensor) -> Sequence[Scalar]:
    """Weights per prediction from a sequence, or the columns of a (B, m) tensor."""
    return weights.unbind(1) if isinstance(weights, Tensor) else weights


def slerp(a: Tensor, b: Tensor, weight: Scalar, *, out: Tensor | None = None) -> Tensor:
    """sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, theta the angle between a and b.

    Where sin(theta)^2 <= 1e-12 (collinear, or a zero), the straight line (1-t) a + t b.
    """
    x, y, t = _up(a), _up(b), _rows(weight, _up(a))
    xx, xy, yy = (v.double() for v in (dot(x, x), dot(x, y), dot(y, y)))
    cross = xx * yy - xy * xy
    line = cross <= 1e-12 * xx * yy
    sin = torch.sqrt(torch.where(line, 1, cross))
    theta = torch.atan2(sin, torch.where(line, 0, xy)).to(x.dtype)
    wa = torch.where(line, 1 - t, torch.sin((1 - t) * theta) / torch.sin(theta))
    wb = torch.where(line, t, torch.sin(t * theta) / torch.sin(theta))
    return _finish(wa.to(x.dtype) * x + wb.to(x.dtype) * y, a.dtype, out)


def rescale(guided: Tensor, cond: Tensor, factor: Scalar, *, out: Tensor | None = None) -> Tensor:
    """factor std(c)/std(g) g + (1 - factor) g.  arXiv 2305.08891, eq. 15-16."""
    return _finish(_spread(_up(guided), _up(cond), factor), guided.dtype, out)


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
    """SuperDiff (arXiv 2412.17762): mix noise predictions p_i by their log-densities l_i.

    g = u + w (sum_i k_i p_i - u).  OR: k = softmax(temperature l + bias).  AND: the k that sums to 1
    and leaves every l_i + bias_i changing alike.  Ito's density estimator, for a reverse step of variance
    `step` sigma^2 with noise n:  l_i' = l_i + step (<g, p_i> - <p_i, p_i>/2) - sqrt(step) <n, p_i>,
    up to a constant common to all i (u = 0, w = 1 without `uncond`).
    """
    p = torch.stack([_up(t).flatten(1) for t in preds], 1)  # [B, k, n]
    zero = torch.zeros_like(p[:, 0])
    u = zero if uncond is None else _up(uncond).flatten(1)
    n = zero if noise is None else _up(noise).flatten(1)
    G, up = p.double() @ p.double().mT, (p @ u[:, :, None])[..., 0].double()
    np_ = (p @ n[:, :, None])[..., 0].double()
    weights, new = superpose_weights(
        G, up, np_, log_density, step, kind, 1.0 if uncond is None else scale, temperature, bias
    )
    w = 1.0 if uncond is None else _rows(scale, u)
    g = u + w * ((weights.to(p.dtype)[:, None] @ p)[:, 0] - u)
    return g.reshape(preds[0].shape).to(preds[0].dtype), new


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x with matrix x = right, [B, m, m] symmetric and positive definite: Gauss-Jordan without pivots, for
    few unknowns. A library's solver waits for a GPU, which no captured call may do."""
    m = matrix.shape[1]
    system, row = torch.cat([matrix, right[..., None]], 2), torch.arange(m, device=matrix.device)[:, None]
    for i in range(m):
        pivot = system[:, i : i + 1] / system[:, i : i + 1, i : i + 1]
        system = torch.where(row == i, pivot, system - system[:, :, i : i + 1] * pivot)
    return system[..., -1]


def superpose_weights(
    gram: Tensor,
    with_uncond: Tensor,
    with_noise: Tensor,
    log_density: Tensor,
    step: Scalar,
    kind: str,
    scale: Scalar,
    temperature: float,
    bias: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """The weights k [B, k] and the new log-densities [B, k], from inner products alone (float64)."""
    B, k, _ = gram.shape
    l = log_density.double().expand(B, k)

    def column(value: Scalar) -> Tensor:
        if not isinstance(value, Tensor):  # filled on the device: nothing is copied to it
            return torch.full((B, 1), float(value), dtype=gram.dtype, device=gram.device)
        return value.to(gram).expand(B)[:, None]

    r, w = column(step), column(scale)
    fixed = r * ((1 - w) * with_uncond - gram.diagonal(dim1=1, dim2=2) / 2) - r.sqrt() * with_noise
    if kind == "or":
        weights = torch.softmax(temperature * l + bias, 1)
    else:
        # G k + f = lambda 1 and 1'k = 1, f = (fixed + bias)/(r w), in units of the mean <p_i, p_i>. Without
        # the last weight, 1 - sum_i y_i: <p_i - p_k, p_j - p_k> y = f_k - f_i - <p_i - p_k, p_k>. The
        # diagonal of G is lifted by 1e-12 of it, so that predictions that are equal share alike.
        unit = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None]
        unit = torch.where(unit == 0, 1, unit)
        G = gram / unit[..., None] + 1e-12 * torch.eye(k, dtype=gram.dtype, device=gram.device)
        f = (fixed + bias) / (r * w * unit)
        across = G[:, :-1] - G[:, -1:]
        y = _solve(across[:, :, :-1] - across[:, :, -1:], f[:, -1:] - f[:, :-1] - across[:, :, -1])
        weights = torch.cat([y, 1 - y.sum(1, keepdim=True)], 1)
    # A sum in one order: a library's product may take another one for another batch.
    change = r * w * sum(gram[:, :, i] * weights[:, i : i + 1] for i in range(k)) + fixed
    return weights, l + change


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
    out: Any = None,
    **parameters: Any,
) -> Any:
    """x' = a x + b g + h history + s noise, g the rule's value; with `predict` = (p, q), D = p x + q g."""
    g = apply(rule, [_up(p) for p in preds], **parameters)
    g, state = g if isinstance(g, tuple) else (g, None)
    y = _up(x)
    new = _rows(a, y) * y + _rows(b, y) * g
    for term, c in ((history, h), (noise, s)):
        if term is not None:
            new = new + _rows(c, y) * _up(term)
    results = [new]
    if predict is not None:
        results.append(_rows(predict[0], y) * y + _rows(predict[1], y) * g)
    if state is not None:
        results.append(state)
    dtypes = [x.dtype] * (1 + (predict is not None)) + [preds[0].dtype]
    outs = [None] * len(results) if out is None else [out] if isinstance(out, Tensor) else out
    results = [_finish(r, d, o) for r, d, o in zip(results, dtypes, outs, strict=False)]
    return results[0] if len(results) == 1 else tuple(results)


def apply(rule: str, preds: Sequence[Tensor], **parameters: Any) -> Any:
    """A rule by name, from its predictions in the order of pydiffuse._core.rules."""
    names, p = RULES[rule].preds, list(preds)
    if rule == "linear":
        weights = parameters.pop("weights")
        columns = [torch.as_tensor(w, dtype=p[0].dtype).expand(p[0].shape[0]) for w in _columns(weights)]
        g = combine(p, torch.stack(columns, 1))
        return _spread(g, p[0], parameters.get("rescale", 0.0))
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
    return BY_NAME[rule](**arguments, **parameters)


BY_NAME: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (cfg, tcfg, cfg_zero, apg, magnitude_aware, perp_neg, compose, slerp, rescale)
}
