"""The guidance rules for Triton: from a sample's Gram matrix to its coefficients, in dual numbers.

csrc/guidance_rules.h says the same in C++ and names the papers. G holds the statistics that `entry`
reads: the upper triangle of the Gram matrix, row by row, then the sums. `own` holds the rule's
parameters and then its weights. Every formula is written once: the forward uses its values, the
backward its derivatives.
"""

import triton
import triton.language as tl

from pydiffuse.kernels.dual import (
    add,
    angle,
    div,
    exponential,
    length,
    mul,
    over,
    pick,
    root,
    sine,
    sub,
)
from pydiffuse.rules import RULES

LINEAR = tl.constexpr(RULES["linear"].code)
CFG = tl.constexpr(RULES["cfg"].code)
TCFG = tl.constexpr(RULES["tcfg"].code)
CFG_ZERO = tl.constexpr(RULES["cfg_zero"].code)
APG = tl.constexpr(RULES["apg"].code)
MAGNITUDE_AWARE = tl.constexpr(RULES["magnitude_aware"].code)
PERP_NEG = tl.constexpr(RULES["perp_neg"].code)
COMPOSE = tl.constexpr(RULES["compose"].code)
SLERP = tl.constexpr(RULES["slerp"].code)
RESCALE = tl.constexpr(RULES["rescale"].code)


@triton.constexpr_function
def at(i, j, k):
    """The place of G_ij, i <= j, in the upper triangle of a k x k matrix; at(k, k, k) is its size."""
    return i * k - i * (i - 1) // 2 + j - i


@triton.jit
def entry(G, e: tl.constexpr):
    # Statistic e as a dual number, made where it is used: all at once would not fit the registers.
    values, memory, step, seed = G
    if len(values) == 0:
        v = tl.load(memory + e * step)
    else:
        v = values[e]
    return v, tl.where(seed == e, 1.0, 0.0).to(tl.float64)


@triton.jit
def extrapolate(w, x, y, original):
    # base + w (c - u'), u' = x c + y u, base = c if `original` else u'.
    start = original[0] != 0
    c = add(pick(start, (1.0, 0.0), x), mul(w, sub((1.0, 0.0), x)))
    return c, mul(sub(pick(start, (0.0, 0.0), (1.0, 0.0)), w), y)


@triton.jit
def tcfg(G, w, original):
    cc, cu, uu = entry(G, 0), entry(G, 1), entry(G, 2)
    D = length(sub(cc, uu), add(cu, cu))
    tie = D[0] == 0  # no direction is the top one: both keep half
    x = pick(tie, (0.0, 0.0), over(cu, D))
    y = pick(tie, (0.5, 0.0), mul((0.5, 0.0), add((1.0, 0.0), over(sub(uu, cc), D))))
    return extrapolate(w, x, y, original)


@triton.jit
def apg(G, own, original, K: tl.constexpr):
    # d = c - u + momentum state in the basis of the predictions: 1, -1, momentum.
    w, eta, threshold, m = own[0], own[1], own[2], own[3]
    cc, cu = entry(G, 0), entry(G, 1)
    dc = sub(cc, cu)
    dd = add(sub(cc, add(cu, cu)), entry(G, K))
    if K == 3:
        cs = entry(G, 2)
        dc = add(dc, mul(m, cs))
        across = sub(cs, entry(G, 4))
        dd = add(dd, mul(m, add(add(across, across), mul(m, entry(G, 5)))))
    norm = root(pick(dd[0] < 0, (0.0, 0.0), dd))  # dd < 0 only by rounding
    cut = pick(norm[0] <= threshold[0], (1.0, 0.0), over(threshold, norm))
    cut = pick(threshold[0] > 0, cut, (1.0, 0.0))
    parallel = pick(cc[0] == 0, (0.0, 0.0), over(dc, cc))
    step = mul(w, cut)
    start = original[0] != 0
    c = sub(step, mul(mul(step, sub((1.0, 0.0), eta)), parallel))
    coefs = (
        add(c, pick(start, (1.0, 0.0), (0.0, 0.0))),
        sub(pick(start, (0.0, 0.0), (1.0, 0.0)), step),
    )
    if K == 3:
        coefs = coefs + (mul(step, m),)
    return coefs


@triton.jit
def magnitude_aware(G, w, alpha, original):
    cc, cu, uu = entry(G, 0), entry(G, 1), entry(G, 2)
    dd = add(sub(cc, add(cu, cu)), uu)
    dd = pick(dd[0] < 0, (0.0, 0.0), dd)  # by rounding
    decay = exponential(mul(sub((0.0, 0.0), alpha), root(over(dd, uu))))
    decay = pick(dd[0] == 0, (1.0, 0.0), decay)  # c = u: nothing to scale
    far = pick(alpha[0] > 0, (0.0, 0.0), (1.0, 0.0))
    decay = pick((uu[0] == 0) & (dd[0] > 0), far, decay)
    more = add((1.0, 0.0), mul(sub(w, (1.0, 0.0)), decay))
    w = pick(original[0] != 0, mul(w, decay), more)
    return extrapolate(w, (0.0, 0.0), (1.0, 0.0), original)


