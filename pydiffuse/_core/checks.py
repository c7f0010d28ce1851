"""Argument checks that every op shares: each error names the op, the argument, what came, what fits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Parameter

from pydiffuse._core import dispatch
from pydiffuse._core.layouts import new_like, samples_together
from pydiffuse._core.rules import MAX_PREDS
from pydiffuse._core.words import check_flag as check_flag
from pydiffuse._core.words import describe as describe
from pydiffuse._core.words import plain as plain

PROXY = torch._C._TorchDispatchModeKey.PROXY
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def alike(tensors: Sequence[Tensor]) -> bool:
    """The common case in a microsecond: every tensor is like the first."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    for t in tensors[1:]:
        if not (isinstance(t, Tensor) and t.shape == shape and t.dtype is dtype and t.device == device):
            return False
    return True


def widest(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating-point tensors in the widest dtype among them, as it has it for torch.cat; elsewhere,
    and where there is nothing to widen, the tensors as they are."""
    found = {t.dtype for t in tensors if isinstance(t, Tensor)}
    if len(found) < 2 or not found <= set(DTYPES):
        return tensors
    device = next(t.device.type for t in tensors if isinstance(t, Tensor))
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = functools.reduce(torch.promote_types, found)
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in tensors)


def parameter_dtypes(like: Tensor) -> tuple[torch.dtype, ...]:
    """What a parameter may be whose arithmetic is float32: that; under autocast, which may have cast it, more."""
    return DTYPES if not like.is_meta and torch.is_autocast_enabled(like.device.type) else DTYPES[:1]


def check_tensors(op: str, argument: str, tensors: Sequence[Tensor], *, same_dtype: bool = True) -> None:
    """Tensors [B, ...] of an accepted dtype, alike in shape, device and, as asked, dtype."""
    if not tensors:
        raise ValueError(f"{op}: {argument} is empty; accepted: 1 to {MAX_PREDS} tensors")
    if len(tensors) > MAX_PREDS + 3:
        raise ValueError(f"{op}: {argument} holds {len(tensors)} tensors; accepted: 1 to {MAX_PREDS}")
    first = tensors[0]
    if alike(tensors) and first.dtype in DTYPES and first.dim() > 0:
        return
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {argument} holds {describe(t)}; accepted: tensors [B, ...]")
        if t.dtype not in DTYPES and not (t.dtype is torch.float64 and dispatch.forced_reference()):
            more = (
                '; float64 runs inside `with pydiffuse.use_backend("reference")`'
                if t.dtype is torch.float64
                else ""
            )
            raise TypeError(
                f"{op}: {argument} holds {describe(t)}; accepted: float32, bfloat16, float16{more}"
            )
        if t is first:
            continue
        if t.shape != first.shape or t.device != first.device or (same_dtype and t.dtype != first.dtype):
            raise ValueError(
                f"{op}: {argument} must be alike in shape, device{' and dtype' if same_dtype else ''};"
                f" given {describe(first)} and {describe(t)}"
            )
    if first.dim() == 0:
        raise ValueError(f"{op}: {argument} has no batch dimension; accepted: tensors [B, ...]")


def check_scalar(op: str, argument: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or a float tensor with one value or one per sample; returned as (B,)."""
    value = plain(value)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number or a (B,) tensor")
        return torch.full((like.shape[0],), float(value), dtype=torch.float64, device=like.device)
    B = like.shape[0]
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != B):
        raise ValueError(
            f"{op}: {argument} has shape {tuple(value.shape)}; accepted: a number or ({B},),"
            " a value per sample"
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number or a float tensor")
    if value.device != like.device and value.dim() == 1:
        raise ValueError(f"{op}: {argument} is on {value.device}; the predictions are on {like.device}")
    return value.to(like.device).expand(B)


def check_outs(
    op: str, outs: Sequence[Tensor], likes: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Each output is like its tensor in shape, dtype and device, and shares memory with nothing, or
    with an input position by position."""
    if len(outs) != len(likes):
        raise ValueError(f"{op}: out holds {len(outs)} tensors; accepted: {len(likes)}")
    for i, (out, like) in enumerate(zip(outs, likes, strict=True)):
        argument = "out" if len(outs) == 1 else f"out[{i}]"
        fits = isinstance(out, Tensor) and out.shape == like.shape
        if not fits or out.dtype != like.dtype or out.device != like.device:
            raise ValueError(f"{op}: {argument} is {describe(out)}; accepted: {describe(like)}")
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            continue
        for other in outs[:i]:
            if _overlap(out, other):
                raise ValueError(
                    f"{op}: {argument} shares memory with another output; each needs its own"
                )
        for t in inputs:
            if t is out or not _overlap(t, out):
                continue
            if t.data_ptr() != out.data_ptr() or t.stride() != out.stride() or t.dtype != out.dtype:
                raise ValueError(
                    f"{op}: {argument} overlaps an input without being that input; give it its own memory"
                )


def _extent(t: Tensor) -> tuple[int, int]:
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + span * t.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common: an element, not only a stretch that both lie in."""
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    if not (a0 < b1 and b0 < a1 and a.numel() and b.numel() and a.device == b.device):
        return False
    try:
        return bool(np.shares_memory(_addresses(a), _addresses(b), max_work=10**6))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Memory:
    """What NumPy asks for an array; it looks at addresses alone, whosever they are."""

    def __init__(self, t: Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "data": (t.data_ptr(), True),
            "shape": tuple(t.shape),
            "strides": tuple(stride * size for stride in t.stride()),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _addresses(t: Tensor) -> np.ndarray:
    return np.asarray(_Memory(t))


def check_no_grad(op: str, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """The last look before `outs` are written."""
    if torch.is_grad_enabled():
        for what, given in (("an input", tensors), ("out", outs)):
            if any(t.requires_grad for t in given):
                raise ValueError(
                    f"{op}: out= takes no part in autograd, and {what} requires a gradient;"
                    " leave out= away, or call under torch.no_grad()"
                )
    written(outs)


def written(outs: Sequence[Tensor]) -> None:
    """A backward that saved one of them will say so, as it does of any operation in place."""
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        torch.autograd.graph.increment_version([o for o in outs if not o.is_inference()])


@contextmanager
def writable(out: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors the kernels can write: `out` itself where one order of memory serves all of it, else
    fresh ones that are copied over at the end."""
    like = out[0] if samples_together(out[0]) else new_like(out[0])
    inner = like.stride()[1:]
    targets = [
        o if samples_together(o) and o.stride()[1:] == inner else new_like(like, o.dtype) for o in out
    ]
    yield targets
    for o, target in zip(out, targets, strict=True):
        if o is not target:
            o.copy_(target)


def check_shape(
    op: str,
    argument: str,
    t: object,
    sizes: Sequence[int | None],
    names: str,
    *,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """A tensor of the sizes (None: any) that `names` spells out, of one of `dtypes`, on like's device.

    Inside `use_backend("reference")` float64 passes, too.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {argument} is {describe(t)}; accepted: a tensor {names}")
    fits = t.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(t.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{op}: {argument} is {describe(t)}; accepted: {names}, here ({wanted})")
    if t.dtype not in dtypes and not (
        dispatch.forced_reference() and (t.dtype is torch.float64 or t.is_complex())
    ):
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        more = (
            '; float64 runs inside `with pydiffuse.use_backend("reference")`'
            if t.dtype is torch.float64
            else ""
        )
        raise TypeError(f"{op}: {argument} is {describe(t)}; accepted: {accepted}{more}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{op}: {argument} is on {t.device}; the input is on {like.device}")


def is_integer(value: object) -> bool:
    """An integer, in a traced graph also one that stands for a size."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def values_hidden(t: Tensor) -> bool:
    """Whether looking at t's values would be a sync, or is impossible."""
    return without_values(t) or t.device.type != "cpu"


def without_values(t: Tensor) -> bool:
    """Whether t is a symbol of a trace, fake, or mapped by vmap."""
    if torch.compiler.is_compiling() or t.is_meta:
        return True
    if torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(PROXY):  # of make_fx
        return True
    if t.__class__ in (Tensor, Parameter) and not torch._C._are_functorch_transforms_active():
        return False
    while is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            return True
        t = get_unwrapped(t)
    return is_fake(t)


def narrowed(ids: Tensor, count: int) -> Tensor:
    """Places 0 to count - 1 as int32. What is outside stays outside, also where its low half would not be."""
    if ids.dtype is torch.int64:
        ids = ids.clamp(-1, count)
    return ids.to(torch.int32)
