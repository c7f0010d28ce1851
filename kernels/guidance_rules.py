"""The guidance rules for Triton: from a sample's Gram matrix to its coefficients, in dual numbers.

csrc/guidance_rules.h says the same in C++ and names the papers. G holds the statistics that `entry`
reads: the upper triangle of the Gram matrix, row by row, then the sums. `own` holds the rule's
parameters and then its weights. Every formula is written once: the forward uses its values, the
backward its derivatives.
"""

import triton
import triton.language as tl

from pydiffuse._core.rules import COMMON, EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES, UPDATE
from pydiffuse.kernels.common import inner
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

A, B, H, S, P, Q, ORIGINAL, PHI, RULE_PARAMS = map(tl.constexpr, range(len(UPDATE + COMMON) + 1))
MOMENTUM = tl.constexpr(RULE_PARAMS.value + RULES["apg"].parameters.index("momentum"))
HAS_X, HAS_HISTORY, HAS_NOISE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
UPDATED, PREDICTED, STATED = map(tl.constexpr, (EMIT_UPDATE, EMIT_PREDICT, EMIT_STATE))


@triton.constexpr_function
def at(i, j, k):
    """The place of G_ij, i <= j, in the upper triangle of a k x k matrix; at(k, k, k) is its size."""
    return i * k - i * (i - 1) // 2 + j - i


@inner
def entry(G, e: tl.constexpr):
    # Statistic e as a dual number, made where it is used: all at once would not fit the registers.
    values, memory, step, seed = G
    if len(values) == 0:
        v = tl.load(memory + e * step)
    else:
        v = values[e]
    return v, tl.where(seed == e, 1.0, 0.0).to(tl.float64)


@inner
def extrapolate(w, x, y, original):
    # base + w (c - u'), u' = x c + y u, base = c if `original` else u'.
    start = original[0] != 0
    c = add(pick(start, (1.0, 0.0), x), mul(w, sub((1.0, 0.0), x)))
    return c, mul(sub(pick(start, (0.0, 0.0), (1.0, 0.0)), w), y)


@inner
def tcfg(G, w, original):
    cc, cu, uu = entry(G, 0), entry(G, 1), entry(G, 2)
    D = length(sub(cc, uu), add(cu, cu))
    tie = D[0] == 0  # no direction is the top one: both keep half
    x = pick(tie, (0.0, 0.0), over(cu, D))
    y = pick(tie, (0.5, 0.0), mul((0.5, 0.0), add((1.0, 0.0), over(sub(uu, cc), D))))
    return extrapolate(w, x, y, original)


@inner
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


@inner
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


@inner
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


@inner
def compose(own, K: tl.constexpr):
    coefs = ()
    u = (1.0, 0.0)
    for i in tl.static_range(K - 1):
        coefs = coefs + (own[i],)
        u = sub(u, own[i])
    return coefs + (u,)


@inner
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


@inner
def rescale(c, G, phi, n, K: tl.constexpr):
    # Unchanged where g is constant. A variance below 1e-13 of what it is the difference of is rounding,
    # hence 0; the summands of <g, g> may cancel.
    gg = (0.0, 0.0)
    size = 0.0
    mean = (0.0, 0.0)
    for i in tl.static_range(K):
        off = (0.0, 0.0)
        for j in tl.static_range(i + 1, K):
            off = add(off, mul(c[j], entry(G, at(i, j, K))))
            size += 2 * tl.abs(c[i][0] * c[j][0] * entry(G, at(i, j, K))[0])
        size += tl.abs(c[i][0] * c[i][0] * entry(G, at(i, i, K))[0])
        inner = add(mul(c[i], entry(G, at(i, i, K))), add(off, off))
        gg = add(gg, mul(c[i], inner))
        mean = add(mean, mul(c[i], entry(G, at(K, K, K) + i)))
    each = 1.0 / tl.cast(n, tl.float64)
    var_g = sub(gg, mul(mul(mean, mean), (each, 0.0)))
    cc, sum_c = entry(G, 0), entry(G, at(K, K, K))
    var_c = sub(cc, mul(mul(sum_c, sum_c), (each, 0.0)))
    flat = var_g[0] <= 1e-13 * size
    none = var_c[0] <= 1e-13 * cc[0]
    ratio = div(pick(none, (0.0, 0.0), var_c), pick(flat, (1.0, 0.0), var_g))
    factor = add((1.0, 0.0), mul(phi, sub(root(ratio), (1.0, 0.0))))
    coefs = ()
    for i in tl.static_range(K):
        coefs = coefs + (pick(flat, c[i], mul(factor, c[i])),)
    return coefs


