"""Layers in the place of diffusers' (>= 0.42) of the same names: only `forward`, no state of their own.

Normalisation, scale and shift are one pass over the tokens [B, N, D], rounded once.
"""

from __future__ import annotations

import torch
from torch import nn

from ..adaln import modulate


class AdaLayerNormZero(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return (_normed(self.norm, x, shift, scale), *rest)


class AdaLayerNormZeroSingle(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x, emb=None):
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _normed(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return _normed(self.norm, x, shift, scale)


class SD35AdaLayerNormZeroX(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states, emb=None):
        shift, scale, gate, *mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first = _normed(self.norm, hidden_states, shift, scale)
        return (first, gate, *mlp, _normed(self.norm, hidden_states, shift2, scale2), gate2)


class LuminaRMSNormZero(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x, emb=None):
        scale, *rest = self.linear(self.silu(emb)).chunk(4, dim=1)
        return (_normed(self.norm, x, torch.zeros_like(scale), scale), *rest)


def _normed(norm, x, shift, scale):
    """x: [B, N, D]; shift, scale: [B, D], a row of the table for each sample."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    kind = (
        "rms" if "RMSNorm" in type(norm).__name__ else "layer" if isinstance(norm, nn.LayerNorm) else ""
    )
    if not kind or x.dim() != 3:
        raise TypeError(
            f"the norm is {type(norm).__name__} of {x.dim()} dimensions; accepted: LayerNorm or RMSNorm of"
            " tokens [B, N, D]"
        )
    return modulate(
        x,
        torch.stack([shift, scale], 1),
        rows,
        norm=kind,
        eps=torch.finfo(x.dtype).eps if norm.eps is None else norm.eps,  # torch's RMSNorm
        weight=getattr(norm, "weight", None),
        bias=getattr(norm, "bias", None),
    )


__all__ = [
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "AdaLayerNormZeroSingle",
    "LuminaRMSNormZero",
    "SD35AdaLayerNormZeroX",
]
