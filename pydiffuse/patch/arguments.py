"""The arguments of the patch functions, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pydiffuse._core.checks import check_tensors, describe, is_integer, plain, values_hidden
from pydiffuse._core.dispatch import forced
from pydiffuse._core.grids import PatchSize, count_patches, grid_of, patch_sizes

Scalar = float | Tensor


class Patches(NamedTuple):
    """How the tensors of a call are divided."""

    batch: int
    total: int
    grid: tuple[int, ...]


def patches_of(op: str, names: str, images: Sequence[Tensor], patch_size: PatchSize) -> Patches:
    """Checks the images [B, C, *spatial] of a call and divides them."""
    check_tensors(op, names, images, same_dtype=False)
    shape = images[0].shape
    if torch.compiler.is_compiling():
        return _divided(op, shape, patch_size)
    try:
        return remembered(op, shape, patch_size)
    except TypeError:  # symbols, in other traces, do not hash
        return _divided(op, shape, patch_size)


def _divided(op: str, shape: Sequence[int], patch_size: PatchSize) -> Patches:
    sizes = patch_sizes(op, shape, patch_size)
    return Patches(shape[0], count_patches(shape, sizes), tuple(grid_of(shape, sizes).flat))


_divisions = lru_cache(maxsize=256, typed=True)(_divided)


def remembered(op: str, shape: Sequence[int], patch_size: PatchSize) -> Patches:
    patch_size = plain(patch_size)
    return _divisions(op, shape, patch_size if isinstance(patch_size, int | None) else tuple(patch_size))


def check_name(op: str, argument: str, value: str, accepted: Sequence[str]) -> int:
    if value not in accepted:
        raise ValueError(f"{op}: unknown {argument} {value!r}; accepted: {', '.join(accepted)}")
    return tuple(accepted).index(value)


def check_level(op: str, argument: str, value: Scalar, patches: Patches, like: Tensor) -> Tensor:
    """A level for every patch, float32 [B, N] in [0, 1].

    The CPU kernels look at the values before they touch memory; on a GPU that would be a sync, and a
    level outside [0, 1] makes its patch NaN.
    """
    B, N = patches.batch, patches.total
    value = plain(value)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number, (B,) or (B, N)")
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {argument} is {value}; accepted: 0 (noise) to 1 (data)")
        return torch.full((1, 1), value, dtype=torch.float32, device=like.device).expand(B, N)
    if value.shape == (B, N) or value.dim() == 0:
        table = value
    elif value.shape == (B,):
        table = value[:, None]
    else:
        raise ValueError(
            f"{op}: {argument} has shape {tuple(value.shape)}; accepted: a number, ({B},) or ({B}, {N}),"
            f" a value for each of the {N} patches"
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number or a float tensor")
    if value.device != like.device:
        raise ValueError(f"{op}: {argument} is on {value.device}; the images are on {like.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {argument} requires a gradient, but levels take none; detach it")
    check_range(op, argument, value)
    if table.dtype is not torch.float32:
        table = table.float()
    return table if table.shape == (B, N) else table.expand(B, N)


def check_range(op: str, argument: str, value: Tensor) -> None:
    """For the backends whose kernels do not look."""
    if forced() not in (None, "cpu"):
        check_within(op, argument, value)


def check_within(op: str, argument: str, value: Tensor) -> None:
    """Levels that no kernel looks at; on a GPU, where looking would be a sync, they pass."""
    if not values_hidden(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{op}: {argument} holds a value outside [0, 1] or NaN; accepted: 0 (noise) to 1 (data)"
        )


def check_mask(op: str, mask: Tensor | None, patches: Patches, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    shape = (patches.batch, patches.total)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{op}: mask is {describe(mask)}; accepted: a torch.bool tensor {shape}")
    if mask.device != like.device:
        raise ValueError(f"{op}: mask is on {mask.device}; the images are on {like.device}")
    return mask.contiguous()


def check_score(op: str, score: Tensor, k: int) -> Patches:
    check_tensors(op, "score", (score,))
    if score.dim() != 2:
        raise ValueError(f"{op}: score has shape {tuple(score.shape)}; accepted: (B, N)")
    B, N = score.shape
    if not is_integer(k) or not 0 <= k <= N:
        raise ValueError(f"{op}: k is {k!r}; accepted: 0 to {N}, the number of patches")
    return Patches(B, N, ())


def check_dt(op: str, dt: Scalar | None, patches: Patches) -> Scalar:
    """A number >= 0, (B,) or (B, N)."""
    dt = plain(dt)
    B, N = patches.batch, patches.total
    if isinstance(dt, Tensor):
        if dt.shape == () or dt.shape == (B,) or dt.shape == (B, N):
            if not values_hidden(dt) and not bool(((dt >= 0) & dt.isfinite()).all()):
                raise ValueError(
                    f"{op}: dt holds a value that is negative or not finite; accepted: 0 or more"
                )
            return dt
    elif isinstance(dt, int | float) and not isinstance(dt, bool) and 0 <= dt < math.inf:
        return dt
    given = describe(dt) if isinstance(dt, Tensor) else repr(dt)
    raise ValueError(f"{op}: dt is {given}; accepted: a number >= 0, ({B},) or {(B, N)}")


def check_scales(op: str, scale: Scalar, like: Tensor) -> tuple[float, Tensor | None]:
    """A number, or float32 [B]."""
    scale = plain(scale)
    if isinstance(scale, bool) or not isinstance(scale, int | float | Tensor):
        raise TypeError(f"{op}: scale is {describe(scale)}; accepted: a number or a (B,) tensor")
    if not isinstance(scale, Tensor):
        return float(scale), None
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != like.shape[0]):
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}; accepted: a number or ({like.shape[0]},)"
        )
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: scale requires a gradient, which is not computed here; guide with pydiffuse.cfg first"
        )
    return 1.0, scale.to(like.device, torch.float32).expand(like.shape[0]).contiguous()


def check_table(op: str, argument: str, table: Tensor | None, patches: Patches, like: Tensor) -> None:
    """A value per patch that may require a gradient."""
    if table is None:
        return
    shape = (patches.batch, patches.total)
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape != shape:
        raise ValueError(f"{op}: {argument} is {describe(table)}; accepted: a float tensor {shape}")
    if table.device != like.device:
        raise ValueError(f"{op}: {argument} is on {table.device}; the images are on {like.device}")
