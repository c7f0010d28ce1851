"""What the compilers made of the kernels: no weak symbols, no spills, every declared architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import setup as build
from tests import compilers

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


@pytest.mark.parametrize("stem", compilers.STEMS)
def test_triton_kernels_compile_without_spills(stem, capsys):
    done = compilers.built(stem)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]
    with capsys.disabled():
        report(f"Triton, {stem}", rows)
    assert not [r for r in rows if r[3]], "spills"
