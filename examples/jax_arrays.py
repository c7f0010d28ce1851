"""Jitted jax.numpy and the functions that take its place: times and differences, without torch."""

import sys
from timeit import repeat

import jax
import jax.numpy as jnp

import pydiffuse.jax as pj

cond, uncond, x = jax.random.normal(jax.random.key(0), (3, 2, 16, 128, 128))


def tcfg(c, u, w):
    """Tangential damping, by the singular vectors of [c; u] as in the paper."""

    def of_sample(c, u):
        rows = jnp.stack([c.ravel(), u.ravel()])
        top = jnp.linalg.svd(rows, full_matrices=False)[2][0]
        return ((rows[1] @ top) * top).reshape(u.shape)

    u = jax.vmap(of_sample)(c, u)
    return u + w * (c - u)


def rescaled(c, u, w, phi=0.7):
    g = u + w * (c - u)
    axes = tuple(range(1, g.ndim))
    return phi * c.std(axes, keepdims=True) / g.std(axes, keepdims=True) * g + (1 - phi) * g


def slope(function):
    return jax.grad(lambda c, u: (function(c, u) * x).sum())


PAIRS = {
    "tcfg": (lambda c, u: tcfg(c, u, 7.5), lambda c, u: pj.tcfg(c, u, 7.5)),
    "guidance and rescale": (
        lambda c, u: rescaled(c, u, 7.5),
        lambda c, u: pj.cfg(c, u, 7.5, rescale=0.7),
    ),
    "its gradient": (
        slope(lambda c, u: rescaled(c, u, 7.5)),
        slope(lambda c, u: pj.cfg(c, u, 7.5, rescale=0.7)),
    ),
}
print(f"{'':22} jax.numpy   pydiffuse (ms)")
for name, pair in PAIRS.items():
    before, after = map(jax.jit, pair)
    differ = jnp.abs(before(cond, uncond) - after(cond, uncond)).max()
    slow, fast = (
        1e3 * min(repeat(lambda f=f: jax.block_until_ready(f(cond, uncond)), number=1, repeat=3))
        for f in (before, after)
    )
    print(f"{name:22} {slow:9.2f}   {fast:9.2f}   differ by {differ:.1e}")
assert "torch" not in sys.modules
