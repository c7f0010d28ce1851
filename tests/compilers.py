"""What the Triton kernels compile to without a GPU (tests/launched.py), on one core beside the tests, which
wait for it at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEMS = ("guidance", "scan", "conv", "attention", "patch", "adaln", "routing")
PINNED = version("triton")
OLDEST = "3.6.0"  # comes with torch 2.11
WAYS = ("every case", "20 sizes")

Job = tuple[str, str, str]  # Triton's version, stem, way

_builds: dict[Job, Future[subprocess.CompletedProcess[str]]] = {}
_running: list[subprocess.Popen[str]] = []
_pool = ThreadPoolExecutor(1)


def folder_of(triton: str) -> Path | None:
    """Where a Triton beside the environment's own was installed (`pip install --no-deps --target`)."""
    return None if triton == PINNED else Path(sys.prefix) / f"triton-{triton}"


def missing(triton: str) -> str | None:
    folder = folder_of(triton)
    return f"{folder} has no Triton; `make test` installs it" if folder and not folder.exists() else None


def compile_launches(
    triton: str, stem: str, way: str = WAYS[0], capability: int = 90
) -> subprocess.CompletedProcess[str]:
    """What tests/launched.py says; its output is a JSON record."""
    with tempfile.TemporaryDirectory(prefix="pydiffuse-triton-") as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        folders = [str(f) for f in (folder_of(triton), ROOT) if f]
        env |= {"PYTHONPATH": os.pathsep.join(folders), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "tests.launched", stem, f"--capability={capability}"]
        command += ["--sizes"] if way == WAYS[1] else []
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
        _running.append(process)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def record_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def start(jobs: Iterable[Job]) -> None:
    for job in jobs:
        if not missing(job[0]):
            _builds[job] = _pool.submit(compile_launches, *job)


def built(job: Job) -> subprocess.CompletedProcess[str]:
    return _builds[job].result()


def stop() -> None:
    """Whatever nobody waits for any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in _running:
        process.kill()
