"""diffusers' DPMSolverMultistepScheduler: DPM-Solver and DPM-Solver++ 1, 2M and 3M, and their SDE forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerOutput as Output
from torch import Tensor

from pydiffuse.integrations.diffusers.linear import combinations, fits, promoted
from pydiffuse.integrations.diffusers.schedulers.levels import draw, finite, integrand, level

theirs: Any = schedulers


class DPMSolverMultistepScheduler(theirs.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler, orders 1 to 3; a step of DPM-Solver++ 2M reads the sample, the
    model's output and the last data prediction, and writes the new sample and this data prediction.

    `thresholding`, learned variances, and dtypes that the kernels do not take, go to diffusers' own step.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """`prev_sample`, [B, ...] in the dtype of sample and model_output."""
        found = self._fused(model_output, timestep, sample, generator, variance_noise)
        if found is None:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        return Output(prev_sample=found) if return_dict else (found,)

    def _fused(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None,
        variance_noise: Tensor | None,
    ) -> Tensor | None:
        learned = self.config.variance_type in ("learned", "learned_range")
        if self.config.thresholding or learned or self.num_inference_steps is None:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        order = self._order()
        older = [self.model_outputs[-i] for i in range(1, order)]
        drawn = [] if variance_noise is None else [variance_noise]
        if not fits(model_output, sample, *older, *drawn):
            return None
        try:
            kind = integrand(self, self.config.algorithm_type.endswith("++"))
            x, ms, s = self._coefficients(order)
        except (ArithmeticError, ValueError):
            return None
        if kind is None or not finite((x, *ms, s, *kind)):
            return None
        terms = [sample, model_output, *older]
        row = [x + ms[0] * kind[0], ms[0] * kind[1], *ms[1:]]
        if self.config.algorithm_type.startswith("sde"):
            if variance_noise is None:
                variance_noise = draw(model_output, torch.float32, generator)
            terms.append(variance_noise)
            row.append(s)
        given = kind == (0.0, 1.0)  # what is kept for later steps is the model's output itself
        dtype = model_output.dtype if given else promoted(sample, model_output)
        rows = [row] if given else [row, [*kind, *[0.0] * (len(terms) - 2)]]
        made = combinations(dtype, terms, *rows)
        self.model_outputs = [*self.model_outputs[1:], model_output if given else made[1]]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return made[0]

    def _order(self: Any) -> int:
        """Of this step: lower at both ends."""
        config, steps, wanted = self.config, len(self.timesteps), self.config.solver_order
        few = config.lower_order_final and steps < 15
        last = self.step_index == steps - 1
        if last and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        if self.step_index == steps - 2 and few:
            wanted = min(wanted, 2)
        return min(wanted, self.lower_order_nums + 1, 3)

    def _coefficients(self: Any, order: int) -> tuple[float, Sequence[float], float]:
        """x' = a x + sum_i c_i m_i + s noise, m_i the predictions from the newest on: (a, c, s)."""
        alpha, sigma, goal = level(self, self.step_index + 1)
        alpha0, sigma0, here = level(self, self.step_index)
        h = goal - here
        algorithm = self.config.algorithm_type
        # c0, c1 and c2 weigh the prediction and its first two differences.
        if algorithm == "dpmsolver++":
            e = math.exp(-h)
            a, c0, s = sigma / sigma0, alpha * (1 - e), 0.0
            c1 = c0 / 2, alpha * ((e - 1) / h + 1)
            c2 = -alpha * ((e - 1 + h) / h**2 - 0.5)
        elif algorithm == "dpmsolver":
            e = math.exp(h)
            a, c0, s = alpha / alpha0, -sigma * (e - 1), 0.0
            c1 = c0 / 2, -sigma * ((e - 1) / h - 1)
            c2 = -sigma * ((e - 1 - h) / h**2 - 0.5)
        elif algorithm == "sde-dpmsolver++":
            e = math.exp(-2 * h)
            a, c0, s = sigma / sigma0 * math.exp(-h), alpha * (1 - e), sigma * math.sqrt(1 - e)
            c1 = c0 / 2, alpha * ((1 - e) / (-2 * h) + 1)
            c2 = alpha * ((1 - e - 2 * h) / (2 * h) ** 2 - 0.5)
        else:
            e = math.exp(h)
            a, c0, s = alpha / alpha0, -2 * sigma * (e - 1), sigma * math.sqrt(e * e - 1)
            c1 = c0 / 2, -2 * sigma * ((e - 1) / h - 1)
            c2 = math.nan  # diffusers has none
        if order == 1:
            return a, (c0,), s
        before = [here, *(level(self, self.step_index - i)[2] for i in range(1, order))]
        r0 = (before[0] - before[1]) / h
        if order == 2:
            d = c1[self.config.solver_type == "heun"] / r0
            return a, (c0 + d, -d), s
        r1 = (before[1] - before[2]) / h
        first, second = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
        share, over = r0 / (r0 + r1), 1 / (r0 + r1)
        d = c1[1]
        weights = [
            d * (f + share * (f - g)) + c2 * over * (f - g) for f, g in zip(first, second, strict=True)
        ]
        return a, (c0 + weights[0], *weights[1:]), s
