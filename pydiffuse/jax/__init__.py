"""The ops on JAX arrays: the CPU kernels as XLA's foreign functions; torch is not imported.

Same names and arguments as in `pydiffuse`, with gradients (jax.grad, reverse mode), under jit, vmap, lax.scan
and shard_map. Arrays are float32, bfloat16 or float16 and reach the kernels without a copy. A number is
compiled in; an array () or (B,) in its place may be traced and has a gradient. The kernels run on the CPU
only: on another platform a call is an error that says so. `pydiffuse.jax.reference` has the same functions
written in jax.numpy.
"""

from pydiffuse.jax import calls, reference  # noqa: F401  calls first: it says what is missing
from pydiffuse.jax.adaln import gate_residual_modulate, modulate
from pydiffuse.jax.attention import tile_attention
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
from pydiffuse.jax.patch import convert, dual_loop_t, noise_patches, patch_step, select_patches
from pydiffuse.jax.routing import gather_tokens, route, scatter_tokens
from pydiffuse.jax.scan import selective_scan

__all__ = [
    "apg",
    "causal_conv1d",
    "cfg",
    "cfg_zero",
    "combine",
    "compose",
    "convert",
    "dual_loop_t",
    "gate_residual_modulate",
    "gather_tokens",
    "gram",
    "guide",
    "magnitude_aware",
    "modulate",
    "noise_patches",
    "patch_step",
    "perp_neg",
    "reference",
    "rescale",
    "route",
    "scatter_tokens",
    "select_patches",
    "selective_scan",
    "slerp",
    "superpose",
    "tcfg",
    "tile_attention",
]
