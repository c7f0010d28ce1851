"""Past one machine: the ops over the ranks of a torch.distributed process group, equal to one process.

    torchrun --nproc-per-node 4 train.py
    y = pydiffuse.distributed.selective_scan(u, delta, A, B, C)   # each rank its tokens

Every function takes `group`: a process group that this rank is in, a mesh of one dimension, or None for the
world. All ranks of the group call it. Gradients of tensors that are split are those of one process; those of
what every rank holds (weights, scales) are this rank's part, whose sum over the group is the gradient
(`sum_gradients`). An error of one rank, other shapes or dtypes, or a rank that does not come is an error on
every rank that names the op and the rank (`set_timeout`).
"""

from typing import TYPE_CHECKING

from pydiffuse._core.lazy import lazy

_GUIDANCE = (
    "apg",
    "cfg",
    "cfg_zero",
    "combine",
    "compose",
    "gram",
    "guide",
    "magnitude_aware",
    "perp_neg",
    "rescale",
    "slerp",
    "superpose",
    "tcfg",
)

if TYPE_CHECKING:
    from pydiffuse.distributed.attention import tile_attention
    from pydiffuse.distributed.comm import count_bytes, set_timeout, sum_gradients
    from pydiffuse.distributed.conditions import exchange_predictions, gather_parts
    from pydiffuse.distributed.conv import causal_conv1d
    from pydiffuse.distributed.guidance import (
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
    from pydiffuse.distributed.modules import split_tokens
    from pydiffuse.distributed.scan import selective_scan, zigzag_mamba_inner
    from pydiffuse.distributed.slices import split
    from pydiffuse.distributed.tokens import reorder

_MODULES = {
    "attention": ("tile_attention",),
    "comm": ("count_bytes", "set_timeout", "sum_gradients"),
    "conditions": ("exchange_predictions", "gather_parts"),
    "conv": ("causal_conv1d",),
    "guidance": _GUIDANCE,
    "modules": ("split_tokens",),
    "scan": ("selective_scan", "zigzag_mamba_inner"),
    "slices": ("split",),
    "tokens": ("reorder",),
}
_NAMES = {name: f"pydiffuse.distributed.{module}" for module, names in _MODULES.items() for name in names}
__getattr__, __dir__ = lazy("pydiffuse.distributed", _NAMES)

__all__ = [
    "apg",
    "causal_conv1d",
    "cfg",
    "cfg_zero",
    "combine",
    "compose",
    "count_bytes",
    "exchange_predictions",
    "gather_parts",
    "gram",
    "guide",
    "magnitude_aware",
    "perp_neg",
    "reorder",
    "rescale",
    "selective_scan",
    "set_timeout",
    "slerp",
    "split",
    "split_tokens",
    "sum_gradients",
    "superpose",
    "tcfg",
    "tile_attention",
    "zigzag_mamba_inner",
]
