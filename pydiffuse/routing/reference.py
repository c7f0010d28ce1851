"""The definition of every routing op in plain PyTorch: same names, same signatures, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pydiffuse._core.draws import drawn


def _up(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """[B, keep] shaped to go with tokens [B, keep, D...]."""
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def whole(number: float) -> int:
    """The integer below, for a number >= 0, a symbol for a symbol."""
    return torch.sym_int(number)


def kept(N: int, keep: int | float) -> int:
    return whole(keep * N + 0.5) if isinstance(keep, float) else keep


def route(
    B: int,
    N: int,
    keep: int | float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The places of the largest of N random numbers, sorted: every subset is as likely as any other."""
    keys = drawn(torch.rand, (B, N), generator, device, dtype=torch.float64)
    return keys.topk(kept(N, keep), 1, sorted=False).indices.sort(1).values


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x[b, ids[b, j]]."""
    return x.gather(1, _beside(ids.long(), x).expand(-1, -1, *x.shape[2:]))


def scatter_tokens(
    base: Tensor,
    y: Tensor,
    ids: Tensor,
    gate: float | Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """base with token ids[b, j] replaced by y[b, j], or by (1 - gate) base + gate y."""
    if gate is not None:
        g = torch.as_tensor(gate, dtype=_up(base).dtype, device=base.device)
        g = _beside(g.expand(ids.shape), base)
        y = ((1 - g) * _up(gather_tokens(base, ids)) + g * _up(y)).to(base.dtype)
    result = base.scatter(1, _beside(ids.long(), base).expand(-1, -1, *base.shape[2:]), y)
    return result if out is None else out.copy_(result)


def channel_mask(
    level: float | Tensor, channels: int, *, beta: float = 0.8, alpha: float = 4.0
) -> Tensor:
    """Denoising task routing (arXiv 2310.07138, 4.2): a window of floor(beta C) of C channels that
    starts at round((C - floor(beta C)) level^alpha)."""
    width = whole(beta * channels)
    level = torch.as_tensor(level).double()
    start = ((channels - width) * level**alpha).round()[..., None]
    channel = torch.arange(channels, device=level.device)
    return (channel >= start) & (channel < start + width)


def routed_linear(
    x: Tensor,
    weights: Tensor,
    modality: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """weights[m] x + bias[m], m = modality[b, n].  Mixture-of-Mamba, arXiv 2501.16295."""
    every = [linear(x, w, None if bias is None else bias[m]) for m, w in enumerate(weights)]
    return torch.stack(every, 2).gather(2, modality.long()[..., None, None].expand(
        -1, -1, 1, weights.shape[1]))[:, :, 0]  # fmt: skip
