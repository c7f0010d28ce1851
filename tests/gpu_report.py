"""What ran on a GPU: op x backend x dtype, tests passed of those that ran, from pytest's junit XML.

python3 tests/gpu_report.py out/gpu-test.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pydiffuse

BACKENDS = ("cuda", "triton")
DTYPES = ("float32", "bfloat16", "float16")
OF_STEM = {"test_attention": "tile_attention"}  # files whose cases do not name their op


def table(path: Path) -> str:
    passed: Counter[tuple[str, str, str]] = Counter()
    ran: Counter[tuple[str, str, str]] = Counter()
    ops = sorted(pydiffuse.OPS, key=len, reverse=True)
    others = [0, 0]
    for case in ET.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        good = case.find("failure") is None and case.find("error") is None
        name, where = case.get("name", ""), case.get("classname", "").rsplit(".", 1)[-1]
        told = re.search(r"\[(.*)\]", name)
        words = told[1] if told else ""
        backend = next((b for b in BACKENDS if b in words), None)
        op = next((o for o in ops if re.search(rf"\b{o}\b", words)), OF_STEM.get(where))
        if backend is None or op is None:
            others[good] += 1
            continue
        key = op, backend, next((d for d in DTYPES if d in words), "float32")
        ran[key] += 1
        passed[key] += good
    width = max(map(len, pydiffuse.OPS))
    columns = [(b, d) for b in BACKENDS for d in DTYPES]
    lines = ["op".ljust(width) + "".join(f"{b} {d}".rjust(17) for b, d in columns)]
    for op in pydiffuse.OPS:
        keys = [(op, *column) for column in columns]
        cells = [f"{passed[key]}/{ran[key]}" if ran[key] else "" for key in keys]
        if any(cells):
            lines.append(op.ljust(width) + "".join(cell.rjust(17) for cell in cells))
    bad = sum(ran.values()) - sum(passed.values()) + others[0]
    lines.append(f"{sum(ran.values()) + sum(others)} tests ran, {bad} failed")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
