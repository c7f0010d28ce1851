"""From the arguments of a public scan function to one op call.

The ops know one order of dimensions, tokens before channels: `bdl` tensors arrive as transposed views,
and every path runs forward: `reverse` has turned the order, the sequences and their states around.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse.checks import DTYPES, check_flag, check_shape, describe
from pydiffuse.paths import ScanPath, from_order

MAX_STATES = 256
CHUNK = 64
"""Steps from one saved state to the next, as in csrc/scan.h."""
PathLike = ScanPath | Tensor | Sequence[int] | None


class Steps(NamedTuple):
    """The order of the tokens and where sequences start."""

    order: Tensor | None  # int32 [K, L]
    offsets: Tensor | None  # int32 [S + 1]
    sequences: int


class ScanArguments(NamedTuple):
    """The tensors of a scan as the ops take them. K paths, S sequences, G groups, N states."""

    u: Tensor  # [B, L, D]
    delta: Tensor  # [B, K, L, D]
    A: Tensor  # [K, D, N]
    B: Tensor  # [B, K, G, L, N] or [K, D, N]
    C: Tensor
    D: Tensor | None  # [K, D]
    z: Tensor | None  # [B, L, D]
    delta_bias: Tensor | None  # [K, D]
    initial: Tensor | None  # [B, S, K, D, N]
    order: Tensor | None  # [K, L]
    offsets: Tensor | None  # [S + 1]
    softplus: bool


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
        try:
            path = from_order(path)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: {argument} is no permutation: {error}") from None
    if path.length != L:
        raise ValueError(
            f"{op}: {argument} is {path!r} of {path.length} tokens; accepted: one of {L}, as the input has"
        )
    return path


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
        values = None if torch.compiler.is_compiling() else cu_seqlens.tolist()
    else:
        if not isinstance(cu_seqlens, Sequence) or not all(type(o) is int for o in cu_seqlens):
            raise TypeError(
                f"{op}: cu_seqlens is {describe(cu_seqlens)}; accepted: a tensor or a list of S + 1 integers"
            )
        values = list(cu_seqlens)
    if values is not None and (
        len(values) < 2 or values[0] != 0 or values[-1] != L or values != sorted(values)
    ):
        given = values if len(values) < 9 else [*values[:8], "..."]
        raise ValueError(
            f"{op}: cu_seqlens is {given}; accepted: 0 <= ... <= {L}, never falling, ending at {L}"
        )
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens.to(device=device, dtype=torch.int32).contiguous(), cu_seqlens.numel() - 1
    cached = device.type == "cuda" and not torch.compiler.is_compiling() and not _modes()
    make = _cached_tensor_of if cached else _tensor_of
    return make(tuple(values or ()), device), len(cu_seqlens) - 1


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


def scan_arguments(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    path: Any,
    reverse: bool,
    initial: Tensor | None,
    cu_seqlens: Any,
    layout: str,
) -> tuple[ScanArguments, int | None]:
    """Checked, and in the ops' order of dimensions; and the number of paths if a list was given."""
    check_layout(op, layout)
    check_flag(op, "delta_softplus", softplus)
    bdl = layout == "bdl"
    names = "(B, D, L)" if bdl else "(B, L, D)"
    check_shape(op, "u", u, (None, None, None), names)
    batch, channels, L = u.shape if bdl else (u.shape[0], u.shape[2], u.shape[1])
    steps, K = steps_of(op, path, reverse, cu_seqlens, L, u.device)
    paths = K or 1
    each = names.replace("B, ", "B, K, ")
    inner = (channels, L) if bdl else (L, channels)

    def tokens(t: Tensor) -> Tensor:
        return dense(t.transpose(-1, -2) if bdl else t)

    shared = isinstance(delta, Tensor) and delta.dim() == 3
    wanted = (batch, *inner) if K is None or shared else (batch, paths, *inner)
    check_shape(op, "delta", delta, wanted, names if K is None else f"{names} or {each}", like=u)
    if z is not None:
        check_shape(op, "z", z, (batch, *inner), names, like=u)
    delta = tokens(delta)
    delta = delta[:, None].expand(-1, paths, -1, -1) if shared else delta

    def parameter(name: str, t: Tensor | None, *sizes: int | None) -> Tensor | None:
        if t is None:
            return None
        one = isinstance(t, Tensor) and t.dim() == len(sizes)
        text = "(D, N)" if len(sizes) == 2 else "(D,)"
        text = text if K is None else f"{text} or {text.replace('(', '(K, ')}"
        expected = sizes if K is None or one else (paths, *sizes)
        check_shape(op, name, t, expected, text, like=u, dtypes=(torch.float32,))
        return (t.expand(paths, *t.shape) if one else t).contiguous()

    if isinstance(A, Tensor) and A.is_complex():
        raise TypeError(
            f"{op}: A is {describe(A)}; accepted: float32; a complex A runs inside"
            ' `with pydiffuse.use_backend("reference")`'
        )
    A = parameter("A", A, channels, None)  # type: ignore[assignment]
    N = A.shape[-1]
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{op}: A has {N} states; accepted: 1 to {MAX_STATES}")

    def weights(name: str, t: Tensor) -> Tensor:
        if isinstance(t, Tensor) and t.dim() == 2:
            check_shape(op, name, t, (channels, N), "(D, N)", like=u)
            return t.float().expand(paths, channels, N).contiguous()
        last = "N, L" if bdl else "L, N"
        order = (N, L) if bdl else (L, N)
        dims = t.dim() if isinstance(t, Tensor) else 3
        sizes: tuple[int | None, ...]
        if K is None:
            text = f"(B, {last}), {'(B, G, N, L)' if bdl else '(B, L, G, N)'} or (D, N)"
            sizes = (
                (batch, *order) if dims == 3 else (batch, None, *order) if bdl else (batch, L, None, N)
            )
        else:
            text = f"(B, {last}), (B, K, {last}), (B, K, {'G, N, L' if bdl else 'L, G, N'}) or (D, N)"
            sizes = (batch, paths, None, *order) if bdl else (batch, paths, L, None, N)
            sizes = (batch, paths, *order) if dims == 4 else sizes
        check_shape(op, name, t, (batch, *order) if dims == 3 else sizes, text, like=u)
        if K is None or dims == 3:
            t = t[:, None].expand(-1, paths, *t.shape[1:])
        if t.dim() == 4:
            return t.transpose(-1, -2).unsqueeze(2) if bdl else t.unsqueeze(2)
        return t.transpose(-1, -2) if bdl else t.transpose(2, 3)

    B, C = weights("B", B), weights("C", C)
    groups = {t.shape[2] for t in (B, C) if t.dim() == 5}
    if len(groups) > 1:
        raise ValueError(f"{op}: B has {B.shape[2]} groups and C has {C.shape[2]}; they must be equal")
    if groups and (min(groups) == 0 or channels % min(groups)):
        raise ValueError(
            f"{op}: B and C have {min(groups)} groups and there are {channels} channels;"
            " the groups must divide the channels"
        )
    if initial is not None:
        one, several = cu_seqlens is None, K is not None
        sizes = (batch, *(() if one else (steps.sequences,)), *((paths,) if several else ()), channels, N)
        text = f"(B, {'' if one else 'S, '}{'K, ' if several else ''}D, N)"
        check_shape(op, "initial_state", initial, sizes, text, like=u, dtypes=(torch.float32,))
        initial = initial.reshape(batch, steps.sequences, paths, channels, N)
        initial = (initial.flip(1) if reverse and not one else initial).contiguous()
    return ScanArguments(
        dense(u.transpose(1, 2) if bdl else u),
        delta,
        A,
        B,
        C,
        parameter("D", D, channels),
        None if z is None else tokens(z),
        parameter("delta_bias", delta_bias, channels),
        initial,
        steps.order,
        steps.offsets,
        softplus,
    ), K


def last_state(last: Tensor, K: int | None, cu_seqlens: Any, reverse: bool) -> Tensor:
    """[B, S, K, D, N] with the dimensions that the caller has."""
    last = last.flip(1) if reverse and cu_seqlens is not None else last
    last = last if K is not None else last[:, :, 0]
    return last if cu_seqlens is not None else last[:, 0]


__all__ = [
    "CHUNK", "DTYPES", "MAX_STATES", "PathLike", "ScanArguments", "Steps", "check_layout", "dense", "last_state",
    "new_tokens", "path_of", "scan_arguments", "steps_of",
]  # fmt: skip
