"""Builds pydiffuse._C (the torch binding), pydiffuse._host (NumPy's) and pydiffuse._jax (XLA's) with ninja.

PYDIFFUSE_CUDA=0|1|auto (default auto: where nvcc is found and nvidia-smi lists a GPU), PYDIFFUSE_CUDA_ARCHS
(default "80;90a;100"), PYDIFFUSE_JAX=0|1|auto (default auto: where jaxlib is installed), CXX, CXXFLAGS,
LDFLAGS (default -s; not on macOS), NVCC and MAX_JOBS are read from the environment.
Commands name files from the root of the repository: a copy of it with its build folder is up to date.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX = "-std=c++20 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"
SIMD = {"default": ""}
if X86:
    SIMD["avx2"] = "-mavx2 -mfma -mf16c"
    SIMD["avx512"] = "-mavx512f -mavx512dq -mavx512vl -mavx512bw " + SIMD["avx2"]
EXTRA = {("attention_bf16", "avx512"): "-mavx512bf16"}  # asked for at run time, beside avx512
TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL " + " ".join(
    f"-isystem {shlex.quote(p)}" for p in include_paths()
)
PYTHON = f"-isystem {shlex.quote(sysconfig.get_path('include'))}"
# On macOS Python's symbols are found where the extension is loaded.
LINKING = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-s"
NVCC = (
    "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
    " -DUSE_CUDA -diag-suppress 20012"
)


def nvcc() -> str | None:
    wanted = os.environ.get("PYDIFFUSE_CUDA", "auto")
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "1" and not found:
        raise RuntimeError("PYDIFFUSE_CUDA=1, but nvcc was not found: put it on PATH or set NVCC")
    return None if wanted == "0" else found


def sees_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and b"GPU 0" in subprocess.run([tool, "-L"], capture_output=True).stdout


def cuda_compiler() -> str | None:
    """What the extension's CUDA kernels are built with; None where they are not wanted."""
    return nvcc() if os.environ.get("PYDIFFUSE_CUDA") == "1" or sees_gpu() else None


def xla_headers() -> Path | None:
    """Where jaxlib is: jax.ffi.include_dir(), without importing jax."""
    wanted = os.environ.get("PYDIFFUSE_JAX", "auto")
    found = importlib.util.find_spec("jaxlib")
    if wanted == "1" and not found:
        raise RuntimeError("PYDIFFUSE_JAX=1, but jaxlib was not found: pip install jax")
    return Path(found.origin).parent / "include" if wanted != "0" and found and found.origin else None


TEMP = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"


def object_of(source: Path, tag: str = "", temp: Path = TEMP) -> Path:
    return temp / f"{source.relative_to(ROOT).as_posix().replace('/', '.')}{tag}.o"


def escaped(path: Path) -> str:
    """A path as ninja reads it, from the root where it is within."""
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Each source by its own flags, objects shared by both extensions, only what changed again."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = None

    def finalize_options(self) -> None:
        told = self.distribution.get_option_dict("build").get("build_temp", (None, None))
        asked = self.build_temp or told[1]
        super().finalize_options()
        self.temp = Path(asked).resolve() if asked else TEMP

    def build_extensions(self) -> None:
        self.temp.mkdir(parents=True, exist_ok=True)
        cuda, compiler = cuda_compiler(), os.environ.get("CXX", "g++")
        archs = os.environ.get("PYDIFFUSE_CUDA_ARCHS", "80;90a;100").split(";")
        built_for = f"""-DPYDIFFUSE_CUDA_ARCHS='"{";".join(archs) if cuda else ""}"'"""
        codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        more, linking = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", LINKING)
        lines = [
            f"builddir = {escaped(self.temp)}",
            "rule cxx\n command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
            f"rule link\n command = $cxx -shared $in -o $out $libs {linking}",
            f"cxx = {compiler}",
        ]

        def compiled(source: Path, flags: str, tag: str = "") -> str:
            obj = escaped(object_of(source, tag, self.temp))
            flags = f"{flags} {more}" if source.suffix != ".cu" else flags
            other = f"\n cxx = {shlex.quote(cuda)}" if cuda and source.suffix == ".cu" else ""
            lines.append(f"build {obj}: cxx {escaped(source)}\n flags = {flags}{other}")
            return obj

        def linked(name: str, objects: list[str], libs: str) -> None:
            path = Path(self.get_ext_fullpath(name)).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {escaped(path)}: link {' '.join(objects)}\n libs = {libs}")

        kernels = [
            compiled(
                source,
                f"{CXX} {flags} {EXTRA.get((source.stem, isa), '')} -DPYDIFFUSE_ISA={isa}"
                f" -Wno-{'unknown-warning-option' if 'clang' in compiler else 'maybe-uninitialized'}",
                f".{isa}",
            )
            for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
            for isa, flags in SIMD.items()
        ]
        bindings = [
            compiled(s, f"{CXX} {TORCH} {PYTHON} {built_for if s.stem == 'module' else ''}")
            for s in sorted((ROOT / "csrc/torch").glob("*.cpp"))
        ]
        libs = " ".join(f"-L{shlex.quote(p)}" for p in library_paths()) + " -ltorch_cpu"
        if cuda:
            flags = f"{NVCC} {codes} {TORCH}"
            bindings += [compiled(s, flags) for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
            told = subprocess.run([cuda, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
            found = re.search("LIBRARIES=(.*)", told)  # nvcc may be a script that stands elsewhere
            libs += f" {found[1] if found else ''} -lcudart_static -lrt -ldl -lpthread"
        linked("pydiffuse._C", bindings + kernels, libs)
        host = f"{CXX} {PYTHON} -isystem {shlex.quote(pybind11.get_include())}"
        sources = sorted((ROOT / "csrc/python").glob("*.cpp"))
        linked("pydiffuse._host", [compiled(s, host) for s in sources] + kernels, "-lpthread")
        if xla := xla_headers():
            flags = f"{host} -isystem {shlex.quote(str(xla))}"
            sources = sorted((ROOT / "csrc/jax").glob("*.cpp"))
            linked("pydiffuse._jax", [compiled(s, flags) for s in sources] + kernels, "-lpthread")
        if not (link := ROOT / "pydiffuse/kernels").exists():  # a source distribution holds no links
            link.symlink_to("../kernels")
        plan = self.temp / "build.ninja"
        plan.write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-f", plan, *jobs], check=True, cwd=ROOT)


if __name__ == "__main__":
    built = ("_C", "_host", "_jax") if xla_headers() else ("_C", "_host")
    setup(
        ext_modules=[Extension(f"pydiffuse.{name}", []) for name in built],
        cmdclass={"build_ext": NinjaBuild},
    )
