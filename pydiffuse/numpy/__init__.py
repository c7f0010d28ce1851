"""The ops on NumPy arrays: the same CPU kernels, with no torch in between; torch is not imported.

Same names and arguments as in `pydiffuse`, forward only: results are arrays. Arrays are float32,
float16 or bfloat16 (as in ml_dtypes), anything that holds one on the CPU passes, too (JAX, torch, DLPack
producers). What is not C-contiguous, aligned and in the machine's byte order is copied first. `out=` takes
any array that can be written; where it shares memory with an input the result is as if it did not.

Calls from several threads run one after the other, each on `num_threads()` threads: as many as
OMP_NUM_THREADS says or, without it, as this process may use CPUs. `set_num_threads(n)` sets it;
`cpu_capability()` tells the instruction set in use.
"""

from pydiffuse import _host
from pydiffuse.numpy.adaln import embed_t, gate_residual_modulate, modulate
from pydiffuse.numpy.attention import tile_attention
from pydiffuse.numpy.conv import causal_conv1d
from pydiffuse.numpy.guidance import (
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
    tcfg,
)
from pydiffuse.numpy.levels import next_t, sample_t
from pydiffuse.numpy.patch import convert, dual_loop_t, noise_patches, patch_step, select_patches
from pydiffuse.numpy.routing import channel_mask, gather_tokens, route, scatter_tokens
from pydiffuse.numpy.scan import selective_scan
from pydiffuse.numpy.superpose import superpose
from pydiffuse.numpy.update import selective_state_update

cpu_capability = _host.capability
num_threads = _host.threads
set_num_threads = _host.set_threads

__all__ = [
    "apg",
    "causal_conv1d",
    "cfg",
    "cfg_zero",
    "channel_mask",
    "combine",
    "compose",
    "convert",
    "cpu_capability",
    "dual_loop_t",
    "embed_t",
    "gate_residual_modulate",
    "gather_tokens",
    "gram",
    "guide",
    "magnitude_aware",
    "modulate",
    "next_t",
    "noise_patches",
    "num_threads",
    "patch_step",
    "perp_neg",
    "rescale",
    "route",
    "sample_t",
    "scatter_tokens",
    "select_patches",
    "selective_scan",
    "selective_state_update",
    "set_num_threads",
    "slerp",
    "superpose",
    "tcfg",
    "tile_attention",
]
