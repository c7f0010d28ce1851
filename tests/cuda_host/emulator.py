"""The CUDA kernels on the host, as the tests use them: devices, seeds, and what was launched.

    with emulator.running(seed=1, arch="90a"), pydiffuse.use_backend("cuda"):
        pydiffuse.tcfg(cond, uncond, 7.5)  # CPU tensors

PYDIFFUSE_CUDA_SANITIZED=1 takes the library with AddressSanitizer, which must have been preloaded.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from pydiffuse._core import dispatch
from pydiffuse._core.schemas import DIRECT, SCHEMAS
from tests.cuda_host import build
from tests.cuda_host.devices import DEVICES, RESOURCES, short

KERNEL = r"\w+_kernel(<[\d, ]+>)?"
NAMESPACE = "pydiffuse_cuda_host"
LIBRARY = os.environ.get("PYDIFFUSE_CUDA_HOST_LIBRARY")  # one that was built otherwise
SANITIZED = os.environ.get("PYDIFFUSE_CUDA_SANITIZED") == "1"


class Kernel(NamedTuple):
    name: str
    address: int


class Emulator:
    def __init__(self) -> None:
        path = Path(LIBRARY) if LIBRARY else build.library(SANITIZED)
        self._define()
        self._library = ctypes.CDLL(str(path))
        for f in ("planted_launch", "planted_occupancy", "planted_shared"):
            getattr(self._library, f).restype = ctypes.c_char_p
        self.calculator = bool(self._library.cuda_host_has_calculator())
        self.kernels = self._kernels(path)
        self.devices: dict[tuple[str, int], int] = {}
        self.device("90a")

    def _define(self) -> None:
        self._namespace = torch.library.Library(NAMESPACE, "DEF")
        for name, schema in SCHEMAS.items():
            self._namespace.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=self._namespace)
        for name, schema in DIRECT.items():
            self._namespace.define(name + schema)

    def _kernels(self, path: Path) -> list[Kernel]:
        base = ctypes.cast(self._library.cuda_host_has_calculator, ctypes.c_void_p).value
        symbols = subprocess.run(["nm", "-C", path], check=True, text=True, capture_output=True).stdout
        lines = [line.split(" ", 2) for line in symbols.splitlines() if line[0] != " "]
        anchor = next(int(at, 16) for at, _, name in lines if name == "cuda_host_has_calculator")
        kernels = []
        for at, kind, name in lines:
            if kind in "tT" and re.fullmatch(KERNEL, short(name)) and "pydiffuse::" in name:
                kernels.append(Kernel(short(name), base + int(at, 16) - anchor))
        for kernel in kernels:
            self._library.cuda_host_name_kernel(ctypes.c_void_p(kernel.address), kernel.name.encode())
        return kernels

    def device(self, arch: str, multiprocessors: int | None = None) -> int:
        """A card of this architecture becomes the current device, with fewer multiprocessors if asked."""
        card = DEVICES[arch]
        key = arch, multiprocessors or card.multiprocessors
        if key not in self.devices:
            major, minor = divmod(int(arch.rstrip("a")), 10)
            kilo = [ctypes.c_int64(k << 10) for k in (card.shared, card.shared_of_block)]
            index = self._library.cuda_host_add_device(major, minor, key[1], card.threads, *kilo)
            self.devices[key] = index
            usage = json.loads(RESOURCES.read_text())[arch] if RESOURCES.exists() else {}
            for kernel in self.kernels:
                if kernel.name in usage:
                    self.usage(kernel, index, *usage[kernel.name])
        self._library.cuda_host_set_device(self.devices[key])
        return self.devices[key]

    def usage(self, kernel: Kernel, device: int, registers: int, shared: int) -> None:
        self._library.cuda_host_set_usage(ctypes.c_void_p(kernel.address), device, registers, shared)

    def seed(self, seed: int) -> None:
        self._library.cuda_host_set_seed(ctypes.c_uint64(seed))

    def launches(self) -> Counter[str]:
        """How often each kernel was launched."""
        counts: Counter[str] = Counter()
        for kernel in self.kernels:
            counts[kernel.name] += self._library.cuda_host_launches(ctypes.c_void_p(kernel.address))
        return counts

    # tests/cuda_host/planted.cu

    def planted(self, fault: int, out: torch.Tensor) -> str:
        return self._library.planted_launch(fault, ctypes.c_void_p(out.data_ptr())).decode()

    def planted_occupancy(self, blocks: int, ask: bool, out: torch.Tensor) -> str:
        pointer = ctypes.c_void_p(out.data_ptr())
        return self._library.planted_occupancy(blocks, ctypes.c_bool(ask), pointer).decode()

    def planted_shared(self, size: int, out: torch.Tensor) -> str:
        return self._library.planted_shared(size, ctypes.c_void_p(out.data_ptr())).decode()


@functools.cache
def load() -> Emulator:
    return Emulator()


@contextmanager
def running(seed: int = 0, arch: str = "90a", multiprocessors: int | None = None) -> Iterator[Emulator]:
    """`use_backend("cuda")` takes CPU tensors to the kernels on the host."""
    emulator = load()
    before = dispatch.cuda_host
    emulator.device(arch, multiprocessors)
    emulator.seed(seed)
    dispatch.cuda_host = getattr(torch.ops, NAMESPACE)
    try:
        yield emulator
    finally:
        dispatch.cuda_host = before
