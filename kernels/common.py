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

from pydiffuse._core.layouts import ordered, samples_together

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
WARPS = 4
CHUNKS = tl.constexpr(4 if INTERPRETED else 512)  # of a row, at most; a power of two


def inner(function: Any) -> Any:
    """triton.jit for what kernels call. The interpreter takes it as Python: it would patch
    triton.language anew for each call, which takes longer than the call."""
    return function if INTERPRETED else triton.jit(function)


@inner
def narrow(y, dtype: tl.constexpr):
    if INTERPRETED:  # it cuts float32 off to bfloat16 instead of rounding
        if dtype == tl.bfloat16:
            bits = y.to(tl.uint32, bitcast=True)
            # It rounds what is left of a zero to a denormal: nothing may be left.
            bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
            y = bits.to(tl.float32, bitcast=True)
    return y.to(dtype)


def unspecialised(*values: int) -> tuple[int, ...]:
    """Sizes as kernels take them where one variant is to serve all: Triton specialises the integers of a
    tuple where they are 1 or multiples of 16 (`do_not_specialize` does not reach them), and these are odd
    and at least 3. `integer` and `integers` are the way back."""
    return tuple(2 * value + 3 for value in values)


@inner
def integer(value):
    return (value - 3) >> 1


@inner
def integers(values):
    decoded = ()
    for i in tl.static_range(len(values)):
        decoded = decoded + (integer(values[i]),)
    return decoded


compiled_for: int | None = None
"""The compute capability, 80 for 8.0, that kernels are compiled for without a GPU."""


def capability(like: Tensor) -> int:
    """What decides launch parameters."""
    if compiled_for is None and like.is_cuda:
        major, minor = torch.cuda.get_device_capability(like.device)
        return 10 * major + minor
    return compiled_for or 90


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


class Rows(NamedTuple):
    """The tensors of a call as rows [batch, n]: each sample's n elements lie together, in one order."""

    batch: int
    n: int

    @classmethod
    def of(
        cls, op: str, likes: Sequence[Tensor], inputs: Iterable[Tensor], written: bool = True
    ) -> tuple[Rows, list[Tensor]]:
        """The rows of a call whose outputs are `likes`, and its inputs in the order of the first."""
        like = likes[0]
        if not all(samples_together(t, written) and ordered(t, like) is t for t in likes):
            raise ValueError(f"{op}: the elements of each sample must lie together, in one order")
        rows = cls(len(like), like.numel() // len(like) if len(like) else 0)
        return rows, [ordered(t, like) for t in inputs]

    def chunks(self, block: int) -> tuple[int, int]:
        """Chunks in a row, and blocks in a chunk."""
        blocks = cdiv(self.n, block)
        each = cdiv(blocks, CHUNKS.value)
        return cdiv(blocks, each), each

    def strides(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Elements from one sample to the next."""
        return tuple(self.n if self.batch == 1 else t.stride(0) for t in tensors)

    def align(self, tensors: Sequence[Tensor]) -> int:
        """What divides the bytes before every row and the length of a row: 16, or 1 where 16 does not.
        Kernels are told, so that neither loads nor the order of sums depend on what Triton finds out."""
        for t, stride in zip(tensors, self.strides(tensors), strict=True):
            if self.n % 16 or stride % 16 or t.data_ptr() % 16:
                return 1
        return 16


def check_doubles(op: str, *tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and not (t.dtype is torch.float64 and t.is_contiguous()):
            raise ValueError(f"{op}: coefficients and statistics must be contiguous float64")


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int = 3  # of loads under way in a loop, where products are pipelined
    registers: int | None = None  # of a thread, at most; unsaid, ptxas may rather spill than use many
    fused: bool = True  # products are added unrounded; not where a product cancels what was rounded

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fused}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def run(launches: Sequence[Launch], like: Tensor) -> None:
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        for each in launches:
            each.kernel[(each.programs,)](*each.args, **each.constants, **each.options)
