"""The definition of every op in jax.numpy: same names and arguments as pydiffuse.jax, on any device."""

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

__all__ = [
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
]
