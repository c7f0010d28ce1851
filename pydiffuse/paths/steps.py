"""From the arguments `path`, `reverse`, `cu_seqlens` and `layout` to the steps of a scan or convolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pydiffuse._core.checks import check_flag, describe, is_integer, narrowed, plain, without_values
from pydiffuse.paths import ScanPath, from_order

PathLike = ScanPath | Tensor | Sequence[int] | None


class Steps(NamedTuple):
    """The order of the tokens and where sequences start."""

    order: Tensor | None  # int32 [K, L]
    offsets: Tensor | None  # int32 [S + 1]
    sequences: int


def check_layout(op: str, layout: str) -> None:
    if layout not in ("bdl", "bld"):
        raise ValueError(f"{op}: layout is {layout!r}; accepted: 'bdl' (B, D, L) or 'bld' (B, L, D)")


def path_of(op: str, path: Any, L: int, argument: str = "path") -> ScanPath:
    if not isinstance(path, ScanPath):
        if not isinstance(path, Tensor | Sequence) and not hasattr(path, "__array__"):
            raise TypeError(
                f"{op}: {argument} is {describe(path)}; accepted: a ScanPath, a permutation of 0..{L - 1},"
                " or None"
            )
        if (
            isinstance(path, Tensor)
            and torch._C._are_functorch_transforms_active()
            and without_values(path)
        ):
            raise TypeError(f"{op}: {argument} is mapped by vmap; accepted: a path for all samples")
        try:
            path = from_order(path)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: {argument} is no permutation: {error}") from None
    if path.length != L:
        raise ValueError(
            f"{op}: {argument} is {path!r} of {path.length} tokens; accepted: one of {L}, as the input has"
        )
    return path


def usual_order(path: Any, reverse: Any, like: Tensor) -> tuple[bool, Tensor | None]:
    """Whether the steps are the tokens as they stand, or those of one path whose tensors are where `like` is;
    and that order."""
    if path is None:
        return reverse is False, None
    if path.__class__ is not ScanPath or reverse.__class__ is not bool:
        return False, None
    order = path.reversed().order if reverse else path.order
    return order.device == like.device, order


def steps_of(
    op: str, path: Any, reverse: bool, cu_seqlens: Any, L: int, device: torch.device
) -> tuple[Steps, int | None]:
    """The steps of a call, and the number of paths if a list of them was given."""
    check_flag(op, "reverse", reverse)
    many = isinstance(path, list | tuple) and (not path or isinstance(path[0], ScanPath))
    if many and not path:
        raise ValueError(f"{op}: path is an empty list; accepted: one ScanPath or more")
    paths = []
    for i, each in enumerate(path if many else () if path is None else (path,)):
        each = path_of(op, each, L, f"path[{i}]" if many else "path")
        each = each.reversed() if reverse else each
        paths.append(each.order if each.order.device == device else each.to(device).order)
    order = torch.stack(paths) if paths else None
    if order is None and reverse:
        order = torch.arange(L - 1, -1, -1, dtype=torch.int32, device=device)[None]
    offsets, sequences = _offsets(op, cu_seqlens, L, device)
    if offsets is not None and reverse:
        offsets = L - offsets.flip(0)
    return Steps(order, offsets, sequences), len(paths) if many else None


def _offsets(op: str, cu_seqlens: Any, L: int, device: torch.device) -> tuple[Tensor | None, int]:
    if cu_seqlens is None:
        return None, 1
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{op}: cu_seqlens is {describe(cu_seqlens)}; accepted: int32 or int64 [S + 1], or a list"
            )
        values = None if without_values(cu_seqlens) else cu_seqlens.tolist()
    else:
        if isinstance(cu_seqlens, np.ndarray) and cu_seqlens.ndim == 1:
            cu_seqlens = cu_seqlens.tolist()
        elif isinstance(cu_seqlens, Sequence) and not isinstance(cu_seqlens, str):
            cu_seqlens = [plain(o) for o in cu_seqlens]
        if not isinstance(cu_seqlens, list) or not all(is_integer(o) for o in cu_seqlens):
            raise TypeError(
                f"{op}: cu_seqlens is {describe(cu_seqlens)}; accepted: a tensor, an array or a list of S + 1 integers"
            )
        values = cu_seqlens
    if values is not None and (
        len(values) < 2 or values[0] != 0 or values[-1] != L or not _rising(values)
    ):
        given = values if len(values) < 9 else [*values[:8], "..."]
        raise ValueError(
            f"{op}: cu_seqlens is {given}; accepted: 0 <= ... <= {L}, never falling, ending at {L}"
        )
    if isinstance(cu_seqlens, Tensor):
        return narrowed(cu_seqlens.to(device), L + 1).contiguous(), cu_seqlens.numel() - 1
    cached = device.type == "cuda" and not torch.compiler.is_compiling() and not _modes()
    make = _cached_tensor_of if cached else _tensor_of
    return make(tuple(values or ()), device), len(cu_seqlens) - 1


def _rising(values: list[int]) -> bool:
    for a, b in pairwise(values):  # Dynamo does not sort symbols
        if a > b:
            return False
    return True


def _tensor_of(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _modes() -> bool:
    """Whether a dispatch mode (fake tensors, say) is on, whose tensors must not be kept."""
    return torch._C._len_torch_dispatch_stack() > 0


@functools.lru_cache(maxsize=64)
def _cached_tensor_of(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The same object again: no copy to the device within a captured graph."""
    with torch.inference_mode(False):
        return _tensor_of(values, device)
