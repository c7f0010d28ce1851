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
    from pydiffuse.distributed.comm import count_bytes, set_timeout, sum_gradients
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

_NAMES = {
    **{name: "pydiffuse.distributed.guidance" for name in _GUIDANCE},
    **{name: "pydiffuse.distributed.comm" for name in ("count_bytes", "set_timeout", "sum_gradients")},
}
__getattr__, __dir__ = lazy("pydiffuse.distributed", _NAMES)

__all__ = [
    "apg",
    "cfg",
    "cfg_zero",
    "combine",
    "compose",
    "count_bytes",
    "gram",
    "guide",
    "magnitude_aware",
    "perp_neg",
    "rescale",
    "set_timeout",
    "slerp",
    "sum_gradients",
    "superpose",
    "tcfg",
]
