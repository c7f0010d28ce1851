"""Does the emulator miss a barrier? Every one in csrc/cuda is left out in turn; the results must change.

    python -m tests.cuda_host.mutants [--only FILE]

Some are not needed as the kernels are launched, and are known to be missed (NOT_NEEDED).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.cuda_host import build, calls, emulator

BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|\bcooperative_groups::this_grid\(\)\.sync\(\);")
EXPECTED = build.BUILD / "expected.pt"
NOT_NEEDED = {
    # The last of a loop over samples or chunks: launches have a block for each, up to 2^31.
    "guidance_gram.cuh": 2,
    "guidance_solve.cuh": 2,
    "guidance_mix.cuh": 1,  # before `decide`, whose own barrier protects the same
}


def barriers() -> list[tuple[Path, int]]:
    """File and place of each."""
    files = sorted(build.CUDA.glob("*.cuh"))
    return [(f, m.start()) for f in files for m in BARRIER.finditer(f.read_text())]


def line_of(file: Path, at: int) -> str:
    return f"{file.name}:{file.read_text()[:at].count(chr(10)) + 1}"


def differs() -> bool:
    """Whether the library that this process has gives other results, or says what is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory is NaN until it is written
    expected = torch.load(EXPECTED)
    for multiprocessors in (132, 1, 3):
        for seed in range(2):
            with emulator.running(seed, multiprocessors=multiprocessors):
                try:
                    found = calls.everything()
                except RuntimeError as error:
                    print(error)
                    return True
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                return True
    return False


def found(file: Path, at: int) -> bool:
    def without(source: Path, text: str) -> str:
        return text[:at] + BARRIER.sub(";", text[at:], count=1) if source == file else text

    library = build.library(name="mutant", edit=without)
    env = {**os.environ, "PYDIFFUSE_CUDA_HOST_LIBRARY": str(library), "PYTHONPATH": str(build.ROOT)}
    code = "import sys; from tests.cuda_host import mutants; sys.exit(mutants.differs())"
    done = subprocess.run([sys.executable, "-c", code], cwd=build.ROOT, env=env, capture_output=True)
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.mutants", description=__doc__)
    parser.add_argument("--only", help="a file's name")
    only = parser.parse_args().only
    with emulator.running():
        torch.save(calls.everything(), EXPECTED)
    missed: Counter[str] = Counter()
    for file, at in barriers():
        if only and file.name != only:
            continue
        where = line_of(file, at)
        seen = found(file, at)
        missed[file.name] += not seen
        print(f"{where:28} {'found' if seen else 'MISSED'}", flush=True)
    return 1 if missed - Counter(NOT_NEEDED) else 0


if __name__ == "__main__":
    sys.exit(main())
