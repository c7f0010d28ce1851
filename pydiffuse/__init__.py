"""Compiled kernels for diffusion and flow models, on the CPU and the GPU.

The public ops of `pydiffuse.guidance`, `scan`, `conv`, `attention`, `patch`, `adaln` and `routing` are
re-exported here; `pydiffuse.paths` has orders over tokens, `pydiffuse.plans` the tiles of an attention,
`pydiffuse.nn` modules, `pydiffuse.samplers` loops over a user's model, `pydiffuse.numpy` and `pydiffuse.jax`
the ops without torch, `pydiffuse.distributed` the ops over several processes. `backends()` says what runs
where. Everything is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from pydiffuse._core.lazy import lazy
from pydiffuse._core.table import PUBLIC as OPS
from pydiffuse.version import __version__

if TYPE_CHECKING:
    from pydiffuse import distributed, integrations, jax, nn, numpy, paths, plans, reference, samplers
    from pydiffuse._core.dispatch import backends, use_backend
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

_FAMILIES = ("adaln", "attention", "conv", "guidance", "patch", "routing", "scan")
_MODULES = (
    "distributed",
    "integrations",
    "jax",
    "nn",
    "numpy",
    "paths",
    "plans",
    "reference",
    "samplers",
)
_NAMES = {
    **{name: f"pydiffuse.{op.stem}" for name, op in OPS.items()},
    "ScanPath": "pydiffuse.paths",
    "backends": "pydiffuse._core.dispatch",
    "entropy_scale": "pydiffuse.attention",
    "use_backend": "pydiffuse._core.dispatch",
}
__getattr__, __dir__ = lazy("pydiffuse", _NAMES, (*_FAMILIES, *_MODULES))

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
    "distributed",
    "dual_loop_t",
    "embed_t",
    "entropy_scale",
    "gate_residual_modulate",
    "gather_tokens",
    "gram",
    "guide",
    "integrations",
    "jax",
    "magnitude_aware",
    "modulate",
    "next_t",
    "nn",
    "noise_patches",
    "numpy",
    "patch_loss",
    "patch_step",
    "paths",
    "perp_neg",
    "plans",
    "reference",
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
