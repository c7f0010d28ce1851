"""diffusers' DDIMScheduler."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput as Output
from torch import Tensor

from pydiffuse.integrations.diffusers.linear import Row, combinations, fits, promoted
from pydiffuse.integrations.diffusers.schedulers.levels import data_of, draw, finite, levels, noise_of

theirs: Any = schedulers


class DDIMScheduler(theirs.DDIMScheduler):
    """diffusers' DDIMScheduler, with any eta; a step reads sample and prediction, and noise where eta > 0,
    and writes the new sample and the predicted data.

    `clip_sample` (which is diffusers' default; latent models switch it off), `thresholding` and
    `use_clipped_model_output`, and dtypes that the kernels do not take, go to diffusers' own step.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """`prev_sample` and `pred_original_sample`, [B, ...] in the dtype of sample and model_output."""
        clipped = self.config.clip_sample or self.config.thresholding or use_clipped_model_output
        given = (model_output, sample) + (() if variance_noise is None else (variance_noise,))
        both = variance_noise is not None and generator is not None
        rows = None
        if self.num_inference_steps is not None and not clipped and not both and fits(*given):
            rows = self._rows(int(timestep), eta)
        if rows is None:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        terms = [sample, model_output]
        if eta > 0:
            if variance_noise is None:
                variance_noise = draw(model_output, model_output.dtype, generator)
            terms.append(variance_noise)
        is_data = self.config.prediction_type == "sample"
        made = combinations(promoted(*terms), terms, *(rows[:1] if is_data else rows))
        found = made[0], model_output if is_data else made[1]
        return Output(prev_sample=found[0], pred_original_sample=found[1]) if return_dict else found

    def _rows(self: Any, timestep: int, eta: float) -> tuple[Row, Row] | None:
        """x' and x1 of (x, m, noise). None where they are not finite, or the noise is more than there is."""
        squares = levels(self, "alphas_cumprod")
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps
        now = squares[timestep]
        then = squares[before] if before >= 0 else float(self.final_alpha_cumprod)
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        kind = self.config.prediction_type
        try:
            data = data_of(kind, alpha, sigma)
            noise = noise_of(kind, alpha, sigma)
            variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        except ZeroDivisionError:
            return None
        if data is None or noise is None or variance > (1 - then) * (1 + 1e-9):
            return None
        kept = math.sqrt(max(1 - then - variance, 0.0))
        x, m = (math.sqrt(then) * d + kept * n for d, n in zip(data, noise, strict=True))
        rows = (x, m, math.sqrt(variance)), (*data, 0.0)
        return rows if finite(*rows) else None
