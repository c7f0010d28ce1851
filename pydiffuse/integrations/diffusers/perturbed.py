"""The guiders of diffusers that run the model once more with something left out, by one combination.

All of them are c + sum_i a_i (c - p_i) of the conditional prediction c and the others p_i.
"""

from __future__ import annotations

from typing import Any

import diffusers.guiders as theirs
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from pydiffuse import guidance


def _away(
    cond: Tensor, others: list[tuple[Tensor, float]], uncond: Tensor | None, rescale: float
) -> GuiderOutput:
    """c + sum_i a_i (c - p_i), with the rescale to c's spread; others: (p_i, a_i)."""
    pred = cond
    if others:
        conds = [cond, *(p for p, _ in others[:-1])]
        weights = [1 + sum(a for _, a in others), *(-a for _, a in others[:-1])]
        pred = guidance.compose(conds, others[-1][0], weights, rescale=rescale)
    return GuiderOutput(pred=pred, pred_cond=cond, pred_uncond=uncond)


def _skipping(
    guider: Any, cond: Tensor, uncond: Tensor | None, skipped: Tensor | None, scale: float, enabled: bool
) -> GuiderOutput:
    """Guidance away from the unconditional prediction and from one of a model that was perturbed. Where there
    is one of them only, and not `use_original_formulation`, it is that one that the guidance starts from."""
    others: list[tuple[Tensor, float]] = []
    start = 0.0 if guider.use_original_formulation else 1.0
    if guider._is_cfg_enabled():
        assert uncond is not None
        others.append((uncond, guider.guidance_scale - start))
        start = 0.0
    if enabled:
        assert skipped is not None
        others.append((skipped, scale - start))
    return _away(cond, others, uncond, float(guider.guidance_rescale))


class AutoGuidance(theirs.AutoGuidance):
    """diffusers' AutoGuidance by pydiffuse.cfg."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        pred = pred_cond
        if self._is_ag_enabled():
            assert pred_uncond is not None
            original, rescale = self.use_original_formulation, float(self.guidance_rescale)
            pred = guidance.cfg(
                pred_cond, pred_uncond, self.guidance_scale, original=original, rescale=rescale
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class SkipLayerGuidance(theirs.SkipLayerGuidance):
    """diffusers' SkipLayerGuidance by pydiffuse.compose."""

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> GuiderOutput:
        scale, enabled = self.skip_layer_guidance_scale, self._is_slg_enabled()
        return _skipping(self, pred_cond, pred_uncond, pred_cond_skip, scale, enabled)


class PerturbedAttentionGuidance(theirs.PerturbedAttentionGuidance):
    """diffusers' PerturbedAttentionGuidance by pydiffuse.compose."""

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_skip: Tensor | None = None
    ) -> GuiderOutput:
        scale, enabled = self.skip_layer_guidance_scale, self._is_slg_enabled()
        return _skipping(self, pred_cond, pred_uncond, pred_cond_skip, scale, enabled)


class SmoothedEnergyGuidance(theirs.SmoothedEnergyGuidance):
    """diffusers' SmoothedEnergyGuidance by pydiffuse.compose."""

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_seg: Tensor | None = None
    ) -> GuiderOutput:
        scale, enabled = self.seg_guidance_scale, self._is_seg_enabled()
        return _skipping(self, pred_cond, pred_uncond, pred_cond_seg, scale, enabled)


class LTX2Guidance(theirs.LTX2Guidance):
    """diffusers' LTX2Guidance by pydiffuse.compose."""

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_cond_stg: Tensor | None = None,
        pred_cond_modality: Tensor | None = None,
    ) -> GuiderOutput:
        terms = (
            (pred_uncond, self.guidance_scale - 1.0, self.is_cfg_enabled()),
            (pred_cond_stg, self.stg_scale, self.is_stg_enabled()),
            (pred_cond_modality, self.modality_scale - 1.0, self.is_modality_enabled()),
        )
        others: list[tuple[Any, float]] = [(pred, scale) for pred, scale, enabled in terms if enabled]
        return _away(pred_cond, others, pred_uncond, float(self.guidance_rescale))
