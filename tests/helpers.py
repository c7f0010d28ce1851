"""Running a case on a backend and comparing it with the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import pydiffuse
from tests.cases.guidance import Maker
from tests.table import Case, Tolerance

GPU = os.environ.get("PYDIFFUSE_TEST_GPU") == "1"
DEVICE = "cuda" if GPU else "cpu"
EMULATED = os.environ.get("PYDIFFUSE_CUDA_EMULATED") == "1"  # CUDA kernels on the host: tests/cuda_host
BACKENDS = ["cuda", "triton"] if GPU else ["cuda", "cpu"] if EMULATED else ["cpu", "triton"]


def leaves(args: Any) -> list[Tensor]:
    return [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]


def run(case: Case, arguments: Any, backend: str | None) -> list[Tensor]:
    args, kwargs = arguments
    with pydiffuse.use_backend(backend):
        return leaves(getattr(pydiffuse, case.op)(*args, **kwargs))


def doubled(arguments: Any) -> Any:
    return tree_map(lambda t: t.detach().double() if _real(t) else t, arguments)


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _continuous(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def values_and_gradients(
    case: Case,
    arguments: Any,
    backend: str | None,
    call: Callable[..., Any] | None = None,
    wants: Callable[[Any], bool] = _continuous,
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of sum_i <w_i, result_i> with fixed w for every tensor argument.

    call: what computes the results from (args, kwargs), if not the public function on the backend.
    wants: which tensors want a gradient."""

    def copy(t: Any) -> Any:
        return t.detach().requires_grad_(_continuous(t) and wants(t)) if isinstance(t, Tensor) else t

    copies = tree_map(copy, arguments)
    results = run(case, copies, backend) if call is None else leaves(call(*copies))
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


def assert_close(
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: dict[torch.dtype, Tolerance],
    dtype: torch.dtype,
    kind: str = "value",
    factor: float = 1.0,
) -> None:
    """Relative errors within the tolerance of the wider of a result's dtype and the inputs'."""
    # What cancels is measured by its companions: 0 has no relative error.
    least = 1e-2 * max((ref.double().norm().item() for ref in expected), default=0.0)
    for i, (out, ref) in enumerate(zip(results, expected, strict=True)):
        assert out.shape == ref.shape
        dtypes = {dtype, out.dtype} & set(tolerance)  # statistics come in float64
        bound = factor * max(getattr(tolerance[d], kind) for d in dtypes)
        error = relative_error(out, ref, least)
        assert error <= bound, f"{kind} {i}: {error:.2e} > {bound:.0e}"


def check(
    case: Case,
    given: Any,
    backend: str,
    tolerance: dict[torch.dtype, Tolerance],
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> None:
    """Values and gradients of a backend against the float64 reference."""
    results, gradients = values_and_gradients(case, given, backend)
    expected, slopes = values_and_gradients(case, doubled(given), "reference")
    assert_close(results, expected, tolerance, dtype, "value", factor)
    assert_close(gradients, slopes, tolerance, dtype, "grad", factor)


def check_compiled(case: Case, given: Any, backend: str | None) -> None:
    """One graph of torch.compile has the values and gradients of the call itself."""
    results, gradients = values_and_gradients(case, given, backend)
    torch._dynamo.reset()
    op = getattr(pydiffuse, case.op)
    constant = {k: v for k, v in given[1].items() if not leaves(v)}  # objects, such as paths
    compiled = torch.compile(
        lambda args, kwargs: op(*args, **kwargs, **constant), fullgraph=True, backend="aot_eager"
    )

    def call(args: Any, kwargs: dict[str, Any]) -> Any:
        return compiled(args, {k: v for k, v in kwargs.items() if k not in constant})

    found, slopes = values_and_gradients(case, given, backend, call)
    for a, b in zip(found, results, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(slopes, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check_refused(call: Callable[[], Any], error: type[Exception], words: Sequence[str]) -> None:
    """The call raises the error, whose text has the words."""
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
