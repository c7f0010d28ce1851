"""The guiders of diffusers with their arithmetic on pydiffuse: same names, same configuration.

Only `forward` is replaced (and, in the tangential guider, a property that 0.42.1 reads from a field which
does not exist). `pred_cond` and `pred_uncond` of the output are the model's, untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers.guiders as theirs
import torch
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from pydiffuse import guidance
from pydiffuse.integrations.diffusers.linear import combinations


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


def _apg(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    buffer: Any,
    dims: Sequence[int] | None,
    options: dict[str, Any],
) -> Tensor:
    """Adaptive projected guidance, norms over `dims`; the buffer of momentum, if any, is updated."""
    momentum: Any = None
    state: Any = None
    if buffer is not None:
        momentum = buffer.momentum
        state = buffer.running_average if isinstance(buffer.running_average, Tensor) else None
    if dims is None:
        pred = guidance.apg(cond, uncond, scale, momentum=momentum, state=state, **options)
        if buffer is not None:
            pred, buffer.running_average = pred
        return pred
    # What has a norm of its own is a sample; a rescale knows only the samples there are.
    rescale = options.pop("rescale")
    over = sorted({d % cond.dim() for d in dims})
    order = [d for d in range(cond.dim()) if d not in over] + over
    back = [order.index(d) for d in range(cond.dim())]
    rest = cond.dim() - len(over)

    def rows(t: Any) -> Any:
        if t is None:
            return None
        moved = t.permute(order)
        return moved.reshape(-1, *moved.shape[rest:])

    def whole(t: Tensor) -> Tensor:
        return t.reshape([cond.shape[d] for d in order]).permute(back)

    pred = guidance.apg(rows(cond), rows(uncond), scale, momentum=momentum, state=rows(state), **options)
    if buffer is not None:
        pred, average = pred
        buffer.running_average = whole(average)
    pred = whole(pred)
    return guidance.rescale(pred, cond, rescale) if rescale else pred


class AdaptiveProjectedGuidance(theirs.AdaptiveProjectedGuidance):
    """diffusers' AdaptiveProjectedGuidance by pydiffuse.apg, norms over `adaptive_projected_guidance_norm_dim`."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_apg_enabled():
            return _unguided(pred_cond, pred_uncond)
        options = {
            "eta": self.eta,
            "norm_threshold": self.adaptive_projected_guidance_rescale,
            **_common(self),
        }
        dims: Any = self.adaptive_projected_guidance_norm_dim
        dims = [dims] if isinstance(dims, int) else dims
        pred = _apg(pred_cond, pred_uncond, self.guidance_scale, self.momentum_buffer, dims, options)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class AdaptiveProjectedMixGuidance(theirs.AdaptiveProjectedMixGuidance):
    """diffusers' AdaptiveProjectedMixGuidance: pydiffuse.cfg, and the momentum's update in the same pass, then
    pydiffuse.apg."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_cfg_enabled():
            return _unguided(pred_cond, pred_uncond)
        buffer, common = self.momentum_buffer, _common(self)
        if self._is_apg_enabled():
            options = {
                "eta": self.eta,
                "norm_threshold": self.adaptive_projected_guidance_rescale,
                **common,
            }
            scale = self.adaptive_projected_guidance_scale
            pred = _apg(pred_cond, pred_uncond, scale, buffer, None, options)
        elif buffer is None:
            pred = guidance.cfg(pred_cond, pred_uncond, self.guidance_scale, **common)
        else:
            w = self.guidance_scale
            terms, guided = [pred_cond, pred_uncond], [w + common["original"], 1 - common["original"] - w]
            moved = [1.0, -1.0]
            if isinstance(buffer.running_average, Tensor):
                terms.append(buffer.running_average)
                guided, moved = [*guided, 0.0], [*moved, buffer.momentum]
            pred, buffer.running_average = combinations(pred_cond.dtype, terms, guided, moved)
            if common["rescale"]:
                pred = guidance.rescale(pred, pred_cond, common["rescale"])
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
