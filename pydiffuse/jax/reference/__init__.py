"""The definition of every op in jax.numpy: same names and arguments as pydiffuse.jax, on any device."""

from pydiffuse.jax.reference.adaln import gate_residual_modulate, modulate
from pydiffuse.jax.reference.attention import tile_attention
from pydiffuse.jax.reference.conv import causal_conv1d
from pydiffuse.jax.reference.guidance import (
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
from pydiffuse.jax.reference.patch import convert, dual_loop_t, noise_patches, patch_step, select_patches
from pydiffuse.jax.reference.routing import gather_tokens, route, scatter_tokens
from pydiffuse.jax.reference.scan import selective_scan

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
