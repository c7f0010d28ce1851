"""The guiders of diffusers with their arithmetic on pydiffuse: same names, same configuration.

Only `forward` is replaced (and, in the tangential guider, a property that 0.42.1 reads from a field which
does not exist). `pred_cond` and `pred_uncond` of the output are the model's, untouched.
"""

from __future__ import annotations

from typing import Any

import diffusers.guiders as theirs
import torch
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from pydiffuse import guidance


def _unguided(cond: Tensor, uncond: Tensor | None) -> GuiderOutput:
    """Outside the guider's range of steps: the conditional prediction alone.

    Its rescale to its own spread changes nothing.
    """
    return GuiderOutput(pred=cond, pred_cond=cond, pred_uncond=uncond)


def _common(guider: Any) -> dict[str, Any]:
    return {"original": guider.use_original_formulation, "rescale": float(guider.guidance_rescale)}


class ClassifierFreeGuidance(theirs.ClassifierFreeGuidance):
    """diffusers' ClassifierFreeGuidance by pydiffuse.cfg."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_cfg_enabled():
            return _unguided(pred_cond, pred_uncond)
        pred = guidance.cfg(pred_cond, pred_uncond, self.guidance_scale, **_common(self))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class TangentialClassifierFreeGuidance(theirs.TangentialClassifierFreeGuidance):
    """diffusers' TangentialClassifierFreeGuidance by pydiffuse.tcfg: no SVD."""

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_tcfg_enabled():
            return _unguided(pred_cond, pred_uncond)
        pred = guidance.tcfg(pred_cond, pred_uncond, self.guidance_scale, **_common(self))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class ClassifierFreeZeroStarGuidance(theirs.ClassifierFreeZeroStarGuidance):
    """diffusers' ClassifierFreeZeroStarGuidance by pydiffuse.cfg_zero, zero_init_steps included."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if self._enabled and self._step < self.zero_init_steps:
            pred = torch.zeros_like(pred_cond)
        elif pred_uncond is None or not self._is_cfg_enabled():
            return _unguided(pred_cond, pred_uncond)
        else:
            pred = guidance.cfg_zero(pred_cond, pred_uncond, self.guidance_scale, **_common(self))
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class MagnitudeAwareGuidance(theirs.MagnitudeAwareGuidance):
    """diffusers' MagnitudeAwareGuidance (MAMBO-G) by pydiffuse.magnitude_aware."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_mambo_g_enabled():
            return _unguided(pred_cond, pred_uncond)
        pred = guidance.magnitude_aware(
            pred_cond, pred_uncond, self.guidance_scale, alpha=self.alpha, **_common(self)
        )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class AdaptiveProjectedGuidance(theirs.AdaptiveProjectedGuidance):
    """diffusers' AdaptiveProjectedGuidance by pydiffuse.apg; norms are over whole samples."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_apg_enabled():
            return _unguided(pred_cond, pred_uncond)
        if self.adaptive_projected_guidance_norm_dim is not None:
            raise ValueError(
                f"AdaptiveProjectedGuidance: adaptive_projected_guidance_norm_dim is"
                f" {self.adaptive_projected_guidance_norm_dim}; accepted: None (the whole sample)."
                " diffusers' own guider takes norms over some dimensions"
            )
        options = {
            "eta": self.eta,
            "norm_threshold": self.adaptive_projected_guidance_rescale,
            **_common(self),
        }
        buffer = self.momentum_buffer
        if buffer is None:
            pred = guidance.apg(pred_cond, pred_uncond, self.guidance_scale, **options)
        else:
            state = buffer.running_average if isinstance(buffer.running_average, Tensor) else None
            pred, buffer.running_average = guidance.apg(
                pred_cond,
                pred_uncond,
                self.guidance_scale,
                momentum=buffer.momentum,
                state=state,
                **options,
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
