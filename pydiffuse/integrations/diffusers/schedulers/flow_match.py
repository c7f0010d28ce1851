"""diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput as Output,
)
from torch import Tensor

from pydiffuse.integrations.diffusers.linear import combinations, fits
from pydiffuse.integrations.diffusers.schedulers.levels import draw, levels
from pydiffuse.patch import patch_step

INTEGERS = (torch.int64, torch.int32)

theirs: Any = schedulers


class FlowMatchEulerDiscreteScheduler(theirs.FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler; a step reads two tensors and writes one.

    x' = x + (sigma' - sigma) v, and with `stochastic_sampling` (1 - sigma')(x - sigma v) + sigma' noise.
    With timesteps per token [B, S] of samples [B, S, D] the sign is the other one, as in diffusers:
    x + (sigma - sigma') v, where sigma' is the next lower level of the schedule. These stochastically, and
    dtypes and shapes that the kernels do not take, go to diffusers' own step.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x' as `prev_sample`, [B, ...] in the dtype of model_output; float32 with timesteps per token."""
        integer = isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and timestep.dtype in INTEGERS
        )
        found: Any = None
        if not integer and fits(model_output, sample):
            if per_token_timesteps is None:
                found = self._next(model_output, timestep, sample, generator)
            elif not self.config.stochastic_sampling and sample.dim() == 3:
                found = self._next_of_tokens(model_output, timestep, sample, per_token_timesteps)
        if found is None:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        self._step_index += 1
        return Output(prev_sample=found) if return_dict else (found,)

    def _next(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, after = levels(self)[self.step_index : self.step_index + 2]
        terms, row = [sample, model_output], [1.0, after - sigma]
        if self.config.stochastic_sampling:
            terms.append(draw(sample, torch.float32, generator))
            row = [1 - after, (after - 1) * sigma, after]
        return combinations(model_output.dtype, terms, row)[0]

    def _next_of_tokens(
        self: Any, model_output: Tensor, timestep: float | Tensor, sample: Tensor, timesteps: Tensor
    ) -> Tensor | None:
        if timesteps.shape != sample.shape[:2]:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma = timesteps / self.config.num_train_timesteps
        schedule = self.sigmas.to(sigma.device)[:, None, None]
        after = torch.where(schedule < sigma - 1e-6, schedule, 0.0).amax(0)
        # patch_step goes x + (t_next - t) v: from sigma' to sigma, that is.
        moved = patch_step(
            sample.float()[:, None], model_output[:, None], after.float(), sigma.float(),
            (1, sample.shape[2]),
        )  # fmt: skip
        return moved[0][:, 0]
