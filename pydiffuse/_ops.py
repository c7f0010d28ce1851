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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydiffuse._schemas import SCHEMAS, STEMS

BACKENDS = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Op:
    """A row of the table of public ops."""

    name: str
    stem: str
    kernels: tuple[str, ...]
    """The ops of `SCHEMAS` it calls, forward and backward."""
    backends: tuple[str, ...] = BACKENDS


_RULE = ("guide", "guide_backward")
_LINEAR = ("gram", "mix")
_SCANS = ("selective_scan", "selective_scan_backward")
_CONVS = ("causal_conv1d", "causal_conv1d_backward")
_ATTENTIONS = ("tile_attention", "tile_attention_backward")
_MODULATIONS = ("modulate", "modulate_backward")
_TOKENS = ("gather_tokens", "scatter_tokens")
_NO_CUDA = ("reference", "cpu", "triton")  # on a GPU, Triton: bound by memory, it has nothing to gain
_COMPOSED = ("reference",)  # a few small operations of torch, the same on every device
_MIX_PATCHES = ("mix_patches",)
PUBLIC = {
    op.name: op
    for op in (
        *(
            Op(name, "guidance", _RULE)
            for name in ("cfg", "cfg_zero", "apg", "magnitude_aware", "perp_neg", "compose", "slerp")
        ),
        Op("tcfg", "guidance", _RULE + _LINEAR),
        Op("rescale", "guidance", _RULE),
        Op("guide", "guidance", _RULE + _LINEAR),
        Op("superpose", "guidance", _LINEAR),
        Op("gram", "guidance", _LINEAR),
        Op("combine", "guidance", _LINEAR),
        Op("selective_scan", "scan", _SCANS),
        Op("selective_state_update", "scan", ("selective_state_update",)),
        Op("zigzag_mamba_inner", "scan", _SCANS),
        Op("causal_conv1d", "conv", _CONVS),
        Op("tile_attention", "attention", _ATTENTIONS, _NO_CUDA),
        Op("modulate", "adaln", _MODULATIONS, _NO_CUDA),
        Op("gate_residual_modulate", "adaln", _MODULATIONS, _NO_CUDA),
        Op("embed_t", "adaln", (), _COMPOSED),
        Op("gather_tokens", "routing", _TOKENS, _NO_CUDA),
        Op("scatter_tokens", "routing", _TOKENS, _NO_CUDA),
        Op("routed_linear", "routing", _TOKENS, _NO_CUDA),
        Op("route", "routing", (), _COMPOSED),
        Op("channel_mask", "routing", (), _COMPOSED),
        Op("noise_patches", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("patch_step", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("convert", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("patch_loss", "patch", ("patch_loss", "mix_patches"), _NO_CUDA),
        Op("select_patches", "patch", ("select_patches",), _NO_CUDA),
        Op("dual_loop_t", "patch", ("select_patches",), _NO_CUDA),
        Op("sample_t", "patch", (), _COMPOSED),
        Op("next_t", "patch", (), _COMPOSED),
    )
}
"""Every public op: where it lives, which kernels it calls, which backends it declares."""

_libraries = {name: torch.library.Library(name, "DEF") for name in ("pydiffuse", "pydiffuse_triton")}


def _define() -> None:
    for namespace, library in _libraries.items():
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{namespace}::{name}", lambda *args: None, lib=library)


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
_forced: str | None = None


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


def set_backend(backend: str | None) -> None:
    global _forced
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"use_backend: unknown backend {backend!r}; accepted: {BACKENDS}")
        missing = _missing(backend)
        if missing:
            raise RuntimeError(f"use_backend: backend {backend!r} is not available: {missing}")
    _forced = backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op inside the `with` block on one backend; None restores the choice by device.

    backend: "reference" (plain PyTorch), "cpu" (C++), "cuda" (CUDA C++) or "triton". A backend that
    is not available raises here; one that cannot serve a tensor's device raises at the call. The
    environment variable PYDIFFUSE_BACKEND sets the same for a whole process.
    """
    before = _forced
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def backends() -> dict[str, dict[str, str]]:
    """What runs where: op -> backend -> "ready", or what is missing and how to get it."""
    state = {backend: _missing(backend) or "ready" for backend in BACKENDS}
    return {op: {backend: state[backend] for backend in row.backends} for op, row in PUBLIC.items()}


def forced() -> str | None:
    return _forced


def forced_reference() -> bool:
    return _forced == "reference"


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
    on_cuda = _forced is None and tensor.device.type == "cuda" and ops is torch.ops.pydiffuse
    if on_cuda and not scan_backward_fits(tensor.device.index or 0, states):
        return torch.ops.pydiffuse_triton
    return ops


def ops_for(op: str, tensor: Tensor) -> Any:
    """The namespace that serves `tensor`: torch.ops.pydiffuse or torch.ops.pydiffuse_triton."""
    device = tensor.device.type
    backend = _forced
    if backend is None:
        if device == "cpu" and built:
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


def _launcher(name: str, stem: str) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        getattr(importlib.import_module(f"pydiffuse.kernels.{stem}"), name)(*args)

    return launch


if _has_triton():  # the kernels' modules are imported at the first launch
    for _name, _stem in STEMS.items():
        for _key in ("CUDA", "CPU") if _interpreted() else ("CUDA",):
            _libraries["pydiffuse_triton"].impl(_name, _launcher(_name, _stem), _key)


if os.environ.get("PYDIFFUSE_BACKEND"):
    set_backend(os.environ["PYDIFFUSE_BACKEND"])
