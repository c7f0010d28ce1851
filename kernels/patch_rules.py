"""The coefficients of a patch in Triton, from its levels: pydiffuse.reference.patch has the formulas."""

from __future__ import annotations

import triton.language as tl

from pydiffuse._core.grids import CONVERT, KINDS, METHODS, NOISE, PATHS, RESIDUAL
from pydiffuse.kernels.common import inner

LINEAR, VP, TRIG = map(tl.constexpr, range(len(PATHS)))
FLOW, V, EPS, X1 = map(tl.constexpr, range(len(KINDS)))
EULER, DDIM, ANCESTRAL, MULTISTEP = map(tl.constexpr, range(len(METHODS)))
NOISING, CONVERTING, RESIDUAL_OF = map(tl.constexpr, (NOISE, CONVERT, RESIDUAL))


@inner
def sine(x):
    # For |x| <= pi/2, to 6e-8: tl.sin's reduction of any argument costs registers that spill.
    y = x * x
    p = 1.0 / 362880.0 - y * (1.0 / 39916800.0)
    p = 1.0 / 120.0 - y * (1.0 / 5040.0 - y * p)
    return x * (1.0 - y * (1.0 / 6.0 - y * p))


@inner
def level(t, PATH: tl.constexpr):
    # alpha, sigma and their slopes in t
    if PATH == LINEAR:
        one = tl.full(t.shape, 1.0, tl.float32)
        return t, 1.0 - t, one, -one
    elif PATH == TRIG:
        s, c = sine(1.5707963267948966 * t), sine(1.5707963267948966 * (1.0 - t))
        return s, c, 1.5707963267948966 * c, -1.5707963267948966 * s
    else:
        q = t * t + (1.0 - t) * (1.0 - t)
        alpha, sigma = t / tl.sqrt(q), (1.0 - t) / tl.sqrt(q)
        return alpha, sigma, sigma / q, -alpha / q


@inner
def prediction(alpha, sigma, KIND: tl.constexpr):
    # (a, b) of a x1 + b eps
    one, zero = tl.full(alpha.shape, 1.0, tl.float32), tl.zeros(alpha.shape, tl.float32)
    if KIND == FLOW:
        return one, -one
    elif KIND == EPS:
        return zero, one
    elif KIND == X1:
        return one, zero
    else:
        r = tl.sqrt(alpha * alpha + sigma * sigma)
        return -sigma / r, alpha / r


@inner
def combined(source, wanted, alpha, sigma):
    # The coefficients of x and g in wanted[0] x1 + wanted[1] eps.
    det = alpha * source[1] - sigma * source[0]
    return (
        (wanted[0] * source[1] - wanted[1] * source[0]) / det,
        (wanted[1] * alpha - wanted[0] * sigma) / det,
    )


@inner
def renewed(t, t_next, now, then, eta, PATH: tl.constexpr):
    # What is left of the noise at t_next, and what is drawn anew: q = sigma' alpha / (alpha' sigma), and
    # 1 - q = gap / (alpha' sigma) without cancelling.
    alpha, sigma, alpha_next, sigma_next = now[0], now[1], then[0], then[1]
    h = t_next - t
    gap = h
    if PATH == TRIG:
        gap = sine(1.5707963267948966 * h)
    if PATH == VP:
        gap = h * (alpha + sigma) * (alpha_next + sigma_next)
    fresh = tl.where(h > 0, tl.minimum(gap / tl.where(h > 0, alpha_next * sigma, 1.0), 1.0), 0.0)
    up = eta * sigma_next * tl.sqrt(fresh * (2.0 - fresh))
    return tl.sqrt(tl.maximum(sigma_next * sigma_next - up * up, 0.0)), up


@inner
def step(
    t,
    t_next,
    t_last,
    w,  # the guidance scale
    eta,
    METHOD: tl.constexpr,
    PATH: tl.constexpr,
    SOURCE: tl.constexpr,
    GUIDED: tl.constexpr,  # the prediction's coefficient is that of its difference to the unconditional one
):
    # [10]: x', then the new history; of x, prediction, unconditional one, history, noise
    none = tl.zeros(t.shape, tl.float32)
    now = level(t, PATH)
    source = prediction(now[0], now[1], SOURCE)
    from_history, from_noise, slope = none, none, (none, none)
    if METHOD == EULER or METHOD == MULTISTEP:
        slope = combined(source, (now[2], now[3]), now[0], now[1])
        if PATH == LINEAR:
            if SOURCE == FLOW:
                slope = (none, none + 1.0)
        h = t_next - t
        ahead = h
        if METHOD == MULTISTEP:
            before = t - t_last
            half = tl.where(before > 0, 0.5 * h / tl.where(before > 0, before, 1.0), 0.0)
            ahead = h * (1.0 + half)
            from_history = -h * half
        y = (1.0 + ahead * slope[0], ahead * slope[1])
    else:
        then = level(t_next, PATH)
        sigma = then[1]
        if METHOD == ANCESTRAL:
            sigma, from_noise = renewed(t, t_next, now, then, eta, PATH)
        y = combined(source, (then[0], sigma), now[0], now[1])
    left = 1.0 - w
    if GUIDED:
        left = 1.0
    return (
        y[0], y[1] * w, y[1] * left, from_history, from_noise,
        slope[0], slope[1] * w, slope[1] * left, none, none,
    )  # fmt: skip


@inner
def coefficients(
    t,
    t_next,
    t_last,
    w,
    eta,
    METHOD: tl.constexpr,
    PATH: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    GUIDED: tl.constexpr,
):
    # The same for every rule.
    none = tl.zeros(t.shape, tl.float32)
    if METHOD == RESIDUAL_OF:
        c = (t, none, none, none, -t, -t_next, none, none, none, t_next)
    elif METHOD <= MULTISTEP:
        c = step(t, t_next, t_last, w, eta, METHOD, PATH, SOURCE, GUIDED)
    else:
        alpha, sigma, _, _ = level(t, PATH)
        target = prediction(alpha, sigma, TARGET)
        if METHOD == NOISING:
            c = (alpha, none, none, none, sigma, target[0], none, none, none, target[1])
        else:
            tl.static_assert(METHOD == CONVERTING)
            y = combined(prediction(alpha, sigma, SOURCE), target, alpha, sigma)
            c = (y[0], y[1], none, none, none, none, none, none, none, none)
    return c
