"""The CUDA kernels on the host, at length (`make cuda-emulate`): every test of guidance, scans and
convolutions, threads in several orders, AddressSanitizer and UBSan, and every barrier left out in turn. About
an hour on two cores.

    python -m tests.cuda_host [--seeds 3] [seeds | sanitize | mutants ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from tests.cuda_host import build

TESTS = ["tests/test_cuda_host.py", "tests/test_guidance.py", "tests/test_scan.py"]
# What says nothing about CUDA, or is the same at any size.
LEFT_OUT = "not (cpu or large_convolutions or lower or threads)"
# What a sanitizer may see: every kernel at every size, tensors in any order of memory, results in inputs.
SANITIZED = "test_cuda_host or layouts or test_out or multistep_out"
STEPS = ("seeds", "sanitize", "mutants")


def preloaded() -> str:
    """AddressSanitizer, and beside it the library whose exceptions it intercepts."""

    def path(library: str) -> str:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()

    return f"{path('libasan.so')} {path('libstdc++.so.6')}"


def runs(steps: list[str], seeds: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Title -> command and environment."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-k"]
    emulated = {"PYDIFFUSE_CUDA_EMULATED": "1"}
    found = {}
    if "seeds" in steps:
        for seed in range(1, seeds + 1):
            found[f"seed {seed}"] = [*pytest, LEFT_OUT], {**emulated, "PYDIFFUSE_CUDA_SEED": str(seed)}
    if "sanitize" in steps:
        sanitizers = {"LD_PRELOAD": preloaded(), "ASAN_OPTIONS": "detect_leaks=0"}
        found["sanitizers"] = (
            [*pytest, f"({SANITIZED}) and {LEFT_OUT}"],
            {**emulated, **sanitizers, "PYDIFFUSE_CUDA_SANITIZED": "1"},
        )
    if "mutants" in steps:
        found["barriers left out"] = [sys.executable, "-m", "tests.cuda_host.mutants"], {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host", description=__doc__)
    parser.add_argument("steps", nargs="*", default=STEPS, help=f"of {', '.join(STEPS)}")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    failed = []
    for sanitize in [False, True] if "sanitize" in args.steps else [False]:
        build.library(sanitize)  # not under the sanitizers
    for title, (command, env) in runs(args.steps, args.seeds).items():
        print(f"== {title}", flush=True)
        began = time.monotonic()
        done = subprocess.run(command, cwd=build.ROOT, env={**os.environ, **env})
        print(f"== {title}: {time.monotonic() - began:.0f} s, status {done.returncode}", flush=True)
        failed += [title] if done.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
