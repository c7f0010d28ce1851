"""Every supported Triton x GPU architecture: what the public API launches, compiled (`make gpu-compile`).

    python -m tests.gpu_compile [--triton 3.6.0 ...] [--capability 90 ...] [--out benchmarks/results/triton-builds.json]

Tritons beside the environment's own are folders triton-VERSION in it, which the Makefile installs. Writes, for
each kernel, its variants, the most registers, spilled bytes and shared memory of one; exit status 1 where a
kernel does not compile or asks for more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import compilers
from tests.launched import SHARED

TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for stem in record["stems"]:
        for name in sorted({b["kernel"] for b in stem["builds"]}):
            mine = [b for b in stem["builds"] if b["kernel"] == name]
            most = {key: max(b[key] for b in mine) for key in ("registers", "spilled", "shared")}
            rows.append({"stem": stem["stem"], "kernel": name, "variants": len(mine), **most})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_compile", description=__doc__)
    parser.add_argument("--triton", nargs="+", default=TRITONS)
    parser.add_argument("--capability", nargs="+", type=int, default=[*SHARED])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jobs = [(t, c, stem) for t in args.triton for c in args.capability for stem in compilers.STEMS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda j: compilers.compile_launches(j[0], j[2], capability=j[1]), jobs)
        records, bad = [], 0
        for (version, capability, stem), each in zip(jobs, done, strict=True):
            where = f"Triton {version}, sm_{capability}, {stem}"
            if each.returncode:
                bad += 1
                print(f"{where}: FAILED\n{each.stderr[-1500:]}", flush=True)
                continue
            rows = summary(compilers.record_of(each))
            records.append({"triton": version, "capability": capability, "stem": stem, "kernels": rows})
            over = [r["kernel"] for r in rows if r["shared"] > SHARED[capability]]
            bad += bool(over)
            spilled = {r["kernel"]: r["spilled"] for r in rows if r["spilled"]}
            kernels = sum(r["variants"] for r in rows)
            print(
                f"{where}: {kernels} kernels, spilled {spilled or 0}, too large {over or 0}", flush=True
            )
            if args.out:
                args.out.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
