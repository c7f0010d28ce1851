"""Guidance rules and adaptive layer norm of diffusion transformers, on compiled kernels."""

from . import layers
from .adaln import gate_residual_modulate, modulate
from .guidance import apg, cfg, cfg_zero, magnitude_aware, perp_neg, tcfg

__all__ = [
    "apg",
    "cfg",
    "cfg_zero",
    "gate_residual_modulate",
    "layers",
    "magnitude_aware",
    "modulate",
    "perp_neg",
    "tcfg",
]
