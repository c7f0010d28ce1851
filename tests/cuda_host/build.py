"""Compiles csrc/cuda for the host.

    python -m tests.cuda_host.build [--sanitize]

Two things that CUDA C++ alone has are rewritten on the way, everything else is left to include/: a variable
in shared memory becomes a reference to a block's own, and dynamic shared memory a pointer.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ninja
from torch.utils.cpp_extension import library_paths

import setup as build

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc/cuda"
BUILD = ROOT / "build/cuda-host"
PLANTED = {"planted_kernel", "occupying_kernel"}
FLAGS = "-std=c++20 -fvisibility=hidden -ffp-contract=fast -fno-math-errno -w"
PLAIN = "-O1 -g0"
SANITIZED = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    " -DCUDA_HOST_SANITIZED"
)


def rewritten(text: str, name: str) -> str:
    """CUDA C++ as the host compiler takes it; lines stay where they are."""

    def dynamic(match: re.Match[str]) -> str:
        kind, variable = match.groups()
        return f"{kind}* const {variable} = static_cast<{kind}*>(::cuda_host::dynamic_shared());"

    def static(match: re.Match[str]) -> str:
        kind, declarators = match.groups()
        made = []
        for declarator in re.split(r",\s*", declarators):
            variable = re.match(r"\w+", declarator)[0]
            struct = f"Shared_{variable}"
            made.append(f"struct {struct} {{ {kind} {declarator}; }};")
            made.append(f"auto& {variable} = ::cuda_host::shared<{struct}>().{variable};")
        return " ".join(made) + "\n" * match[0].count("\n")

    text = re.sub(r"\bextern __shared__ (\w+) (\w+)\[\];", dynamic, text)
    text = re.sub(r"\b__shared__ (\w+(?:<[^;]*?>)?)\s+(\w[^;]*);", static, text)
    assert "__shared__" not in text, f"{name}: a declaration of shared memory in a form not known here"
    return f'#line 1 "{name}"\n{text}'


Edit = Callable[[Path, str], str]


def translate(sources: list[Path], folder: Path, edit: Edit = lambda _, text: text) -> list[Path]:
    """The CUDA sources, rewritten, in a folder; files are touched only where they change.
    edit: what else becomes of a source's text."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in sources:
        target = folder / source.name
        text = rewritten(edit(source, source.read_text()), str(source.relative_to(ROOT)))
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
        written.append(target)
    return written


def compiled(folder: Path, sources: list[Path], target: Path, flags: str, libs: str) -> Path:
    """Sources to a library or a program with ninja; what did not change is kept."""
    lines = [
        "rule cxx\n command = $cxx $flags -x c++ -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        "rule link\n command = $cxx $flags $in -o $out $libs",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {FLAGS} {simd()} -I{HERE}/include -I{CUDA} {calculator()} {flags}",
        f"libs = {libs}",
    ]
    objects = [folder / f"{source.name}.o" for source in sources]
    lines += [f"build {o}: cxx {s}" for o, s in zip(objects, sources, strict=True)]
    lines.append(f"build {target}: link {' '.join(map(str, objects))}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "--quiet", *jobs]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # of the sanitizers
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(
            f"CUDA for the host does not compile:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )
    return target


RUNTIME = sorted(HERE.glob("*.cpp"))


def library(sanitize: bool = False, name: str = "plain", edit: Edit = lambda _, text: text) -> Path:
    """The kernels and their bindings, as a shared library."""
    folder = BUILD / ("sanitized" if sanitize else name)
    sources = [p for p in CUDA.iterdir() if p.suffix in (".cu", ".cuh", ".h") and p.name != "ptx.cuh"]
    translated = translate(sorted([*sources, HERE / "planted.cu"]), folder / "cuda", edit)
    more = f"{SANITIZED} -ftrivial-auto-var-init=pattern" if sanitize else PLAIN
    flags = f"{more} -fPIC {build.TORCH}"
    libs = f"-shared -L{' -L'.join(library_paths())} -ltorch_cpu -ldl -lpthread"
    units = [t for t in translated if t.suffix == ".cu"] + RUNTIME
    return compiled(folder, units, folder / "libcuda_host.so", flags, libs)


def planted() -> Path:
    """planted.cu alone, as a program with the sanitizers: planted FAULT."""
    folder = BUILD / "planted"
    units = translate([HERE / "planted.cu"], folder / "cuda") + RUNTIME
    return compiled(folder, units, folder / "planted", f"{SANITIZED} -DPLANTED_MAIN", "-lpthread")


def simd() -> str:
    """Multiplies and adds in one, as a GPU does, where this processor can."""
    from pydiffuse import _host

    return build.SIMD["avx2"] if _host.capability() in ("avx2", "avx512") else ""


def calculator() -> str:
    """Where NVIDIA's occupancy calculator is: Triton brings it."""
    found = importlib.util.find_spec("triton")
    for folder in found.submodule_search_locations if found else []:
        include = Path(folder) / "backends/nvidia/include"
        if (include / "cuda_occupancy.h").exists():
            return f"-idirafter {include}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    print(library(parser.parse_args().sanitize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
