"""What the Triton kernels of every family share: tensors as rows of samples, launches, rounding."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse.autograd.guidance import ordered, samples_together

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@triton.jit
def narrow(y, dtype: tl.constexpr):
    if INTERPRETED:  # it cuts float32 off to bfloat16 instead of rounding
        if dtype == tl.bfloat16:
            bits = y.to(tl.uint32, bitcast=True)
            y = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return y.to(dtype)


class Rows(NamedTuple):
    """The tensors of a call as rows [batch, n]: each sample's n elements lie together, in one order."""

    batch: int
    n: int

    @classmethod
    def of(
        cls, op: str, outs: Sequence[Tensor], inputs: Iterable[Tensor]
    ) -> tuple[Rows, list[Tensor]]:
        """The rows of a call, and its inputs in the order of its first output."""
        like = outs[0]
        if not all(samples_together(t) and ordered(t, like) is t for t in outs):
            raise ValueError(f"{op}: outputs must have samples that fill memory in one order")
        rows = cls(len(like), like.numel() // len(like) if len(like) else 0)
        return rows, [ordered(t, like) for t in inputs]

    def strides(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Elements from one sample to the next."""
        return tuple(self.n if self.batch == 1 else t.stride(0) for t in tensors)

    def vector(self, tensors: Sequence[Tensor]) -> int:
        """Elements in a load of 16 bytes of the narrowest tensor; 1 where Triton will not see that
        they are aligned."""
        aligned = self.n % 16 == 0 and all(stride % 16 == 0 for stride in self.strides(tensors))
        if not (aligned and all(t.data_ptr() % 16 == 0 for t in tensors)):
            return 1
        return 16 // min(t.element_size() for t in tensors)


class Case(NamedTuple):
    """A kernel to compile ahead of time: triton.compile(ASTSource(kernel, signature, constexprs,
    attrs), target=..., options=options)."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int

    def case(self, name: str) -> Case:
        """The variant of the kernel that this launch would run."""
        constexprs: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], Any] = {}

        def type_of(value: Any, special: bool, *path: int) -> Any:
            if isinstance(value, tuple):
                return tuple(type_of(v, special, *path, i) for i, v in enumerate(value))
            if value is None or special and value == 1 and type(value) is int:
                constexprs[path] = value
                return "constexpr"
            address = value.data_ptr() if isinstance(value, Tensor) else value
            if special and not isinstance(value, float) and address % 16 == 0:
                attrs[path] = [["tt.divisibility", 16]]
            if isinstance(value, Tensor):
                return "*" + TYPES[value.dtype]
            return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"

        signature = {}
        for i, parameter in enumerate(self.kernel.params):
            if parameter.name in self.constants:
                constexprs[(i,)] = self.constants[parameter.name]
                signature[parameter.name] = "constexpr"
            else:
                special = not parameter.do_not_specialize
                signature[parameter.name] = type_of(self.args[i], special, i)
        return Case(name, self.kernel, signature, constexprs, {"num_warps": self.warps}, attrs)


def run(launches: Sequence[Launch], like: Tensor) -> None:
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        for kernel, programs, args, constants, warps in launches:
            kernel[(programs,)](*args, **constants, num_warps=warps)
