"""Coefficients of a scheduler's step. What it returns are linear combinations of the sample, the model's output
and what earlier steps left, by numbers that depend on the noise levels alone.

They are float64 numbers on the host, of levels that are read once for all steps: there is no sync in a step,
and the arithmetic on tensors is float32, rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pydiffuse.integrations.diffusers.linear import Row


def draw(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Standard normal noise, as diffusers draws it."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)


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


def finite(*rows: Row) -> bool:
    return all(math.isfinite(c) for row in rows for c in row)
