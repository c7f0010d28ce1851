"""A scheduler's step as one op: what it returns are linear combinations of the sample, the model's output and
what earlier steps left, with coefficients that depend on the noise levels alone.

The coefficients are float64 numbers on the host, of levels that are read once for all steps: there is no sync
in a step, and the arithmetic on tensors is float32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import DTYPES
from pydiffuse._core.functions import differentiable
from pydiffuse.guidance import guide, reference
from pydiffuse.guidance.autograd import Mix


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


def draw(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Standard normal noise, as diffusers draws it."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)


def promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def levels(scheduler: Any, name: str = "sigmas") -> list[float]:
    """The values of a scheduler's tensor as Python numbers, read again when it is another one."""
    tensor = getattr(scheduler, name)
    known = scheduler.__dict__.get("_levels")
    if known is None or known[0] is not tensor or known[1] != tensor._version:
        known = scheduler.__dict__["_levels"] = (tensor, tensor._version, tensor.tolist())
    found: list[float] = known[2]
    return found


def level(scheduler: Any, index: int) -> tuple[float, float, float]:
    """alpha, sigma and lambda = log(alpha / sigma) at a step of a scheduler with `use_flow_sigmas`."""
    sigma = levels(scheduler)[index]
    if scheduler.config.use_flow_sigmas:
        alpha = 1 - sigma
    else:
        alpha = 1 / math.sqrt(sigma**2 + 1)
        sigma *= alpha
    return alpha, sigma, log_snr(alpha, sigma)


def integrand(scheduler: Any, data: bool) -> tuple[float, float] | None:
    """(p, q) of what such a scheduler integrates in this step, p x + q m: data, or noise."""
    alpha, sigma, _ = level(scheduler, scheduler.step_index)
    kind = scheduler.config.prediction_type
    if kind == "flow_prediction":
        sigma = levels(scheduler)[scheduler.step_index]
    return data_of(kind, alpha, sigma) if data else noise_of(kind, alpha, sigma)


def log_snr(alpha: float, sigma: float) -> float:
    """lambda = log(alpha / sigma), infinite at both ends."""
    if alpha <= 0 or sigma <= 0:
        return -math.inf if alpha <= 0 else math.inf
    return math.log(alpha) - math.log(sigma)


def data_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float] | None:
    """x1 = p x + q m, of what a model predicts at x = alpha x1 + sigma eps. None where it is another kind."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "flow_prediction":
        return 1.0, -sigma
    return (0.0, 1.0) if prediction == "sample" else None


def noise_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float] | None:
    """eps = p x + q m, likewise."""
    if prediction == "sample":
        return 1 / sigma, -alpha / sigma
    if prediction == "v_prediction":
        return sigma, alpha
    return (0.0, 1.0) if prediction == "epsilon" else None


Row = Sequence[float]


def finite(*rows: Row) -> bool:
    return all(math.isfinite(c) for row in rows for c in row)


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
    made: tuple[Tensor, ...] = differentiable(Mix, "step", len(cs), matrix, None, *ts)
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
