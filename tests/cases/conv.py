"""The cases of the causal convolution."""

from __future__ import annotations

from typing import Any

from tests.cases.scan import ScanMaker
from tests.table import Case


def conv(
    t: ScanMaker, width: int, bias: bool = True, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = (t.tokens(), t.matrix(t.size.D, width), *([t.matrix(t.size.D)] if bias else []))
    return args, {"layout": t.layout, "activation": "silu", **options}


OP = "causal_conv1d"
CASES = [
    Case(OP, "mamba", lambda t: conv(t, 4), reads=1),
    Case(OP, "path", lambda t: conv(t, 4, path=t.path()), reads=1),
    Case(OP, "linear", lambda t: conv(t, 3, bias=False, activation=None, reverse=True), reads=1),
    Case(
        OP,
        "sequences",
        lambda t: conv(t, 8, path=t.path(), reverse=True, cu_seqlens=t.sequences()),
        reads=1,
    ),
    Case(OP, "one_tap", lambda t: conv(t, 1), reads=1),
]
