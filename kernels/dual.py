"""Dual numbers inside Triton kernels: v + d eps with eps^2 = 0, as a pair (v, d).

v is a float64 scalar, d a vector with one direction of differentiation per lane, so that one evaluation
of a formula gives its derivative by every input. Where only v is used, the compiler drops d. A constant
is (c, 0.0); constants stand in the call, since Triton rounds a float that gets a name to float32.
"""

import triton.language as tl

from pydiffuse.kernels.common import inner


@inner
def add(x, y):
    return x[0] + y[0], x[1] + y[1]


@inner
def sub(x, y):
    return x[0] - y[0], x[1] - y[1]


@inner
def mul(x, y):
    return x[0] * y[0], x[0] * y[1] + x[1] * y[0]


@inner
def div(x, y):
    # One division serves all quotients by the same y: float64 division is a subroutine on GPUs.
    inverse = 1.0 / y[0]
    v = x[0] * inverse
    return v, (x[1] - v * y[1]) * inverse


@inner
def pick(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@inner
def over(x, y):
    # x / y; where y = 0 the caller picks another value, and x stands for the quotient, NaN or not.
    return div(x, pick(y[0] == 0, (1.0, 0.0), y))


@inner
def root(x):
    # The slope at 0 is taken as 0.
    r = tl.sqrt(x[0])
    return r, tl.where(r == 0, 0.0, x[1] * (0.5 / tl.where(r == 0, 1.0, r)))


@inner
def exponential(x):
    e = tl.exp(x[0])
    return e, tl.where(e == 0, 0.0, e * x[1])


@inner
def sine(x):
    return tl.sin(x[0]), tl.cos(x[0]) * x[1]


@inner
def length(x, y):
    # sqrt(x^2 + y^2): float64 squares of float32 Gram entries neither overflow nor vanish.
    r = tl.sqrt(x[0] * x[0] + y[0] * y[0])
    d = (x[0] * x[1] + y[0] * y[1]) / tl.where(r == 0, 1.0, r)
    return r, tl.where(r == 0, 0.0, d)


@inner
def angle(y, x):
    # atan2(y, x) for y >= 0. libdevice's does not run in the interpreter, so: a guess within 4e-3, then
    # two steps a - tan(a - atan2(y, x)), each of which cubes the error.
    low, high = tl.minimum(tl.abs(x[0]), y[0]), tl.maximum(tl.abs(x[0]), y[0])
    z = low / high
    a = z * (1.0583981633974483 - 0.273 * z)
    a = tl.where(y[0] > tl.abs(x[0]), 1.5707963267948966 - a, a)
    a = tl.where(x[0] < 0, 3.141592653589793 - a, a)
    for _ in tl.static_range(2):
        s, c = tl.sin(a), tl.cos(a)
        a = a - (x[0] * s - y[0] * c) / (x[0] * c + y[0] * s)
    r = x[0] * x[0] + y[0] * y[0]
    return a, (x[0] * y[1] - y[0] * x[1]) / r
