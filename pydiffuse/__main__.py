"""`python -m pydiffuse info`: versions, backends per op, CPU capability, CUDA archs, devices; `plan-scale`: what the
ops over several GPUs are computed to take."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform

import torch

import pydiffuse
from pydiffuse._core import dispatch


def info() -> None:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    print(f"pydiffuse {pydiffuse.__version__}, python {platform.python_version()}, {platform.machine()}")
    print(", ".join(f"{p} {version(p)}" for p in ("torch", "triton", "numpy")))
    if dispatch.built:
        from pydiffuse import _host

        print(f"extension: built; CPU capability {_host.capability()}, {torch.get_num_threads()} threads")
        print(f"CUDA kernels: {', '.join(dispatch.cuda_archs()) or 'not built'}")
    else:
        print("extension: missing")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(devices) or 'none'}")
    table = pydiffuse.backends()
    width = max(map(len, table))
    print("\nop".ljust(width + 1), *(b.ljust(10) for b in dispatch.BACKENDS))
    for op, row in table.items():
        marks = ["ready" if row.get(b) == "ready" else "-" for b in dispatch.BACKENDS]
        print(op.ljust(width), *(mark.ljust(10) for mark in marks))
    for backend, state in {b: s for row in table.values() for b, s in row.items()}.items():
        if state != "ready":
            print(f"{backend}: {state}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pydiffuse", description=__doc__)
    parser.add_argument("command", choices=["info", "plan-scale"])
    if parser.parse_args().command == "info":
        info()
    else:
        importlib.import_module("pydiffuse.distributed.scale").main()


if __name__ == "__main__":
    main()
