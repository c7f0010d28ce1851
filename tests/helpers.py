"""Running a case on a backend and comparing it with the float64 reference."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import pydiffuse
from tests.cases.guidance import Maker
from tests.table import Case

GPU = os.environ.get("PYDIFFUSE_TEST_GPU") == "1"
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["cuda", "triton"] if GPU else ["cpu", "triton"]


def leaves(args: Any) -> list[Tensor]:
    return [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]


def run(case: Case, arguments: Any, backend: str) -> list[Tensor]:
    args, kwargs = arguments
    with pydiffuse.use_backend(backend):
        return leaves(getattr(pydiffuse, case.op)(*args, **kwargs))


def doubled(arguments: Any) -> Any:
    return tree_map(lambda t: t.detach().double() if _real(t) else t, arguments)


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _continuous(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def values_and_gradients(case: Case, arguments: Any, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of sum_i <w_i, result_i> with fixed w for every tensor argument."""
    copies = tree_map(lambda t: t.detach().requires_grad_() if _continuous(t) else t, arguments)
    results = run(case, copies, backend)
    loss = torch.zeros((), dtype=torch.float64, device=results[0].device)
    generator = torch.Generator().manual_seed(7)
    for result in results:
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.device)
        loss = loss + (weight * result.double()).sum()
    inputs = [t for t in leaves(copies) if t.requires_grad]
    needed = loss.requires_grad  # not where there are no elements
    with pydiffuse.use_backend(backend):  # it is chosen anew where the backward runs
        gradients = (
            torch.autograd.grad(loss, inputs, allow_unused=True) if needed else [None] * len(inputs)
        )
    return results, [
        torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)
    ]


def relative_error(out: Tensor, ref: Tensor, least: float = 0.0) -> float:
    """||out - ref|| / max(||ref||, least), in float64; NaN wherever out has one."""
    if not ref.numel():
        return 0.0
    out, ref = out.double(), ref.double()
    return (out - ref).norm().item() / (max(ref.norm().item(), least) or 1.0)


def arguments(case: Case, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Any:
    return case.make(Maker(shape, dtype, DEVICE, **options))
