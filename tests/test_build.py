"""What the compilers made of the kernels: no weak symbols, no spills, every declared architecture."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import setup as build
from tests import compilers
from tests.launched import SHARED

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


def rows_of(record: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """Per kernel: its variants, the most registers and spilled bytes of one."""
    rows = []
    for stem in record["stems"]:
        for name in sorted({b["kernel"] for b in stem["builds"]}):
            mine = [b for b in stem["builds"] if b["kernel"] == name]
            most = max(b["registers"] for b in mine), max(b["spilled"] for b in mine)
            rows.append((name, f"{len(mine)} variants", *most))
    return rows


# Bytes that a kernel may spill in rare variants: with the most terms a rule can have, with B constant in time;
# and attention's tile of 64 by 32 at D = 128, measured faster on an H100 than the tiles that spill nothing.
SPILLS = {"guide_kernel": 104, "walk_kernel": 32, "dkv_kernel": 208}


@pytest.mark.parametrize("way", compilers.WAYS)
@pytest.mark.parametrize("stem", compilers.STEMS)
@pytest.mark.parametrize("triton", [compilers.PINNED, compilers.OLDEST])
def test_triton_kernels_compile_as_launched(triton, stem, way, capsys):
    """What the public API launches: no spills in what is common, shared memory that a block may have, and
    variants of a kernel by what it computes, not by lengths and batches."""
    if compilers.missing(triton):
        pytest.skip(compilers.missing(triton))
    record = compilers.record_of(compilers.built((triton, stem, way)))
    builds = [b for each in record["stems"] for b in each["builds"]]
    launched = sum(each["launched"] for each in record["stems"])
    assert record["triton"] == triton and launched >= len(builds) > 0
    rows = rows_of(record)
    with capsys.disabled():
        report(f"Triton {triton}, {stem}, {way}: {launched} launches, {len(builds)} kernels", rows)
    allowed = SPILLS if way == "every case" else {}
    assert not [b for b in builds if b["spilled"] > allowed.get(b["kernel"], 0)], "spills"
    assert not [b for b in builds if b["shared"] > SHARED[record["capability"]]], "shared memory"
    if way == "20 sizes":
        assert not [r for r in rows if int(r[1].split()[0]) > 4], "variants"
