"""One layer of ZigMa's size, along a zigzag: pydiffuse's kernels against the same layer in plain PyTorch."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from tqdm import tqdm

import pydiffuse
from pydiffuse.nn import ZigzagMamba
from pydiffuse.paths import zigzag

WIDTH, SIDE = 768, 32  # ZigMa's width; 32 x 32 tokens
TOLERANCE = 1e-4  # of the difference, relative to the result


def passes(layer: ZigzagMamba, x: Tensor, repeats: int) -> tuple[Tensor, float, float]:
    """The result, and the least milliseconds forward, and forward and backward."""
    forward, both = [], []
    y = x
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            y = layer(x)
        forward.append(time.perf_counter() - start)
        start = time.perf_counter()
        layer(x).square().mean().backward()
        both.append(time.perf_counter() - start)
    return y, 1e3 * min(forward), 1e3 * min(both)


def layer_demo(seed: int) -> bool:
    """Time a layer both ways and print the table; whether both results agree."""
    torch.manual_seed(seed)
    layer = ZigzagMamba(WIDTH, path=zigzag((SIDE, SIDE), 3))
    x = torch.randn(1, SIDE * SIDE, WIDTH, requires_grad=True)
    results = {}
    for title, backend, repeats in tqdm(
        [("plain PyTorch, a loop over tokens", "reference", 1), ("pydiffuse", "cpu", 4)],
        desc="ZigMa layer",
        unit="way",
    ):
        with pydiffuse.use_backend(backend):
            results[title] = passes(layer, x, repeats)
    plain, ours = results.values()
    error = ((ours[0] - plain[0]).norm() / plain[0].norm()).item()
    print(f"\nOne Mamba layer of ZigMa's size: d_model {WIDTH}, {SIDE}x{SIDE} tokens, zigzag, float32")
    print(f"{'way':36}{'forward, ms':>13}{'forward and backward, ms':>27}")
    for title, (_, forward, both) in results.items():
        print(f"{title:36}{forward:13.1f}{both:27.1f}")
    print(f"Relative difference {error:.1e}; tolerance {TOLERANCE:.0e}.")
    return error <= TOLERANCE
