"""The Functions of every family as one op, `pydiffuse::call`: what traced graphs hold where their gradients or
a vmap are still to come, as in torch.export and under a transform of torch.func within torch.compile.

A Function of the families takes tensors, numbers, names and tuples of these. The op takes the tensors, integers
and floats as such and the rest as a text that stands in the graph: "guidance.Guide (Call s:cfg i ...) t t".
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from pydiffuse._core.dispatch import _libraries

_library = _libraries["pydiffuse"]
_library.define(
    "call(str text, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

CONSTANTS = {"none": None, "true": True, "false": False}


def call(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The op for a Function with these arguments."""
    tensors: list[Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    text = name
    for arg in args:
        text = text + " " + _word(arg, tensors, ints, floats)
    return tuple(torch.ops.pydiffuse.call.default(text, tensors, ints, floats))


def _word(arg: Any, tensors: list[Any], ints: list[Any], floats: list[Any]) -> str:
    if arg is None:
        return "none"
    if isinstance(arg, Tensor):
        tensors.append(arg)
        return "t"
    if isinstance(arg, bool):
        return "true" if arg else "false"
    if isinstance(arg, int | torch.SymInt):
        ints.append(arg)
        return "i"
    if isinstance(arg, float):
        floats.append(arg)
        return "f"
    if isinstance(arg, str):
        return "s:" + arg
    if isinstance(arg, torch.dtype):
        return "d:" + str(arg).removeprefix("torch.")
    text = "(" + (type(arg).__name__ if hasattr(arg, "_fields") else "")
    for each in arg:
        text = text + " " + _word(each, tensors, ints, floats)
    return text + " )"


def _unpacked(
    text: str, tensors: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Any, list[Any]]:
    """The Function and its arguments."""
    name, *words = text.split(" ")
    stem, name = name.split(".")
    module = importlib.import_module(f"pydiffuse.{stem}.autograd")
    given = {"t": iter(tensors), "i": iter(ints), "f": iter(floats)}

    def values(rest: Iterator[str]) -> Iterator[Any]:
        for word in rest:
            if word == ")":
                return
            if word in given:
                yield next(given[word])  # type: ignore[call-overload]
            elif word in CONSTANTS:
                yield CONSTANTS[word]
            elif word.startswith("s:"):
                yield word[2:]
            elif word.startswith("d:"):
                yield getattr(torch, word[2:])
            else:
                within = values(rest)
                yield getattr(module, word[1:])(*within) if word[1:] else tuple(within)

    return getattr(module, name), list(values(iter(words)))


def _forward(*given: Any) -> list[Tensor]:
    function, args = _unpacked(*given)
    return list(function.forward(*args))


def _tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def _autograd(*given: Any) -> list[Tensor]:
    function, args = _unpacked(*given)
    tensors = given[1]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learns or (forward_ad._current_level >= 0 and any(map(_tangent, tensors))):
        with enable_single_level_autograd_function():
            return list(_at_one_level(function).apply(given, *args))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.pydiffuse.call.default(*given)


@cache
def _at_one_level(function: Any) -> Any:
    """The Function, with the op for its forward, at the level of torch.func that its caller is at."""

    def forward(given: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.pydiffuse.call.default(*given))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, inputs[1:], output)

    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *function.backward(_Shifted(ctx), *grads)

    methods = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


class _Shifted:
    """A context whose Function has one argument less, the first."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        return self._ctx.needs_input_grad[1:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[list[Tensor], list[int]]:
    function, args = _unpacked(*given)
    _, dims = _unpacked(given[0], in_dims[1], [None] * len(given[2]), [None] * len(given[3]))  # type: ignore[list-item]
    out, out_dims = function.mapped(partial(call, given[0].split(" ")[0]), info, tuple(dims), *args)
    return list(out), list(out_dims)


_library.impl("call", _forward, "CompositeExplicitAutograd")
_library.impl("call", _autograd, "Autograd")
torch.library.register_fake("pydiffuse::call", _forward, lib=_library)
torch.library.register_vmap("pydiffuse::call", _vmap, lib=_library)
