"""Compiled kernels for diffusion and flow models, on the CPU and the GPU.

The public ops of `pydiffuse.guidance`, `scan`, `conv`, `attention`, `patch`, `adaln` and `routing` are
re-exported here; `pydiffuse.paths` has orders over tokens, `pydiffuse.plans` the tiles of an attention,
`pydiffuse.nn` modules, `pydiffuse.samplers` loops over a user's model. `backends()` says what runs where.
"""

from pydiffuse import _ops, paths, plans, samplers
from pydiffuse._ops import backends, use_backend
from pydiffuse.adaln import embed_t, gate_residual_modulate, modulate
from pydiffuse.attention import entropy_scale, tile_attention
from pydiffuse.conv import causal_conv1d
from pydiffuse.guidance import (
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
from pydiffuse.patch import (
    convert,
    dual_loop_t,
    next_t,
    noise_patches,
    patch_loss,
    patch_step,
    sample_t,
    select_patches,
)
from pydiffuse.paths import ScanPath
from pydiffuse.routing import channel_mask, gather_tokens, route, routed_linear, scatter_tokens
from pydiffuse.scan import selective_scan, selective_state_update, zigzag_mamba_inner
from pydiffuse.version import __version__

OPS = _ops.PUBLIC

__all__ = [
    "OPS",
    "ScanPath",
    "__version__",
    "apg",
    "backends",
    "causal_conv1d",
    "cfg",
    "cfg_zero",
    "channel_mask",
    "combine",
    "compose",
    "convert",
    "dual_loop_t",
    "embed_t",
    "entropy_scale",
    "gate_residual_modulate",
    "gather_tokens",
    "gram",
    "guide",
    "magnitude_aware",
    "modulate",
    "next_t",
    "noise_patches",
    "patch_loss",
    "patch_step",
    "paths",
    "perp_neg",
    "plans",
    "rescale",
    "route",
    "routed_linear",
    "sample_t",
    "samplers",
    "scatter_tokens",
    "select_patches",
    "selective_scan",
    "selective_state_update",
    "slerp",
    "superpose",
    "tcfg",
    "tile_attention",
    "use_backend",
    "zigzag_mamba_inner",
]
