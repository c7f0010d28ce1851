"""The definition of every op in jax.numpy: same names and arguments as pydiffuse.jax, on any device."""

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
from pydiffuse.jax.reference.scan import selective_scan

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
    "rescale",
    "selective_scan",
    "slerp",
    "superpose",
    "tcfg",
]
