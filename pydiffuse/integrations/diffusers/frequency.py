"""diffusers' guider by frequencies."""

from __future__ import annotations

import math
from typing import Any

from diffusers.guiders import frequency_decoupled_guidance as theirs
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from pydiffuse import guidance


class FrequencyDecoupledGuidance(theirs.FrequencyDecoupledGuidance):
    """diffusers' FrequencyDecoupledGuidance: each level of the pyramid by pydiffuse.cfg, or by pydiffuse.apg where
    the parallel part has a weight. The pyramids are kornia's.

    A level that is outside its range of steps is the conditional prediction's; 0.42.1 takes the last level
    that was inside.
    """

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_fdg_enabled():
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=pred_uncond)
        pyramids = (theirs.build_laplacian_pyramid_func(p, self.levels) for p in (pred_cond, pred_uncond))
        guided = [self._level(i, c, u) for i, (c, u) in enumerate(zip(*pyramids, strict=True))]
        pred = theirs.build_image_from_pyramid(guided)
        if self.guidance_rescale_space == "data" and self.guidance_rescale[0] > 0:
            pred = guidance.rescale(pred, pred_cond, float(self.guidance_rescale[0]))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _level(self, level: int, cond: Tensor, uncond: Tensor) -> Tensor:
        if not self._is_fdg_enabled_for_level(level):
            return cond
        in_place = self.guidance_rescale_space == "freq"
        common: dict[str, Any] = {
            "original": self.use_original_formulation,
            "rescale": float(self.guidance_rescale[level]) if in_place else 0.0,
        }
        scale, weight = self.guidance_scales[level], self.parallel_weights[level]
        if math.isclose(weight, 1.0):
            return guidance.cfg(cond, uncond, scale, **common)
        pred: Tensor = guidance.apg(cond, uncond, scale, eta=weight, **common)
        return pred
