"""How a batch of samples lies in memory, and tensors that lie like it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def samples_together(t: Tensor, written: bool = True) -> bool:
    """Each sample's elements fill one stretch of memory, in whatever order of dimensions; and, for
    a tensor that is written, no two samples share one."""
    if t.is_contiguous():
        return True
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
    per_sample = t.shape[1:].numel()
    return span == per_sample and (t.shape[0] == 1 or not written or t.stride(0) >= per_sample)


def new_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output with t's order of dimensions if its samples fill memory, contiguous if not."""
    if t.is_contiguous():
        return torch.empty_like(t, dtype=dtype)
    if not samples_together(t):
        return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
    per_sample = t.shape[1:].numel()
    return torch.empty_strided(
        t.shape, (per_sample, *t.stride()[1:]), dtype=dtype or t.dtype, device=t.device
    )


def all_ordered(tensors: tuple[Tensor, ...], like: Tensor) -> bool:
    stride = like.stride()
    for t in tensors:
        if t.stride() != stride:
            return False
    return True


def ordered(t: Tensor, like: Tensor) -> Tensor:
    """t itself if its samples lie in memory in the order of `like`'s, else a copy that does."""
    if t.stride() == like.stride():
        return t
    pairs = zip(t.shape[1:], t.stride()[1:], like.stride()[1:], strict=True)
    if all(size == 1 or own == other for size, own, other in pairs):
        return t
    return new_like(like, t.dtype).copy_(t)


def dense(t: Tensor) -> Tensor:
    """t [..., L, D] itself if its channels or its tokens are next to each other in memory, else a copy."""
    strides, sizes = t.stride(), t.shape
    if strides[-1] == 1 or strides[-2] == 1 or sizes[-1] == 1 or sizes[-2] == 1:
        return t
    return t.contiguous()


def new_tokens(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An output [..., L, D]: tokens next to each other where t's are, else channels."""
    if t.stride(-2) == 1 and t.stride(-1) != 1:
        turned = (*shape[:-2], shape[-1], shape[-2])
        return torch.empty(turned, dtype=dtype or t.dtype, device=t.device).transpose(-1, -2)
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device)


def new_heads(t: Tensor) -> Tensor:
    """An output like t, [B, H, S, D] or [B, S, H, D] in memory as t is."""
    if 0 < t.stride(1) < t.stride(2):  # a token's heads lie together, maybe with keys and values between
        B, H, S, D = t.shape
        return torch.empty(B, S, H, D, dtype=t.dtype, device=t.device).transpose(1, 2)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def features_contiguous(t: Tensor) -> Tensor:
    """t [..., D] itself if the features of each token are next to each other in memory, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def of_gradient(layout: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`layout` of a gradient: while Dynamo (torch 2.13) traces a backward, it knows no strides of it."""
    return t.contiguous() if torch.compiler.is_compiling() else layout(t)