@triton.jit
def perp_neg(G, own, original, K: tl.constexpr):
    # u + w (along (c - u) - sum v_i (n_i - u)); predictions c, n_1 .. n_m, u; own: w, v_1 .. v_m.
    w, cu, uu = own[0], entry(G, K - 1), entry(G, at(K - 1, K - 1, K))
    ee = add(sub(entry(G, 0), add(cu, cu)), uu)
    along, rest = (1.0, 0.0), (0.0, 0.0)
    negatives = ()
    for i in tl.static_range(1, K - 1):
        v = own[i]
        ye = add(sub(sub(entry(G, i), entry(G, at(i, K - 1, K))), cu), uu)
        along = add(along, pick(ee[0] == 0, (0.0, 0.0), over(mul(v, ye), ee)))
        rest = add(rest, v)
        negatives = negatives + (sub((0.0, 0.0), mul(w, v)),)
    start = original[0] != 0
    c = add(mul(w, along), pick(start, (1.0, 0.0), (0.0, 0.0)))
    u = add(mul(w, sub(rest, along)), pick(start, (0.0, 0.0), (1.0, 0.0)))
    return (c,) + negatives + (u,)


@triton.jit
def compose(own, K: tl.constexpr):
    coefs = ()
    u = (1.0, 0.0)
    for i in tl.static_range(K - 1):
        coefs = coefs + (own[i],)
        u = sub(u, own[i])
    return coefs + (u,)


@triton.jit
def slerp(G, t):
    ab = entry(G, 1)
    area = mul(entry(G, 0), entry(G, 2))
    cross = sub(area, mul(ab, ab))  # (|a||b| sin)^2
    line = cross[0] <= 1e-12 * area[0]
    theta = angle(root(pick(line, (1.0, 0.0), cross)), pick(line, (0.0, 0.0), ab))
    rest = sub((1.0, 0.0), t)
    sin = sine(theta)
    return (
        pick(line, rest, div(sine(mul(rest, theta)), sin)),
        pick(line, t, div(sine(mul(t, theta)), sin)),
    )


@triton.jit
def rescale(c, G, phi, n, K: tl.constexpr):
    # Unchanged where g is constant. A variance below 1e-13 of its second moment is rounding, hence 0.
    gg = (0.0, 0.0)
    mean = (0.0, 0.0)
    for i in tl.static_range(K):
        off = (0.0, 0.0)
        for j in tl.static_range(i + 1, K):
            off = add(off, mul(c[j], entry(G, at(i, j, K))))
        inner = add(mul(c[i], entry(G, at(i, i, K))), add(off, off))
        gg = add(gg, mul(c[i], inner))
        mean = add(mean, mul(c[i], entry(G, at(K, K, K) + i)))
    each = 1.0 / tl.cast(n, tl.float64)
    var_g = sub(gg, mul(mul(mean, mean), (each, 0.0)))
    cc, sum_c = entry(G, 0), entry(G, at(K, K, K))
    var_c = sub(cc, mul(mul(sum_c, sum_c), (each, 0.0)))
    flat = var_g[0] <= 1e-13 * gg[0]
    none = var_c[0] <= 1e-13 * cc[0]
    ratio = div(pick(none, (0.0, 0.0), var_c), pick(flat, (1.0, 0.0), var_g))
    factor = add((1.0, 0.0), mul(phi, sub(root(ratio), (1.0, 0.0))))
    coefs = ()
    for i in tl.static_range(K):
        coefs = coefs + (pick(flat, c[i], mul(factor, c[i])),)
    return coefs


@triton.jit
def coefficients(G, original, phi, own, n, RULE: tl.constexpr, K: tl.constexpr, RESCALED: tl.constexpr):
    if RULE == LINEAR:
        c = own
    elif RULE == CFG:
        c = extrapolate(own[0], (0.0, 0.0), (1.0, 0.0), original)
    elif RULE == TCFG:
        c = tcfg(G, own[0], original)
    elif RULE == CFG_ZERO:
        c = extrapolate(own[0], (0.0, 0.0), div(entry(G, 1), add(entry(G, 2), (1e-8, 0.0))), original)
    elif RULE == APG:
        c = apg(G, own, original, K)
    elif RULE == MAGNITUDE_AWARE:
        c = magnitude_aware(G, own[0], own[1], original)
    elif RULE == PERP_NEG:
        c = perp_neg(G, own, original, K)
    elif RULE == COMPOSE:
        c = compose(own, K)
    elif RULE == SLERP:
        c = slerp(G, own[0])
    else:  # rescale: the one whose spread is kept, the guided one
        tl.static_assert(RULE == RESCALE)
        c = ((0.0, 0.0), (1.0, 0.0))
    if RESCALED:
        c = rescale(c, G, phi, n, K)
    return c
