"""Expressions of NumPy and the functions that take their place: times and differences, without torch."""

import sys
from timeit import repeat

import numpy as np

import pydiffuse.numpy as pn
from pydiffuse import plans

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def cfg_and_rescale(cond, uncond, w, phi):
    g = uncond + w * (cond - uncond)
    axes = tuple(range(1, g.ndim))
    scale = cond.std(axes, keepdims=True) / g.std(axes, keepdims=True)
    return phi * scale * g + (1 - phi) * g


def modulate(x, table, rows):
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return n * (1 + table[rows, 1]) + table[rows, 0]


def attention(q, k, v, mask):
    s = np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


c, u = normal(2, 4, 16, 128, 128)
x, table, rows = normal(4, 1024, 768), normal(4, 2, 768), rng.integers(0, 4, (4, 1024))
q, k, v = normal(3, 1, 4, 1024, 64)
plan = plans.frames(num_frames=8, tokens_per_frame=128, references=1)
frame = np.arange(1024) // 128
mask = (frame[:, None] == frame) | (frame[:, None] == 0) | (frame == 0)
PAIRS = {
    "guidance and rescale": (
        lambda: cfg_and_rescale(c, u, 7.5, 0.7),
        lambda: pn.cfg(c, u, 7.5, rescale=0.7),
    ),
    "layer norm, modulated": (lambda: modulate(x, table, rows), lambda: pn.modulate(x, table, rows)),
    "attention of frames": (lambda: attention(q, k, v, mask), lambda: pn.tile_attention(q, k, v, plan)),
}
print(f"{'':24} NumPy   pydiffuse (ms)")
for name, (before, after) in PAIRS.items():
    slow, fast = (1e3 * min(repeat(call, number=1)) for call in (before, after))
    print(f"{name:24} {slow:5.1f}   {fast:9.2f}   differ by {abs(before() - after()).max():.1e}")
assert "torch" not in sys.modules
