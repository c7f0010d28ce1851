"""Pipelines of diffusers with our guiders, from small random configurations: saved, loaded, and the same images."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: test)")

from pydiffuse.integrations import diffusers as ours  # noqa: E402
from tests.helpers import relative_error  # noqa: E402

SAME = 1e-5  # weights that were loaded lie at other addresses, and torch's matmul may take other kernels there
GUIDERS = {
    "ClassifierFreeGuidance": {"guidance_scale": 3.0, "stop": 0.8},
    "TangentialClassifierFreeGuidance": {"guidance_scale": 4.5, "guidance_rescale": 0.3},
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 2},
    "MagnitudeAwareGuidance": {"alpha": 3.0},
    "AdaptiveProjectedMixGuidance": {
        "adaptive_projected_guidance_start_step": 0,
        "guidance_rescale": 0.2,
    },
    "AdaptiveProjectedGuidance": {"eta": 0.3, "adaptive_projected_guidance_momentum": -0.5},
}


class Sampler(diffusers.DiffusionPipeline):
    """A pipeline as diffusers' own with a guider, of which most need transformers."""

    def __init__(self, transformer, scheduler, guider):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, guider=guider)

    @torch.no_grad()
    def __call__(self, x, prompt, steps=3):
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(step=i, num_inference_steps=steps, timestep=t)
            states = self.guider.prepare_inputs({"prompt": (prompt, torch.zeros_like(prompt))})
            for state in states:
                state.noise_pred = self.transformer(x, t.expand(len(x)), state.prompt).sample
            x = self.scheduler.step(self.guider(states)[0], t, x).prev_sample
        return x


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    given = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 7, 16)
    return transformer.eval(), diffusers.FlowMatchEulerDiscreteScheduler(), given


@pytest.mark.parametrize("name", GUIDERS)
def test_a_round_trip(name, parts, tmp_path):
    transformer, scheduler, given = parts
    pipe = Sampler(transformer, scheduler, getattr(ours, name)(**GUIDERS[name]))
    video = pipe(*given)
    theirs = Sampler(transformer, scheduler, getattr(diffusers.guiders, name)(**GUIDERS[name]))
    if name != "MagnitudeAwareGuidance":  # 0.42.1 takes a matrix norm there and raises
        assert relative_error(video, theirs(*given)) < 1e-4
    pipe.save_pretrained(tmp_path)
    loaded = Sampler.from_pretrained(tmp_path)
    assert type(loaded.guider) is getattr(ours, name)
    assert dict(loaded.guider.config).items() >= GUIDERS[name].items()
    assert relative_error(loaded(*given), video) < SAME


def test_a_pipeline_of_diffusers(tmp_path):
    """MotifVideoPipeline, with prompts that are embedded already."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra: test)")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    rest = {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.MotifVideoPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, **rest, transformer=transformer.eval(),
        guider=ours.TangentialClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    mask = torch.ones(1, 7, dtype=torch.bool)
    prompts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), torch.randn(2, 1, 7, 16)))
    call = {**prompts, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask,
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}  # fmt: skip

    def video(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(1)).frames

    expected = video(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.MotifVideoPipeline.from_pretrained(tmp_path, **rest)
    assert isinstance(loaded.guider, ours.TangentialClassifierFreeGuidance)
    assert expected.isfinite().all() and relative_error(video(loaded), expected) < SAME


def unet():
    """As Stable Diffusion: a UNet that predicts noise."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    rest = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    )
    vae = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, **rest}
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    prompts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), torch.randn(2, 1, 5, 16)))
    return pipe, rest, {**prompts, "height": 16, "width": 16, "eta": 0.5}


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    rest = dict.fromkeys(
        (
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "image_encoder",
            "feature_extractor",
        )
    )
    vae = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = diffusers.FluxPipeline(scheduler, vae, transformer=transformer, **rest)
    prompts = {"prompt_embeds": torch.randn(1, 5, 16), "pooled_prompt_embeds": torch.randn(1, 8)}
    return pipe, rest, {**prompts, "height": 16, "width": 16}


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    rest = {"text_encoder": None, "tokenizer": None, "transformer_2": None}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(vae=vae, scheduler=scheduler, transformer=transformer, **rest)
    prompts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), torch.randn(2, 1, 512, 16)))
    return pipe, rest, {**prompts, "height": 32, "width": 32, "num_frames": 5}


@pytest.mark.parametrize("made", [unet, flux, wan])
def test_images_with_a_fused_scheduler(made, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (extra: test)")
    torch.manual_seed(0)
    pipe, rest, call = made()
    call.update(num_inference_steps=4, output_type="pt")

    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(1))[0]

    schedulers = [type(pipe.scheduler)]
    if made is unet:
        schedulers.append(diffusers.DPMSolverMultistepScheduler)
    for original in schedulers:
        pipe.scheduler = original.from_config(pipe.scheduler.config)
        before = images(pipe)
        assert ours.fuse_scheduler(pipe) is pipe
        assert type(pipe.scheduler) is getattr(ours, original.__name__)
        after = images(pipe)
        assert before.isfinite().all() and relative_error(after, before) < 1e-5
        pipe.save_pretrained(tmp_path / original.__name__)
        loaded = type(pipe).from_pretrained(tmp_path / original.__name__, **rest)
        assert type(loaded.scheduler) is type(pipe.scheduler)
        assert relative_error(images(loaded), before) < 1e-4
