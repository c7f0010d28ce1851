"""The Triton kernels compiled without a GPU, on one core beside the tests, which wait for them at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEMS = sorted(
    p.stem for p in (ROOT / "kernels").glob("*.py") if "def compile_cases" in p.read_text()
)  # the others are inner functions of these

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

_builds: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
_running: list[subprocess.Popen[str]] = []
_pool = ThreadPoolExecutor(1)


def compile_triton(stem: str) -> subprocess.CompletedProcess[str]:
    """All compile_cases of a stem; its output ends with JSON rows (name, target, registers, spilled bytes)."""
    with tempfile.TemporaryDirectory(prefix="pydiffuse-triton-") as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", COMPILE_TRITON, f"pydiffuse.kernels.{stem}"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
        _running.append(process)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(stems: Iterable[str]) -> None:
    for stem in stems:
        _builds[stem] = _pool.submit(compile_triton, stem)


def built(stem: str) -> subprocess.CompletedProcess[str]:
    return _builds[stem].result()


def stop() -> None:
    """Whatever nobody waits for any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in _running:
        process.kill()
