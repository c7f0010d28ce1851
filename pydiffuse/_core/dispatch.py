"""The ops as torch's dispatcher knows them, and the choice of a backend.

Every op writes into tensors its caller gives it, so `out=` costs nothing and a fake needs no shapes.
`torch.ops.pydiffuse` holds the compiled kernels (C++ for the CPU, CUDA C++ where it was built);
`torch.ops.pydiffuse_triton` the Triton kernels under the same schemas.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydiffuse._core.schemas import DIRECT, SCHEMAS, STEMS
from pydiffuse._core.table import BACKENDS, PUBLIC

_libraries = {name: torch.library.Library(name, "DEF") for name in ("pydiffuse", "pydiffuse_triton")}


def _define() -> None:
    for namespace, library in _libraries.items():
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", lambda *args: None, lib=library)
    for name, schema in DIRECT.items():
        _libraries["pydiffuse"].define(name + schema)


_define()

_why_missing = ""
try:
    importlib.import_module("pydiffuse._C")
    built = True
except ImportError as error:
    built = False
    _why_missing = str(error)
    warnings.warn(
        f"pydiffuse: the compiled extension is missing ({error}). Build it with "
        "`pip install --no-build-isolation -e .` in the repository (needs a C++20 compiler); "
        'until then only `with pydiffuse.use_backend("reference")` runs on the CPU.',
        stacklevel=3,
    )


def _has_cuda_kernels() -> bool:
    return built and torch._C._dispatch_has_kernel_for_dispatch_key("pydiffuse::guide", "CUDA")


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def cuda_archs() -> list[str]:
    """The GPU architectures whose code the extension holds."""
    archs = importlib.import_module("pydiffuse._C").cuda_archs if built else ""
    return archs.split(";") if archs else []


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_<arch> runs on a GPU: within its major version, from its minor one on; that of an
    `a` target on its own version only."""
    major, minor = divmod(int(arch.rstrip("a")), 10)
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


@torch.compiler.assume_constant_result
def _why_no_code(device: int) -> str | None:
    """Why the extension's CUDA kernels cannot run on a GPU; None where they can, and without a GPU."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if any(_runs(arch, capability) for arch in cuda_archs()):
        return None
    gpu = "{}{}".format(*capability)
    return (
        f"its code is for sm_{', sm_'.join(cuda_archs())}, this GPU is sm_{gpu}: rebuild with"
        f" PYDIFFUSE_CUDA_ARCHS={gpu}"
    )


@torch.compiler.assume_constant_result
def scan_backward_fits(device: int, states: int) -> bool:
    """Whether the CUDA kernel of the scan's backward has the shared memory it needs on a GPU. Consumer cards
    have 99 kB for a block, which is not enough beyond 16 states: Triton's takes its place there."""
    module = importlib.import_module("pydiffuse._C")
    needed = module.cuda_scan_backward_few if states <= 16 else module.cuda_scan_backward_many
    properties: Any = torch.cuda.get_device_properties(device)  # torch does not declare this one
    return needed <= properties.shared_memory_per_block_optin


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


built_cuda = _has_cuda_kernels()
cuda_host: Any = None
"""The CUDA kernels compiled for the host, for CPU tensors, where the tests run them (tests/cuda_host)."""
_asked: ContextVar[str | None] = ContextVar("pydiffuse_backend", default=None)
_default: str | None = None
"""Of the whole process."""
_traced: str | None = None
"""The backend asked for last: what Dynamo, which knows no ContextVar, guards on."""


@torch.compiler.assume_constant_result
def _missing(backend: str) -> str | None:
    """What stands in the way of a backend on this machine, with the remedy; None if nothing."""
    if backend == "cpu" and not built:
        return f"the compiled extension is missing ({_why_missing}): `pip install -e .` builds it"
    if backend == "cuda" and cuda_host:
        return None
    if backend == "cuda" and not built_cuda:
        return "it was built without CUDA: install nvcc and rebuild with PYDIFFUSE_CUDA=1"
    if backend == "triton" and not _has_triton():
        return "Triton is not installed: `pip install triton`"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if backend == "cuda":
        reasons = [_why_no_code(i) for i in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]
    if backend == "triton" and not (torch.cuda.is_available() or _interpreted()):
        return "torch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return None


