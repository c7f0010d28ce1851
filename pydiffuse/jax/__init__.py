"""The ops on JAX arrays: the CPU kernels as XLA's foreign functions; torch is not imported.

Same names and arguments as in `pydiffuse`, with gradients (jax.grad, reverse mode), under jit, vmap, lax.scan
and shard_map. Arrays are float32, bfloat16 or float16 and reach the kernels without a copy. A number is
compiled in; an array () or (B,) in its place may be traced and has a gradient. The kernels run on the CPU
only: on another platform a call is an error that says so. `pydiffuse.jax.reference` has the same functions
written in jax.numpy.
"""

from pydiffuse.jax import reference
from pydiffuse.jax.conv import causal_conv1d
from pydiffuse.jax.guidance import (
    apg,
    cfg,
    cfg_zero,
    combine,
    compose,
    gram,
    guide,
    magnitude_aware,
    perp_neg,
    rescale,
    slerp,
    superpose,
    tcfg,
)
from pydiffuse.jax.scan import selective_scan

__all__ = [
    "apg",
    "causal_conv1d",
    "cfg",
    "cfg_zero",
    "combine",
    "compose",
    "gram",
    "guide",
    "magnitude_aware",
    "perp_neg",
    "reference",
    "rescale",
    "selective_scan",
    "slerp",
    "superpose",
    "tcfg",
]
