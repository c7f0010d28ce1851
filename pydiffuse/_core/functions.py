"""What the autograd functions of every family share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from pydiffuse._core.traced import call


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether a call must go through autograd: a gradient or a tangent is due, or may be later, in an exported
    graph; or a functorch transform is on."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or may_learn()


OPERATIONS: dict[str, Any] = {}
"""By stem and name."""


def may_learn() -> bool:
    """Whether a graph is made in which gradients are due that no tensor tells of yet: of torch.export,
    torch.jit.trace, or of a transform of torch.func within torch.compile."""
    if not torch.compiler.is_compiling():
        return torch._C._is_tracing()
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


class Operation(Function):
    """A Function that every transform knows: vmap by `mapped`, graphs by `traced.call`. It takes no keywords and
    returns a tuple."""

    def __init_subclass__(cls) -> None:
        OPERATIONS[f"{cls.__module__.split('.')[-2]}.{cls.__name__}"] = cls

    @classmethod
    def mapped(cls, apply: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """The results of all samples of a vmap, by one `apply` or more of this Function, and their dimensions."""
        raise NotImplementedError

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return cls.mapped(cls.apply, info, in_dims, *args)


# vmap: one more batch dimension is more samples.


def folded(info: Any, dim: int | None, t: Any) -> Any:
    """A tensor [V, B, ...] as [V B, ...], contiguous, from one that vmap maps over `dim`."""
    if not isinstance(t, Tensor):
        return t
    t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1).contiguous()


def unfolded(info: Any, out: tuple[Tensor | None, ...]) -> Any:
    """What a Function returns, and its dimensions, from the results of what was folded."""
    V = info.batch_size
    parts = tuple(None if t is None else t.unflatten(0, (V, t.shape[0] // V)) for t in out)
    return parts, tuple(None if t is None else 0 for t in parts)


class Batched(Operation):
    """A Function whose tensors are all [B, ...]: vmap adds samples."""

    @classmethod
    def mapped(cls, apply: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return unfolded(info, apply(*(folded(info, d, t) for d, t in zip(in_dims, args, strict=True))))


def differentiable(name: str, *args: Any) -> Any:
    """`OPERATIONS[name].apply`, as graphs can hold it. Dynamo (torch 2.11 to 2.13) can trace it where a gradient
    is due; where nothing requires one it would lose an argument, so there the forward is the whole of it."""
    function = OPERATIONS[name]
    if may_learn():
        return call(name, *args)
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if not needs_function(*(t for t in args if isinstance(t, Tensor))):
        return function.forward(*args)
    return function.apply(*args)


def derive(function: type[Function], *args: Any) -> Any:
    """A Function inside a backward. Compiled graphs have no second derivative, and Dynamo (torch 2.13)
    loses the arguments of a nested apply: there its forward is the whole of it."""
    if torch.compiler.is_compiling():
        return function.forward(*args)
    return function.apply(*args)


def run(op: Callable[..., None], *args: Any) -> None:
    """Calls an op whose CPU kernel looks at levels, rows, ids or offsets: what nobody could look at before, in a
    vmap, say, is an error of the same kind."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        op(*args)
    except RuntimeError as error:
        text = str(error).split("\n")[0]
        if not any(words in text for words in ("outside [0, 1]", " holds ", "must rise")):
            raise
        raise ValueError(re.sub(r"^\w+, [^ ]+:\d+, ", "", text)) from None


def second_derivative(op: str, more: str = "") -> NotImplementedError:
    """What the backward of a backward raises."""
    return NotImplementedError(
        f"{op}: the kernels differentiate once; for a second derivative run it inside"
        f' `with pydiffuse.use_backend("reference")`{more}'
    )


def vmap_batches(
    apply: Callable[..., Any],
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
            elif t.dim() - (dim is not None) == 3 and i in (5, 6):
                fold = fold and dim is None
                flat.append(t)
            else:
                flat.append(folded(info, dim, t))
        if fold:
            return unfolded(info, apply(*flat))
    calls = []
    for i in range(size):
        one = [
            t if dim is None or not isinstance(t, Tensor) else t.select(dim, i).contiguous()
            for dim, t in zip(in_dims, args, strict=True)
        ]
        calls.append(apply(*one))
    stacked = tuple(None if c[0] is None else torch.stack(c) for c in zip(*calls, strict=True))
    return stacked, tuple(None if s is None else 0 for s in stacked)
