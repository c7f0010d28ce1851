"""A class-conditional diffusion transformer for 8x8 digits, and the data it learns.

Flow matching, with t = 0 noise and t = 1 data:

    x_t = t x1 + (1 - t) eps        v = dx_t / dt = x1 - eps

The network predicts v. Class 10 is the dropped label: asking for it gives the
unconditional prediction that the guidance rules need.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("checkpoint.pt")
CLASSES = 10
NO_CLASS = 10  # the dropped label


def load_data() -> tuple[Tensor, Tensor]:
    """The real scans: images (1797, 1, 8, 8) in [-1, 1] and labels (1797,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None]
    return images / 8 - 1, torch.from_numpy(digits.target).long()


def to_pixels(x: Tensor) -> np.ndarray:
    """Images (n, 1, 8, 8) in [-1, 1] -> (n, 64) in the 0..16 range of the scans."""
    return ((x + 1) * 8).clamp(0, 16).flatten(1).numpy()


def interpolate(x1: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path and its velocity.

    x1, eps (n, 1, 8, 8); t (n,) -> x_t, v, both (n, 1, 8, 8).
    """
    t = t[:, None, None, None]
    return t * x1 + (1 - t) * eps, x1 - eps


def embed_time(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t: (n,) -> (n, dim)."""
    freqs = torch.exp(torch.linspace(0, math.log(1000), dim // 2, device=t.device))
    angles = t[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (n, tokens, dim); shift, scale (n, dim) -> (n, tokens, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block whose norms and residuals are set by the condition (adaLN-zero)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.ada = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def attention(self, x: Tensor) -> Tensor:
        """x (n, tokens, dim) -> (n, tokens, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (n, tokens, dim), cond (n, dim) -> (n, tokens, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(cond).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DigitDiT(nn.Module):
    """Velocity v(x_t, t, class) of 8x8 digits, on 2x2 patches (16 tokens)."""

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.grid = 8 // patch
        self.tokens_in = nn.Linear(patch * patch, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid**2, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(CLASSES + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada = nn.Linear(dim, 2 * dim)
        self.tokens_out = nn.Linear(dim, patch * patch)
        for layer in (self.ada, self.tokens_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x (n, 1, 8, 8), t (n,) in [0, 1], label (n,) in 0..10 -> v (n, 1, 8, 8)."""
        p = self.patch
        cond = F.silu(self.time(embed_time(t, self.label.embedding_dim)) + self.label(label))
        h = self.tokens_in(F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, cond)
        shift, scale = self.ada(cond).chunk(2, dim=-1)
        h = self.tokens_out(modulate(self.norm(h), shift, scale))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (self.grid, self.grid)), p)


def load_model(path: Path = CHECKPOINT) -> DigitDiT:
    """The trained network in float32, ready for sampling."""
    model = DigitDiT()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name: w.float() for name, w in state.items()})
    return model.eval().requires_grad_(False)
