"""The drop-ins against what they replace."""

from __future__ import annotations

import pytest
import torch

theirs = pytest.importorskip("diffusers.guiders", reason="diffusers is not installed (extra: bench)")

from pydiffuse.integrations import diffusers as ours  # noqa: E402
from tests.helpers import relative_error  # noqa: E402

GUIDERS = {
    "ClassifierFreeGuidance": {},
    "TangentialClassifierFreeGuidance": {},
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 1},
    "MagnitudeAwareGuidance": {"alpha": 3.0},
    "AdaptiveProjectedGuidance": {
        "adaptive_projected_guidance_momentum": -0.5,
        "adaptive_projected_guidance_rescale": 9.0,
        "eta": 0.3,
    },
}


def walk(guider):
    """Four steps over the same predictions; the first and last may be outside the guider's range."""
    generator = torch.Generator().manual_seed(3)
    results = []
    for step in range(4):
        guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(4 - step))
        u = torch.randn(2, 16, 16, generator=generator)  # [B, tokens, channels]: see MAMBO-G below
        c = u + 0.4 * torch.randn(2, 16, 16, generator=generator)
        if step == 0 and getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
            from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

            guider.momentum_buffer = MomentumBuffer(guider.adaptive_projected_guidance_momentum)
        results.append(guider.forward(c, u if guider.num_conditions == 2 else None).pred)
    return results


@pytest.mark.parametrize(
    "options", [{}, {"guidance_rescale": 0.6, "use_original_formulation": True, "stop": 0.75}]
)
@pytest.mark.parametrize("name", GUIDERS)
def test_same_images_as_diffusers(name, options):
    options = {**GUIDERS[name], **options, "guidance_scale": 6.0}
    guider = getattr(ours, name)(**options)
    assert dict(guider.config).items() >= options.items()
    # The SVD of diffusers' tangential guider is the tolerance: float32, and good at this size only.
    for a, b in zip(walk(guider), walk(getattr(theirs, name)(**options)), strict=True):
        if b.isfinite().all():
            assert relative_error(a, b) < 2e-5
        else:  # rescaling the zeros of CFG-Zero*'s first steps: 0/0 in diffusers
            assert not a.any()


def test_magnitude_aware_takes_images():
    """diffusers 0.42.1 takes a matrix norm there and raises on [B, C, H, W]."""
    guider = ours.MagnitudeAwareGuidance()
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(4))
    c, u = torch.randn(2, 1, 4, 8, 8)
    assert guider.forward(c, u).pred.isfinite().all()


def test_tangential_knows_which_batch_is_conditional():
    """diffusers 0.42.1 raises AttributeError here."""
    guider = ours.TangentialClassifierFreeGuidance()
    assert guider.is_conditional is False


def test_norm_over_some_dimensions_is_refused():
    guider = ours.AdaptiveProjectedGuidance(adaptive_projected_guidance_norm_dim=[-1])
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(4))
    c = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="norm_dim"):
        guider.forward(c, c)
