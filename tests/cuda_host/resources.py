"""Registers and static shared memory of the CUDA kernels, read from their machine code.

    python -m tests.cuda_host.resources [--check]

Compiles csrc/cuda for every card of devices.py and writes resources.json: architecture -> kernel ->
[registers, bytes of shared memory]. Needs nvcc; the emulator then needs neither. --check writes nothing and
ends with status 1 where the file tells of other code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup as build
from tests.cuda_host.devices import DEVICES, RESOURCES, short

Usage = dict[str, list[int]]


def cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def read(obj: Path) -> dict[str, Usage]:
    """What an object has, by architecture."""
    command = [cuobjdump(), "--dump-resource-usage", str(obj)]
    text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    text = subprocess.run(["c++filt"], check=True, input=text, text=True, capture_output=True).stdout
    found: dict[str, Usage] = {}
    pattern = r"arch = sm_(\w+)|Function (.*):\n\s*REG:(\d+).*? SHARED:(\d+)"
    for arch, name, registers, shared in re.findall(pattern, text):
        if arch:
            current = found.setdefault(arch, {})
        elif "_kernel" in name:
            current[short(name)] = [int(registers), int(shared)]
    return found


def compiled(job: tuple[Path, str]) -> dict[str, Usage]:
    source, arch = job
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.o"
        flags = f"{build.NVCC} {build.TORCH} {code}".split()
        subprocess.run([build.nvcc(), *flags, "-c", source, "-o", target], check=True, cwd=build.ROOT)
        return read(target)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.resources", description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    jobs = [(s, arch) for s in sorted((build.ROOT / "csrc/cuda").glob("*.cu")) for arch in DEVICES]
    usage: dict[str, Usage] = {arch: {} for arch in DEVICES}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for found in pool.map(compiled, jobs):
            for arch, kernels in found.items():
                usage[arch].update(kernels)
    rows = {arch: dict(sorted(kernels.items())) for arch, kernels in usage.items()}
    if args.check:
        known = json.loads(RESOURCES.read_text())
        changed = [f"sm_{a} {k}" for a in rows for k in rows[a] if rows[a][k] != known.get(a, {}).get(k)]
        print("\n".join(changed) or f"{RESOURCES.name} is what nvcc gives")
        return 1 if changed else 0
    lines = [
        f' "{arch}": {{\n' + ",\n".join(f'  "{k}": {v}' for k, v in kernels.items()) + "\n }"
        for arch, kernels in rows.items()
    ]
    RESOURCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
