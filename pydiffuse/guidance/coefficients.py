"""The step between the two passes of guidance: from a sample's Gram matrix to the coefficients of its predictions.

For callers that have something to do between them, as `pydiffuse.distributed` has: an all-reduce. The kernels
do the same within one op (csrc/guidance_rules.h). In float64, on any device, differentiable to any order;
degenerate cases are decided as in the kernels, and never divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pydiffuse.guidance.reference import top_projector

Numbers = Sequence[Tensor]
"""The rule's own parameters, each (B,) float64."""


def coefficients(
    rule: str,
    G: Tensor,
    values: Numbers,
    *,
    original: bool = False,
    rescale: Tensor | None = None,
    sums: Tensor | None = None,
    n: Tensor | float = 0.0,
) -> Tensor:
    """c [B, k] with g = sum_i c_i p_i, from G [B, k, k] float64 of the predictions in the rule's order.

    rescale (B,), with the sums [B, k] of the predictions and n, the elements of each: guidance rescale.
    """
    c = torch.stack(_RULES[rule](G, values, original), 1)
    return c if rescale is None or sums is None else _rescaled(c, G, sums, n, rescale)


def tcfg_of_many(G: Tensor, scales: Tensor, original: bool) -> Tensor:
    """c [B, m + 1] of `tcfg` with m conditions, scales [B, m]: u_f = sum_j P_uj p_j, P the top projector."""
    u = top_projector(G)[:, -1]
    total = scales.sum(1, keepdim=True)
    weights = torch.cat([scales, torch.zeros_like(total)], 1) - total * u
    first = torch.eye(G.shape[1], dtype=scales.dtype, device=scales.device)[0]
    return weights + (first if original else u)


def _divided(a: Tensor, b: Tensor, otherwise: float, zero: Tensor | None = None) -> Tensor:
    zero = b == 0 if zero is None else zero
    return torch.where(zero, otherwise, a / torch.where(zero, 1, b))


def _root(x: Tensor) -> Tensor:
    """The square root, of what is negative by rounding 0; its slope at 0 is 0."""
    zero = x <= 0
    return torch.where(zero, 0, torch.where(zero, 1, x).sqrt())


def _extrapolated(w: Tensor, x: Tensor, y: Tensor, original: bool) -> list[Tensor]:
    """From u' = x c + y u."""
    if original:
        return [1 + w * (1 - x), -(w * y)]
    return [x + w * (1 - x), (1 - w) * y]


def _linear(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    return list(values)


def _cfg(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    one = torch.ones_like(values[0])
    return _extrapolated(values[0], 0 * one, one, original)


def _tcfg(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    cc, cu, uu = G[:, 0, 0], G[:, 0, 1], G[:, 1, 1]
    tie = (cc == uu) & (cu == 0)
    D = torch.hypot(torch.where(tie, 1, cc - uu), 2 * cu)
    x = torch.where(tie, 0, cu / D)
    y = torch.where(tie, 0.5, 0.5 * (1 + (uu - cc) / D))
    return _extrapolated(values[0], x, y, original)


def _cfg_zero(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    alpha = G[:, 0, 1] / (G[:, 1, 1] + 1e-8)
    return _extrapolated(values[0], 0 * alpha, alpha, original)


def _apg(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    w, eta, threshold, momentum = values
    d = torch.stack([torch.ones_like(w), -torch.ones_like(w), momentum], 1)[:, : G.shape[1]]
    dc = (d * G[:, 0]).sum(1)
    norm = _root((d[:, :, None] * d[:, None] * G).sum((1, 2)))
    keep = (threshold <= 0) | (norm <= threshold)
    step = w * _divided(threshold, norm, 1.0, keep)
    c = list((step[:, None] * d).unbind(1))
    c[0] = c[0] - step * (1 - eta) * _divided(dc, G[:, 0, 0], 0.0)
    c[0 if original else 1] = c[0 if original else 1] + 1
    return c


def _magnitude_aware(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    w, alpha = values
    uu = G[:, 1, 1]
    dd = G[:, 0, 0] - 2 * G[:, 0, 1] + uu
    decay = torch.exp(-alpha * _root(_divided(dd, uu, 0.0)))
    decay = torch.where((uu == 0) & (dd > 0), (alpha <= 0).to(decay), decay)
    w = w * decay if original else 1 + (w - 1) * decay
    return _extrapolated(w, 0 * w, torch.ones_like(w), original)


def _perp_neg(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    w, *weights = values
    u = G.shape[1] - 1
    ee = G[:, 0, 0] - 2 * G[:, 0, u] + G[:, u, u]
    along, rest = torch.ones_like(w), -torch.ones_like(w)
    for i, v in enumerate(weights, 1):
        ye = G[:, i, 0] - G[:, i, u] - G[:, u, 0] + G[:, u, u]
        along = along + _divided(v * ye, ee, 0.0)
        rest = rest + v
    first, last = (1.0, 0.0) if original else (0.0, 1.0)
    return [w * along + first, *(-(w * v) for v in weights), last + w * (rest + 1 - along)]


def _compose(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    return [*values, 1 - sum(values[1:], values[0])]


def _slerp(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    t, ab = values[0], G[:, 0, 1]
    area = G[:, 0, 0] * G[:, 1, 1]
    cross = area - ab * ab
    line = cross <= 1e-12 * area
    theta = torch.atan2(_root(torch.where(line, 1, cross)), torch.where(line, 0, ab))
    a, b = (torch.sin(x * theta) / torch.sin(theta) for x in (1 - t, t))
    return [torch.where(line, 1 - t, a), torch.where(line, t, b)]


def _guided(G: Tensor, values: Numbers, original: bool) -> list[Tensor]:
    return [torch.zeros_like(G[:, 0, 0]), torch.ones_like(G[:, 0, 0])]


def _rescaled(c: Tensor, G: Tensor, sums: Tensor, n: Tensor | float, phi: Tensor) -> Tensor:
    terms = c[:, :, None] * c[:, None] * G
    mean = (c * sums).sum(1)
    n = torch.as_tensor(n, dtype=c.dtype, device=c.device).clamp_min(1)
    of_g = terms.sum((1, 2)) - mean * mean / n
    of_c = G[:, 0, 0] - sums[:, 0] ** 2 / n
    none = of_g <= 1e-13 * terms.detach().abs().sum((1, 2))
    nothing = of_c <= 1e-13 * G[:, 0, 0]
    ratio = _root(torch.where(none | nothing, 1, of_c) / torch.where(none, 1, of_g))
    ratio = torch.where(nothing, 0, ratio)
    return c * torch.where(none, 1, 1 + phi * (ratio - 1))[:, None]


_RULES: dict[str, Callable[[Tensor, Numbers, bool], list[Tensor]]] = {
    "linear": _linear,
    "cfg": _cfg,
    "tcfg": _tcfg,
    "cfg_zero": _cfg_zero,
    "apg": _apg,
    "magnitude_aware": _magnitude_aware,
    "perp_neg": _perp_neg,
    "compose": _compose,
    "slerp": _slerp,
    "rescale": _guided,
}
