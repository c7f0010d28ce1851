"""diffusers' UniPCMultistepScheduler: the corrector of the last step and the predictor of this one in one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerOutput as Output
from torch import Tensor

from pydiffuse.integrations.diffusers.linear import combinations, fits, promoted
from pydiffuse.integrations.diffusers.schedulers.levels import finite, integrand, level

theirs: Any = schedulers


class UniPCMultistepScheduler(theirs.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler (arXiv 2302.04867), of any order.

    A step is five reads and three writes at order 2: the sample, the model's output, the last corrected
    sample and two predictions; the new sample, the corrected one and this prediction. Where the last level
    is 0 its step is of first order, as the others do not exist there. `thresholding`, `solver_p`, and
    dtypes that the kernels do not take, go to diffusers' own step.
    """

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """`prev_sample`, [B, ...] in the dtype of sample."""
        found = self._fused(model_output, timestep, sample)
        if found is None:
            return super().step(model_output, timestep, sample, return_dict)
        return Output(prev_sample=found) if return_dict else (found,)

    def _fused(self: Any, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor | None:
        if self.config.thresholding or self.solver_p or self.num_inference_steps is None:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        i, wanted = self.step_index, self.config.solver_order
        corrects = i > 0 and i - 1 not in self.disable_corrector and self.last_sample is not None
        left = len(self.timesteps) - i if self.config.lower_order_final else wanted
        order = min(wanted, left, self.lower_order_nums + 1)
        many = max(self.this_order if corrects else 0, order - 1)
        older = [self.model_outputs[-k] for k in range(1, many + 1)]
        last = [self.last_sample] if corrects else []
        if not fits(sample, model_output, *last, *older):
            return None
        if promoted(sample, model_output) is not sample.dtype:
            return None
        try:
            rows = self._rows(order, self.this_order if corrects else 0, many)
        except (ArithmeticError, ValueError):
            return None
        if rows is None or not finite(*rows):
            return None
        # Without a corrector its sample is this one, and a prediction may be the model's output.
        kept = [j for j, own in ((1, corrects), (2, rows[2][:2] != [0.0, 1.0])) if own]
        places = [0, 1, *([2] if corrects else []), *range(3, 3 + many)]
        rows = [[row[m] for m in places] for row in (rows[0], *(rows[j] for j in kept))]
        made = combinations(sample.dtype, [sample, model_output, *last, *older], *rows)
        new = dict(zip(kept, made[1:], strict=True))
        self.last_sample = new.get(1, sample)
        self.model_outputs = [*self.model_outputs[1:], new.get(2, model_output)]
        self.timestep_list = [*self.timestep_list[1:], timestep]
        self.this_order = order
        self.lower_order_nums = min(self.lower_order_nums + 1, wanted)
        self._step_index += 1
        return made[0]

    def _rows(self: Any, order: int, corrector: int, many: int) -> list[list[float]] | None:
        """The new sample, the corrected sample and the prediction, of (x, m, the last corrected sample, and
        `many` older predictions from the newest on). corrector: its order, 0 where there is none."""
        kind = integrand(self, self.predict_x0)
        if kind is None:
            return None
        here = np.array([*kind, 0.0, *[0.0] * many])
        x = np.zeros_like(here)
        older = list(np.eye(len(here))[3:])
        if corrector:
            x[2] = 1
            x = self._update(x, self.step_index - 1, older, corrector, here)
        else:
            x[0] = 1
        goal = self._update(x, self.step_index, [here, *older], order, None)
        return [goal.tolist(), x.tolist(), here.tolist()]

    def _update(self: Any, x: Any, start: int, ms: Sequence[Any], order: int, arrived: Any) -> Any:
        """UniP from step `start` to the next one; UniC with `arrived`, the prediction there. x, ms (from
        the newest on) and arrived are rows of coefficients."""
        alpha, sigma, there = level(self, start + 1)
        alpha0, sigma0, here = level(self, start)
        h = there - here
        if self.predict_x0:
            result = sigma / sigma0 * x + (alpha - sigma * alpha0 / sigma0) * ms[0]
            hh, scale = -h, alpha
        else:
            result = alpha / alpha0 * x + (sigma - alpha * sigma0 / alpha0) * ms[0]
            hh, scale = h, sigma
        if not math.isfinite(h):
            return result
        B = hh if self.config.solver_type == "bh1" else math.expm1(hh)
        rs = [(level(self, start - k)[2] - here) / h for k in range(1, order)]
        rest = [(m - ms[0]) / r for m, r in zip(ms[1:], rs, strict=False)]
        points = len(rest)
        if arrived is not None:
            rest, points = [*rest, arrived - ms[0]], order
        if order == (2 if arrived is None else 1):
            weights = [0.5]
        elif rest:
            weights = _weights([*rs, 1.0][:points], hh, B)
        else:
            weights = []
        for weight, difference in zip(weights, rest, strict=True):
            result = result - scale * B * weight * difference
        return result


def _weights(rs: Sequence[float], hh: float, B: float) -> list[float]:
    """What makes the step exact for polynomials: sum_k rho_k r_k^(i-1) = i! phi_(i+1)(hh) hh^i / B."""
    phi, factorial, b = math.expm1(hh) / hh - 1, 1, []
    for i in range(1, len(rs) + 1):
        b.append(phi * factorial / B)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    powers = np.vander(rs, increasing=True).T
    found: list[float] = np.linalg.solve(powers, b).tolist()
    return found
