"""The definition of the causal convolution in plain PyTorch: same name, same signature, any device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffuse.paths import ScanPath


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    path: ScanPath | Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
) -> Tensor:
    """y_l = act(bias + sum_w weight_w x_(l - W + 1 + w)), zeros before a sequence's first step.

    Step l is at token path[l]. Computed in float32, or float64 for float64 inputs, rounded once.
    """
    dtype, wide = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x if layout == "bdl" else x.transpose(1, 2)
    L, W = x.shape[-1], weight.shape[-1]
    order = range(L) if path is None else path.order if isinstance(path, ScanPath) else path
    order = torch.as_tensor([int(token) for token in order], dtype=torch.int64, device=x.device)
    bounds = [0, L] if cu_seqlens is None else [int(o) for o in cu_seqlens]
    steps = x.to(wide)[..., order]
    steps = steps.flip(-1) if reverse else steps
    bounds = [L - b for b in reversed(bounds)] if reverse else bounds
    pieces = [
        F.conv1d(
            F.pad(steps[..., first:last], (W - 1, 0)),
            weight.to(wide)[:, None],
            None if bias is None else bias.to(wide),
            groups=x.shape[1],
        )
        for first, last in pairwise(bounds)
        if first < last
    ]
    y = torch.cat(pieces, -1) if pieces else steps
    y = F.silu(y) if activation == "silu" else y
    y = y.flip(-1) if reverse else y
    y = torch.empty_like(y).index_copy(-1, order, y).to(dtype)
    return y if layout == "bdl" else y.transpose(1, 2)
