"""What the compilers made of the kernels: no weak symbols, no spills, every declared architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import setup as build

ROOT = Path(__file__).parent.parent
ARCHS = ("80", "90a", "100")


@pytest.mark.parametrize("isa", build.SIMD)
def test_no_symbol_is_shared_between_instruction_sets(isa, tmp_path):
    """A weak symbol in an AVX-512 object may be the one the linker keeps: a crash on an older CPU."""
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        target = build.object_of(source, f".{isa}")
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:  # not built here
            target = tmp_path / f"{source.stem}.o"
            flags = f"{build.CXX} {build.SIMD[isa]} -w -DPYDIFFUSE_ISA={isa}".split()
            compiler = os.environ.get("CXX", "g++")
            subprocess.run([compiler, *flags, "-c", source, "-o", target], check=True, cwd=ROOT)
        symbols = subprocess.run(["nm", "-C", target], check=True, text=True, capture_output=True).stdout
        defined = [line.split(" ", 2)[1:] for line in symbols.splitlines() if line[0] != " "]
        assert defined, symbols
        assert not [name for kind, name in defined if kind in "WwVvu"]
        assert [name for kind, name in defined if kind.isupper()] == [f"pydiffuse_{source.stem}_{isa}"]


def report(title: str, rows: list[tuple[str, str, int, int]]) -> None:
    print(f"\n{title}: kernel, target, registers, spilled bytes")
    for name, target, registers, spilled in rows:
        print(f"  {name:60} {target:8} {registers:4} {spilled:4}")


@pytest.mark.skipif(build.nvcc() is None, reason="this machine has no nvcc")
def test_cuda_kernels_compile_without_spills(tmp_path, capsys):
    def compile_for(job: tuple[Path, str]) -> list[tuple[str, str, int, int]]:
        source, arch = job
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        flags = f"{build.NVCC} {build.TORCH} {code} -Xptxas -v".split()
        command = [build.nvcc(), *flags, "-c", source, "-o", tmp_path / f"{source.stem}.{arch}.o"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        pattern = (
            r"Compiling entry function '(\w+)' for 'sm_\w+'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers"
        )
        found = re.findall(pattern, done.stderr, re.S)
        assert found, done.stderr
        return [(name, f"sm_{arch}", int(used), int(st) + int(ld)) for name, st, ld, used in found]

    jobs = [(s, arch) for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) for arch in ARCHS]
    assert jobs
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(compile_for, jobs) for row in rows]
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(r[0] for r in rows), text=True, capture_output=True
    ).stdout.split("\n")
    rows = [(n.split("pydiffuse::")[-1][:60], *r[1:]) for n, r in zip(names, rows)]
    with capsys.disabled():
        report("CUDA", rows)
    assert not [r for r in rows if r[3]], "spills"


COMPILE_TRITON = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
from pydiffuse.kernels import common
rows = []
for capability in (80, 90, 100):
    common.compiled_for = capability
    cases = importlib.import_module(sys.argv[1]).compile_cases()
    for name, kernel, signature, constexprs, options in cases:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        target = re.search(r"[.]target (sm_\\w+)", built.asm["ptx"])[1]
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(built.asm["ptx"])
            ptxas = binaries / ("ptxas-blackwell" if capability >= 100 else "ptxas")
            command = [ptxas, "-v", "--gpu-name", target, ptx, "-o", f"{folder}/out"]
            told = subprocess.run(command, text=True, capture_output=True, check=True).stderr
        spilled = sum(map(int, re.findall(r"(\\d+) bytes spill", told)))
        rows.append((name, target, int(re.search(r"Used (\\d+) registers", told)[1]), spilled))
print(json.dumps(rows))
"""


def compile_triton(stem: str, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache / stem)}
    command = [sys.executable, "-c", COMPILE_TRITON, f"pydiffuse.kernels.{stem}"]
    return subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)


STEMS = sorted(
    p.stem for p in (ROOT / "kernels").glob("*.py") if "def compile_cases" in p.read_text()
)  # the others are inner functions of these


@pytest.fixture(scope="module")
def triton_builds(tmp_path_factory):
    """Every stem compiled, as many at a time as there are cores; the longest first."""
    cache = tmp_path_factory.mktemp("triton")
    order = sorted(STEMS, key=lambda stem: stem not in ("attention", "scan", "guidance"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {stem: pool.submit(compile_triton, stem, cache) for stem in order}


@pytest.mark.parametrize("stem", STEMS)
def test_triton_kernels_compile_without_spills(stem, triton_builds, capsys):
    done = triton_builds[stem].result()
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]
    with capsys.disabled():
        report(f"Triton, {stem}", rows)
    assert not [r for r in rows if r[3]], "spills"
