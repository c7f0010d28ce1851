"""Builds the hub kernel for this machine as build.toml says, for `kernels.get_local_kernel`; not for publishing.

    python torch-ext/build.py [folder]   # build/hub by default; $CXX, or g++

Published kernels come from kernel-builder, which builds in a sandbox against old system libraries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import tomllib
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
# What kernel-builder generates: names that expand before they are quoted, and the module's entry.
REGISTRATION = """#pragma once
#include <Python.h>
#define STABLE_TORCH_LIBRARY_EXPAND(name, m) STABLE_TORCH_LIBRARY(name, m)
#define ENTRY_(name) PyInit_##name
#define ENTRY(name) ENTRY_(name)
#define REGISTER_EXTENSION(name) \\
  PyMODINIT_FUNC ENTRY(name)(void) { \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernel", nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); \\
  }
"""
OPS = """import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def sources(settings: dict) -> list[tuple[Path, list[str]]]:
    """Every file of the kernel with the flags of its section."""
    sections = [settings["torch"], *settings["kernel"].values()]
    return [(ROOT / file, section["cxx-flags"]) for section in sections for file in section["src"]]


def build(folder: Path) -> Path:
    """The folder of the variant, `folder`/torch-stable-abi211-cpu-x86_64-linux."""
    settings = tomllib.loads((ROOT / "build.toml").read_text())
    general, abi = settings["general"], settings["torch"]["stable-abi"]["cpu"]
    package = ROOT / "torch-ext" / general["name"]
    files = sources(settings)
    python = sorted(package.rglob("*.py"))
    content = b"".join(file.read_bytes() for file in [*(f for f, _ in files), *python])
    name = f"_{general['name']}_cpu_{hashlib.sha1(content).hexdigest()[:7]}"
    major, minor = abi.split(".")
    system = f"{platform.machine()}-{platform.system().lower()}"
    variant = folder / f"torch-stable-abi{major}{minor}-cpu-{system}"
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__", "_ops.py"))
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    with TemporaryDirectory() as temp:
        Path(temp, "registration.h").write_text(REGISTRATION)
        include = [temp, *include_paths(), sysconfig.get_path("include")]
        common = [
            "-fPIC",
            f"-DTORCH_EXTENSION_NAME={name}",
            f"-DTORCH_TARGET_VERSION={(int(major) << 56) | (int(minor) << 48):#x}ULL",
            "-DPy_LIMITED_API=0x03090000",
            *(f"-isystem{path}" for path in include),
        ]

        def compiled(numbered: tuple[int, tuple[Path, list[str]]]) -> str:
            number, (file, flags) = numbered
            out = f"{temp}/{number}.o"
            subprocess.run([*cxx, *flags, *common, "-c", str(file), "-o", out], check=True)
            return out

        units = [(file, flags) for file, flags in files if file.suffix == ".cpp"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, enumerate(units)))
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-s"]
        subprocess.run(
            [*cxx, "-shared", *objects, "-o", str(variant / f"{name}.abi3.so"), *libraries], check=True
        )
    (variant / "_ops.py").write_text(OPS.format(name=name))
    digest = {
        str(path.relative_to(variant)): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {key: general[key] for key in ("name", "version", "license")} | {
        "id": name,
        "backend": {"type": "cpu"},
        "python-depends": [],
        "digest": {"algorithm": "sha256", "files": digest},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"))
