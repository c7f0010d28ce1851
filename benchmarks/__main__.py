"""`python -m benchmarks [stem ...]`: every op against its reference and its rivals, in one run.

Writes benchmarks/results/<device>.json and prints a table; `python -m benchmarks --tables` rewrites the
tables of docs/performance.md and README.md from the JSON. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import pydiffuse
from benchmarks import tables
from benchmarks.row import Row

RESULTS = Path(__file__).parent / "results"
STEMS = ("calls", "guidance", "scan", "attention", "adaln", "routing", "patch", "model")


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "pydiffuse": pydiffuse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    else:
        from pydiffuse import _host

        facts["cpu"] = next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        )
        facts["threads"] = torch.get_num_threads()
        facts["capability"] = _host.capability()
    return facts


def show(console: Console, results: list[Row]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("op", "what", "shape", "dtype"):
        table.add_column(name)
    for name in ("ms", "GB/s", "of floor", "error"):
        table.add_column(name, justify="right")
    for name in ("rivals (times ours)", "bars"):
        table.add_column(name)
    for row in results:
        r = row.as_dict()
        rivals = ", ".join(f"{x['name']} {x['ratio']:.2f}x" for x in r["rivals"] if x["ratio"])
        bars = "\n".join(f"[{'green' if b.held else 'red'}]{b}[/]" for b in row.bars)
        table.add_row(
            row.op,
            row.what,
            "x".join(map(str, row.shape)),
            r["dtype"],
            *(f"{v:{f}}" if v is not None else "" for v, f in (
                (row.ms, ".3f"), (r["gb_per_s"], ".1f"), (r["share_of_floor"], ".2f"), (row.error, ".1e"),
            )),
            rivals,
            bars,
        )  # fmt: skip
    console.print(table)


def save(out: Path, device: str, results: list[Row]) -> None:
    """After every row: a run that is stopped leaves what it measured."""
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(device), "rows": [row.as_dict() for row in results]}
    out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("stems", nargs="*", help=f"of {', '.join(STEMS)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="shorter, noisier")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--tables", action="store_true", help="only rewrite the tables from the JSON")
    args = parser.parse_args()
    out = args.out or RESULTS / f"{args.device}.json"
    if args.tables:
        tables.write(RESULTS)
        return 0
    console = Console(width=200 if not sys.stdout.isatty() else None)
    torch.manual_seed(0)
    results: list[Row] = []
    broken: list[str] = []
    with torch.random.fork_rng(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        for stem in args.stems or STEMS:
            try:
                for row in importlib.import_module(f"benchmarks.{stem}").rows(args.device, args.quick):
                    results.append(row)
                    progress.update(task, advance=1, description=f"{row.op}: {row.what}")
                    save(out, args.device, results)
            except Exception:  # the other families are measured all the same
                console.print_exception()
                broken.append(stem)
    show(console, results)
    missed = [f"{row.op}, {row.what}: {b}" for row in results for b in row.bars if not b.held]
    for line in missed:
        console.print(f"[red]missed[/] {line}")
    console.print(
        f"wrote {out}; {len(results)} rows, {len(missed)} bars missed; stopped: {broken or 'none'}"
    )
    return 1 if missed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