def check_backend(backend: str | None) -> None:
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"use_backend: unknown backend {backend!r}; accepted: {BACKENDS}")
        missing = _missing(backend)
        if missing:
            raise RuntimeError(f"use_backend: backend {backend!r} is not available: {missing}")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op inside the `with` block on one backend; None restores the choice by device.

    backend: "reference" (plain PyTorch), "cpu" (C++), "cuda" (CUDA C++) or "triton". A backend that
    is not available raises here; one that cannot serve a tensor's device raises at the call. The
    environment variable PYDIFFUSE_BACKEND sets the same for a whole process. Threads and tasks have each
    their own; a thread begins with the process's.
    """
    global _traced
    check_backend(backend)
    token = _asked.set(backend or "")
    _traced = backend
    try:
        yield
    finally:
        _asked.reset(token)
        _traced = forced()  # of this thread: others may have come and gone


def backends() -> dict[str, dict[str, str]]:
    """What runs where: op -> backend -> "ready", or what is missing and how to get it."""
    state = {backend: _missing(backend) or "ready" for backend in BACKENDS}
    return {op: {backend: state[backend] for backend in row.backends} for op, row in PUBLIC.items()}


def forced() -> str | None:
    if torch.compiler.is_dynamo_compiling():
        return _traced
    asked = _asked.get()
    return _default if asked is None else asked or None  # "": the choice by device


def forced_reference() -> bool:
    return forced() == "reference"


_SERVES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu")}


def _declared(op: str) -> tuple[str, ...]:
    return PUBLIC[op].backends if op in PUBLIC else BACKENDS


def _gpu_backend(op: str, tensor: Tensor) -> str:
    """CUDA where the op has it and the extension holds code for the tensor's GPU; Triton elsewhere."""
    if not built_cuda or "cuda" not in _declared(op):
        return "triton"
    return "triton" if _why_no_code(tensor.device.index or 0) else "cuda"


def scan_backward_ops(op: str, tensor: Tensor, states: int) -> Any:
    """`ops_for` of the scan's backward. What a forward saves serves the backward of any backend."""
    ops = ops_for(op, tensor)
    on_cuda = forced() is None and tensor.device.type == "cuda" and ops is torch.ops.pydiffuse
    if on_cuda and not scan_backward_fits(tensor.device.index or 0, states):
        return torch.ops.pydiffuse_triton
    return ops


def ops_for(op: str, tensor: Tensor) -> Any:
    """The namespace that serves `tensor`: torch.ops.pydiffuse or torch.ops.pydiffuse_triton."""
    device = tensor.device.type
    backend = forced()
    if backend is None:
        if device == "cpu" and built:
            return torch.ops.pydiffuse
        if device == "meta":  # shapes alone
            return torch.ops.pydiffuse
        backend = "cpu" if device == "cpu" else _gpu_backend(op, tensor)
        if device not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"{op}: no kernel for device {device!r}; accepted: cpu, cuda; or use_backend('reference')"
            )
        missing = _missing(backend)
        if missing:
            raise RuntimeError(f"{op}: backend {backend!r} is not available: {missing}")
    elif backend not in _declared(op):
        raise ValueError(f"{op}: backend {backend!r} was asked for; it has {', '.join(_declared(op))}")
    elif backend == "cuda" and device == "cpu" and cuda_host:
        return cuda_host
    elif device not in _SERVES[backend]:
        raise ValueError(
            f"{op}: backend {backend!r} was asked for, but the tensors are on {device!r};"
            f" it serves {_SERVES[backend]}"
        )
    return torch.ops.pydiffuse_triton if backend == "triton" else torch.ops.pydiffuse


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def direct(op: str, *tensors: Any) -> Any:
    """The namespace of `DIRECT` calls, if the compiled extension serves these tensors as they are: no gradient is
    due, nothing traces or transforms, no mode or subclass looks on. Else None: the general way."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return None
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
    ):
        return None
    first = tensors[0]
    if first.__class__ not in _PLAIN:
        return None
    asked, ops = forced(), torch.ops.pydiffuse
    if first.is_cpu:
        serves = built and (asked is None or asked == "cpu")
        if asked == "cuda" and cuda_host and "cuda" in _declared(op):
            serves, ops = True, cuda_host
    else:
        serves = first.is_cuda and asked in (None, "cuda") and _gpu_backend(op, first) == "cuda"
    if not serves:
        return None
    learns, here = torch.is_grad_enabled(), first.is_cpu
    for t in tensors:
        if t is not None and (
            t.__class__ not in _PLAIN or t.is_cpu is not here or t.is_meta or (learns and t.requires_grad)
        ):
            return None
    return ops


def over_ranks(*tensors: Any) -> Any:
    """The module that serves DTensors, if one of the tensors is such; imported when it is needed."""
    if torch.compiler.is_compiling():
        return None
    for t in tensors:
        if t.__class__ not in _PLAIN and t.__class__.__name__ == "DTensor":
            return importlib.import_module("pydiffuse.distributed.tensors")
    return None


def _launcher(name: str, stem: str) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        getattr(importlib.import_module(f"pydiffuse.kernels.{stem}"), name)(*args)

    return launch


if _has_triton():  # the kernels' modules are imported at the first launch
    for _name, _stem in STEMS.items():
        for _key in ("CUDA", "CPU") if _interpreted() else ("CUDA",):
            _libraries["pydiffuse_triton"].impl(_name, _launcher(_name, _stem), _key)


if os.environ.get("PYDIFFUSE_BACKEND"):
    check_backend(os.environ["PYDIFFUSE_BACKEND"])
    _default = _traced = os.environ["PYDIFFUSE_BACKEND"]
