"""The cards that the stand-in runtime knows, and what machine code of ours takes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

RESOURCES = Path(__file__).parent / "resources.json"


class Device(NamedTuple):
    """CUDA C++ Programming Guide, table of compute capabilities; multiprocessors of one card."""

    card: str
    multiprocessors: int
    threads: int  # of a multiprocessor
    shared: int  # kilobytes of a multiprocessor, of a block
    shared_of_block: int


DEVICES = {
    "80": Device("A100", 108, 2048, 164, 163),
    "86": Device("RTX 3090", 82, 1536, 100, 99),
    "89": Device("RTX 4090", 128, 1536, 100, 99),
    "90a": Device("H100", 132, 2048, 228, 227),
    "100": Device("B200", 148, 2048, 228, 227),
    "120": Device("RTX 5090", 170, 1536, 100, 99),
}


def short(name: str) -> str:
    """A kernel's name as both compilers have it, without namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|pydiffuse::", "", name)
    name = re.sub(r"^void |\((?:int|bool|Pass)\)", "", name)
    name = re.sub(r"\b(?:true|false)\b", lambda m: str(int(m[0] == "true")), name)
    return name.split("(")[0].strip()
