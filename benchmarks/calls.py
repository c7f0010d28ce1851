"""What a call costs: tiny inputs, so that all of it is Python, the dispatcher and the checks.

The best of several hundred-call means, as for any cost that noise only adds to. Without gradients a usual call
is one op of the extension; "general way" is the same call kept from it.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pydiffuse as pd
from benchmarks.measure import Contender
from benchmarks.row import Bar, Row
from pydiffuse import plans
from pydiffuse._core import dispatch

Call = Callable[[], Any]
GOALS = {  # microseconds
    "cfg": 7, "tcfg": 8, "tcfg, out=": 8, "guide": 10, "selective_scan": 15, "causal_conv1d": 10,
    "tile_attention": 10, "modulate": 10, "gather_tokens": 8, "patch_step": 10, "noise_patches": 10,
    "select_patches": 8,
}  # fmt: skip


def calls(device: str, learns: bool) -> dict[str, Call]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(learns)

    c, u, out = randn(2, 4, 8, 8), randn(2, 4, 8, 8), torch.empty(2, 4, 8, 8, device=device)
    x, delta, A, B, C, w = (
        randn(1, 4, 8),
        randn(1, 4, 8),
        randn(4, 4),
        randn(1, 4, 8),
        randn(1, 4, 8),
        randn(4, 4),
    )
    q, plan = randn(1, 2, 16, 8), plans.frames(4, 4, 1).to(device)
    tokens, table, rows = (
        randn(2, 4, 8),
        randn(2, 2, 8),
        torch.zeros(2, 1, dtype=torch.int64, device=device),
    )
    ids = torch.tensor([[0, 2], [1, 3]], device=device)
    t, noise = torch.rand(2, 16, device=device), randn(2, 4, 8, 8)
    done = (t + 0.1).clamp(max=1)
    every = {
        "cfg": lambda: pd.cfg(c, u, 7.5),
        "tcfg": lambda: pd.tcfg(c, u, 7.5),
        "tcfg, out=": lambda: pd.tcfg(c, u, 7.5, out=out),
        "guide": lambda: pd.guide([c, u], "tcfg", x=noise, a=1.0, b=0.1, scale=7.5),
        "selective_scan": lambda: pd.selective_scan(x, delta, A, B, C),
        "causal_conv1d": lambda: pd.causal_conv1d(x, w),
        "tile_attention": lambda: pd.tile_attention(q, q, q, plan),
        "modulate": lambda: pd.modulate(tokens, table, rows),
        "gather_tokens": lambda: pd.gather_tokens(tokens, ids),
        "patch_step": lambda: pd.patch_step(c, u, t, done, 2),
        "noise_patches": lambda: pd.noise_patches(c, t, 2, noise=noise),
        "select_patches": lambda: pd.select_patches(t, 4),
    }  # fmt: skip
    if learns:  # neither takes a gradient
        del every["tcfg, out="], every["select_patches"]
    return every


def best(call: Call, seconds: float) -> float:
    """Milliseconds."""
    call()
    rounds = max(5, int(seconds * 1e6 / 100 / 30))
    return min(timeit.repeat(call, number=100, repeat=rounds)) / 100 * 1e3


def told(name: str, ms: float) -> Contender:
    return Contender(name, lambda i: None, seconds=[ms / 1e3])


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is nothing to share, and waking others would be what is measured
    try:
        yield from rows_of_one_thread(device, 0.05 if quick else 0.3)
    finally:
        torch.set_num_threads(threads)


def rows_of_one_thread(device: str, seconds: float) -> Iterator[Row]:
    a, q = torch.randn(2, 4, 8, 8, device=device), torch.randn(1, 2, 16, 8, device=device)
    add = told("torch.add", best(lambda: torch.add(a, a), seconds))
    sdpa = told("SDPA", best(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), seconds))
    for learns in (False, True):
        for name, call in calls(device, learns).items():
            ms, rivals = best(call, seconds), [add, sdpa]
            if not learns:
                with mock.patch.object(dispatch, "direct", lambda op, *tensors: None):
                    rivals.append(told("general way", best(call, seconds)))
            op = name.split(",")[0]
            what = name[len(op) + 2 :] or "a call"
            goal = Bar("us a call", ms * 1e3, GOALS[name], at_most=True)
            yield Row(
                op=op,
                what=f"{what}, {'a gradient is due' if learns else 'no gradient'}",
                shape=(),
                dtype=torch.float32,
                ms=ms,
                rivals=rivals,
                bars=[] if learns or device != "cpu" else [goal],
            )
