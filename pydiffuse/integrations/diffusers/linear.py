"""Several linear combinations of several tensors in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import DTYPES
from pydiffuse._core.functions import differentiable
from pydiffuse.guidance import guide, reference

Row = Sequence[float]


def fits(*tensors: Any) -> bool:
    """Whether the kernels take these together: of one shape and device, and of a dtype that they know."""
    first = tensors[0]
    return all(
        isinstance(t, Tensor)
        and t.dtype in DTYPES
        and t.device.type in ("cpu", "cuda")
        and t.shape == first.shape
        and t.device == first.device
        and t.dim() > 0
        for t in tensors
    )


def promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def combinations(dtype: torch.dtype, terms: Sequence[Tensor], *rows: Row) -> tuple[Tensor, ...]:
    """sum_m rows[j][m] terms[m] for every j, in `dtype`, in one pass.

    terms: [B, ...], of one shape; what no row needs is not read.
    """
    used = [m for m in range(len(terms)) if any(row[m] for row in rows)]
    used = used or [0]
    # The outputs are as the first term is.
    used.sort(key=lambda m: terms[m].dtype is not dtype)
    ts = [terms[m] for m in used]
    if ts[0].dtype is not dtype:
        ts[0] = ts[0].to(dtype)
    cs = [[float(row[m]) for m in used] for row in rows]
    if dispatch.forced_reference():
        return tuple(reference.combine(ts, ts[0].new_tensor(c, dtype=torch.float64)) for c in cs)
    if 2 <= len(ts) <= 4 and not any(any(c[2:]) for c in cs[1:]) and len(cs) <= 2:
        return _by_guide(ts, cs)
    matrix = torch.tensor([cs], dtype=torch.float64).to(ts[0].device, non_blocking=True)
    matrix = matrix.expand(len(ts[0]), -1, -1)
    made: tuple[Tensor, ...] = differentiable("guidance.Mix", "step", len(cs), matrix, None, *ts)
    return made


def _by_guide(ts: list[Tensor], cs: list[list[float]]) -> tuple[Tensor, ...]:
    """Up to four terms and, of the first two of them, a second result: the numbers go by value there."""
    (a, b, *more), *predict = cs
    others: dict[str, Any] = {}
    for (place, number), t, c in zip((("history", "h"), ("noise", "s")), ts[2:], more, strict=False):
        others[place], others[number] = t, c
    if predict:
        others["predict"] = tuple(predict[0][:2])
    made = guide([ts[1]], "linear", weights=[1.0], x=ts[0], a=a, b=b, **others)
    return made if isinstance(made, tuple) else (made,)
