"""What the autograd functions of every family share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call must go through autograd: a gradient or a tangent is due, or a functorch transform is on."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needed(ctx: Any) -> tuple[bool, ...]:
    """`ctx.needs_input_grad`; all of them where Dynamo traces a transform of torch.func, of which it says
    that none is (torch 2.13)."""
    if torch.compiler.is_compiling() and not any(ctx.needs_input_grad):
        return (True,) * len(ctx.needs_input_grad)
    return ctx.needs_input_grad


# vmap: one more batch dimension is more samples.


def _fold(info: Any, dims: tuple[Any, ...], tensors: tuple[Any, ...]) -> list[Any]:
    folded = []
    for dim, t in zip(dims, tensors, strict=True):
        if not isinstance(t, Tensor):
            folded.append(t)
            continue
        t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        folded.append(t.flatten(0, 1))
    return folded


def _unfold(info: Any, out: Any) -> Any:
    def unfold(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unflatten(0, (info.batch_size, -1))

    if isinstance(out, tuple):
        return tuple(map(unfold, out)), tuple(None if t is None else 0 for t in out)
    return unfold(out), 0


class Batched(Function):
    """A Function whose tensors are all [B, ...]: vmap adds samples."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _unfold(info, cls.apply(*_fold(info, in_dims, args)))


def differentiable(function: type[Function], *args: Any) -> Any:
    """`function.apply`, as Dynamo (torch 2.11 to 2.13) can trace it: where nothing requires a gradient it would
    lose an argument, so there the forward is the whole of it; within a transform of torch.func it knows of no
    gradient of a tensor that it has seen before, so there each gets a new name."""
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*(t.view_as(t) if isinstance(t, Tensor) else t for t in args))
    if not needs_function(*(t for t in args if isinstance(t, Tensor))):
        return function.forward(*args)
    return function.apply(*args)


def derive(function: type[Function], *args: Any) -> Any:
    """A Function inside a backward. Compiled graphs have no second derivative, and Dynamo (torch 2.13)
    loses the arguments of a nested apply: there its forward is the whole of it."""
    if torch.compiler.is_compiling():
        return function.forward(*args)
    return function.apply(*args)


def second_derivative(op: str, more: str = "") -> NotImplementedError:
    """What the backward of a backward raises."""
    return NotImplementedError(
        f"{op}: the kernels differentiate once; for a second derivative run it inside"
        f' `with pydiffuse.use_backend("reference")`{more}'
    )


def vmap_batches(
    function: type[Function],
    info: Any,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
    parameters: tuple[int, ...] | None,
) -> Any:
    """vmap as more samples of one batch; call by call where a parameter (an argument without a batch
    dimension) is mapped, too. parameters: their places; None if nothing folds."""
    size = info.batch_size
    if parameters is not None and all(in_dims[i] is None for i in parameters if i < len(args)):
        # Constant B and C are parameters by their number of dimensions.
        flat, fold = [], True
        for i, (dim, t) in enumerate(zip(in_dims, args, strict=True)):
            if not isinstance(t, Tensor) or i in parameters:
                flat.append(t)
            elif t.dim() - (dim is not None) == 3:
                fold = fold and dim is None
                flat.append(t)
            else:
                t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
                t = t.flatten(0, 1)
                flat.append(t.contiguous() if i == 10 else t)  # initial
        if fold:
            out = function.apply(*flat)
            outs = out if isinstance(out, tuple) else (out,)
            split = tuple(None if o is None else o.unflatten(0, (size, -1)) for o in outs)
            dims = tuple(None if o is None else 0 for o in outs)
            return (split, dims) if isinstance(out, tuple) else (split[0], 0)
    calls = []
    for i in range(size):
        one = [
            t if dim is None or not isinstance(t, Tensor) else t.select(dim, i)
            for dim, t in zip(in_dims, args, strict=True)
        ]
        out = function.apply(*one)
        calls.append(out if isinstance(out, tuple) else (out,))
    stacked = tuple(None if c[0] is None else torch.stack(c) for c in zip(*calls, strict=True))
    dims = tuple(None if s is None else 0 for s in stacked)
    return (stacked, dims) if isinstance(out, tuple) else (stacked[0], 0)