@inner
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


@inner
def solve(
    G,
    n,
    high,  # the parameters, each as the sum of two float32
    low,
    varied,  # [B, columns] float64, or None
    sample,
    seed,  # [lanes]: derivatives by the OWN statistics of the predictions, then by the columns
    RULE: tl.constexpr,
    K: tl.constexpr,
    RESCALED: tl.constexpr,
    SOURCE: tl.constexpr,  # per parameter: its column of `varied`, or -1
    COLUMNS: tl.constexpr,
    OWN: tl.constexpr,
):
    # The parameters and the coefficients, as dual numbers.
    params = ()
    for i in tl.static_range(len(SOURCE)):
        if SOURCE[i] < 0:
            value = tl.cast(high[i], tl.float64) + tl.cast(low[i], tl.float64)
            params = params + ((value, 0.0),)
        else:
            value = tl.load(varied + sample * COLUMNS + SOURCE[i])
            one = tl.where(seed == OWN + SOURCE[i], 1.0, 0.0).to(tl.float64)
            params = params + ((value, one),)
    own = params[RULE_PARAMS:]
    c = coefficients(G, params[ORIGINAL], params[PHI], own, n, RULE, K, RESCALED)
    return params, c


@inner
def origin(c, K: tl.constexpr):
    # csrc/guidance_rules.h: -1, 0 or 1.
    if K < 2:
        return -1.0
    else:
        size0, size1 = tl.abs(c[0][0] + 0.0), tl.abs(c[1][0] + 0.0)
        cancels = (c[1][0] < 0) != (c[0][0] < 0)
        for i in tl.static_range(2, K):
            cancels = cancels | ((c[i][0] < 0) != (c[0][0] < 0))
        first = cancels & (size0 > size1)
        most = 8.0 * tl.where(first, size0, size1)
        there = (size0 <= most) & (size1 <= most)
        for i in tl.static_range(2, K):
            there = there & (tl.abs(c[i][0] + 0.0) <= most)
        if K == 2:
            there = there & (size0 > 0) & (size1 > 0)
        return tl.where(there, tl.where(first, 0.0, 1.0), -1.0)


@inner
def combination(o, scale, c, extras, TERMS: tl.constexpr):
    # A row: of the predictions, of x, history, noise where there are such, and the origin.
    whole = c[0]
    for i in tl.static_range(1, len(c)):
        whole = whole + c[i]
    row = (scale * tl.where(o == 0, whole, c[0]),)
    if len(c) > 1:
        row = row + (scale * tl.where(o == 1, whole, c[1]),)
    for i in tl.static_range(2, len(c)):
        row = row + (scale * c[i],)
    row = row + extras
    for _ in tl.static_range(len(row), TERMS):
        row = row + (0.0,)
    return row + (o,)


@inner
def combinations(params, c, K: tl.constexpr, HAS: tl.constexpr, EMIT: tl.constexpr):
    # The outputs' coefficients of (preds, x, history, noise), and last the origin.
    TERMS: tl.constexpr = K + (HAS & 1) + (HAS >> 1 & 1) + (HAS >> 2 & 1)
    o = origin(c, K)
    guided = ()
    for i in tl.static_range(K):
        guided = guided + (c[i][0],)
    rows = ()
    if UPDATED & EMIT:
        extras = ()
        if HAS_X & HAS:
            extras = extras + (params[A][0],)
        if HAS_HISTORY & HAS:
            extras = extras + (params[H][0],)
        if HAS_NOISE & HAS:
            extras = extras + (params[S][0],)
        rows = rows + (combination(o, params[B][0], guided, extras, TERMS),)
    if PREDICTED & EMIT:
        extras = ()
        if HAS_X & HAS:
            extras = extras + (params[P][0],)
        rows = rows + (combination(o, params[Q][0], guided, extras, TERMS),)
    if STATED & EMIT:  # APG: c - u + momentum state
        state = (1.0, -1.0)
        if K == 3:
            state = state + (params[MOMENTUM][0],)
        rows = rows + (combination(o, 1.0, state, (), TERMS),)
    return rows
