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


@pytest.mark.parametrize("dims", [-1, [1], [-1, -2], (1, 2, 3), [0, 1, 2]])
def test_norm_over_some_dimensions(dims):
    options = {
        "adaptive_projected_guidance_norm_dim": dims, "adaptive_projected_guidance_momentum": -0.5,
        "adaptive_projected_guidance_rescale": 3.0, "eta": 0.3, "guidance_rescale": 0.4,
    }  # fmt: skip
    guiders = [m.AdaptiveProjectedGuidance(**options) for m in (ours, theirs)]
    for step in range(3):
        c, u = torch.randn(2, 2, 3, 5, 7)
        results = []
        for guider in guiders:
            guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(4))
            guider.prepare_inputs({"prompt": (c, u)})
            results.append(guider.forward(c, u).pred)
        assert results[0].shape == c.shape and relative_error(*results) < 1e-5
        averages = [guider.momentum_buffer.running_average for guider in guiders]
        assert relative_error(*averages) < 1e-6


LAYERS = {
    "skip_layer_guidance_layers": 1,
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.7,
}
PERTURBED = {
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 3, "eta": 0.4},
    "AutoGuidance": {"auto_guidance_layers": 1, "dropout": 0.1},
    "SkipLayerGuidance": LAYERS,
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": 1, "perturbed_guidance_stop": 0.9},
    "SmoothedEnergyGuidance": {
        "seg_guidance_layers": 1,
        "seg_guidance_start": 0.0,
        "seg_guidance_stop": 0.5,
    },
    "LTX2Guidance": {"stg_scale": 0.7, "modality_scale": 2.0},
}


@pytest.mark.parametrize(
    "common", [{}, {"guidance_rescale": 0.6, "use_original_formulation": True}, {"alone": True}]
)
@pytest.mark.parametrize("name", PERTURBED)
def test_guiders_of_several_predictions(name, common):
    """All steps, through what a pipeline calls; `alone` is without the unconditional prediction."""
    scale = 3.5
    options = {**PERTURBED[name], **common, "start": 0.2, "stop": 0.8}
    if options.pop("alone", False):
        scale = 1.0
    if name == "LTX2Guidance":
        options.pop("use_original_formulation", None)
    guiders = [getattr(m, name)(guidance_scale=scale, **options) for m in (ours, theirs)]
    assert dict(guiders[0].config).items() >= options.items()
    seen = set()
    for step in range(10):
        preds = dict(zip(guiders[0]._input_predictions, torch.randn(4, 2, 3, 5, 7)))
        results = []
        for guider in guiders:
            guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(4))
            blocks = guider.prepare_inputs({"prompt": (torch.zeros(1),) * 4})
            for block in blocks:
                block.noise_pred = preds[getattr(block, guider._identifier_key)]
            seen.add(len(blocks))
            results.append(guider(blocks).pred)
        assert relative_error(*results) < 1e-5
    assert len(seen) > 1 or scale == 1.0


def test_frequencies(monkeypatch):
    """Levels as an average and the rest stand here for kornia's."""
    from diffusers.guiders import frequency_decoupled_guidance as module

    def up(t):
        return torch.nn.functional.interpolate(t, scale_factor=2)

    def pyramid(t, levels):
        parts = []
        for _ in range(levels - 1):
            low = torch.nn.functional.avg_pool2d(t, 2)
            parts.append(t - up(low))
            t = low
        return [*parts, t]

    monkeypatch.setattr(module, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(module, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(module, "upsample_and_blur_func", up, raising=False)
    c, u = torch.randn(2, 2, 4, 16, 16)
    cases = [
        {},
        {"guidance_rescale": 0.5, "use_original_formulation": True, "parallel_weights": [0.3, 1.0]},
        {"guidance_rescale": [0.2, 0.7], "guidance_rescale_space": "freq", "start": 0.5},
    ]
    for options in cases:
        results = []
        for m in (ours, theirs):
            guider = m.FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0], **options)
            for step in (1, 3):
                guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(4))
                results.append(guider.forward(c, u).pred)
        assert relative_error(results[0], results[2]) < 1e-5
        assert relative_error(results[1], results[3]) < 1e-5
    guider = ours.FrequencyDecoupledGuidance(guidance_scales=[6.0, 3.0], start=[0.5, 0.0])
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(4))
    low = pyramid(u, 2)[1] + 3 * (pyramid(c, 2)[1] - pyramid(u, 2)[1])
    assert relative_error(guider.forward(c, u).pred, pyramid(c, 2)[0] + up(low)) < 1e-5
