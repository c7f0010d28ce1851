"""Tiny transformers of diffusers: a model, the arguments of its call, its self-attention's tokens and layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch


class Tiny(NamedTuple):
    model: torch.nn.Module
    arguments: dict[str, Any]
    tokens: int
    layers: int

    def __call__(self, **changed: Any) -> torch.Tensor:
        return self.model(**self.arguments | changed).sample


PROMPT = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
IMAGE = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2}


def image():
    return torch.randn(2, 4, 8, 8)


def video(axis=2):
    return torch.randn(2, 4, 3, 8, 8).movedim(2, axis)


def prompt(tokens=PROMPT, width=16):
    return torch.randn(2, tokens, width)


def step():
    return torch.tensor([3, 3])


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **HEADS, **IMAGE, num_layers=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    given = {
        "encoder_hidden_states": prompt(),
        "pooled_projections": torch.randn(2, 16),
        "timestep": step(),
    }
    return Tiny(model, {"hidden_states": image(), **given}, 16 + PROMPT, 2)


def dit():
    model = diffusers.DiTTransformer2DModel(
        **HEADS, **IMAGE, num_layers=2, num_embeds_ada_norm=10, norm_num_groups=2
    )
    given = {"timestep": step(), "class_labels": torch.tensor([1, 2])}
    return Tiny(model, {"hidden_states": image(), **given}, 16, 2)


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, **IMAGE, num_layers=2, num_embeds_ada_norm=10, norm_num_groups=2, cross_attention_dim=16,
        caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    given = {"encoder_hidden_states": prompt(), "timestep": step()}
    return Tiny(model, {"hidden_states": image(), **given}, 16, 2)


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=PROMPT,
    )  # fmt: skip
    given = {"encoder_hidden_states": prompt(width=8), "timestep": step()}
    return Tiny(model, {"hidden_states": video(1), **given}, 48 + PROMPT, 2)


def mochi():
    model = diffusers.MochiTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, patch_size=2, num_layers=2, pooled_projection_dim=16, text_embed_dim=16,
        time_embed_dim=4, max_sequence_length=PROMPT,
    )  # fmt: skip
    every = torch.ones(2, PROMPT, dtype=torch.bool)
    given = {"encoder_hidden_states": prompt(), "timestep": step(), "encoder_attention_mask": every}
    return Tiny(model, {"hidden_states": video(), **given}, 48 + PROMPT, 2)


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {
        "encoder_hidden_states": prompt(), "pooled_projections": torch.randn(2, 16), "timestep": step(),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(PROMPT, 3),
    }  # fmt: skip
    return Tiny(model, {"hidden_states": torch.randn(2, 16, 4), **given}, 16 + PROMPT, 4)


def hunyuan():
    """Its prompts have 5 tokens and 3, which it says by a mask."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    given = {
        "encoder_hidden_states": prompt(), "timestep": step(), "pooled_projections": torch.randn(2, 8),
        "encoder_attention_mask": torch.arange(PROMPT) < torch.tensor([[PROMPT], [3]]),
        "guidance": torch.tensor([1000.0, 1000.0]),
    }  # fmt: skip
    return Tiny(model, {"hidden_states": video(), **given}, 48 + PROMPT, 2)


def wan(text=7, layers=2):
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip
    given = {"encoder_hidden_states": prompt(text), "timestep": step()}
    return Tiny(model, {"hidden_states": video(), **given}, 48, layers)


MODELS = {f.__name__: f for f in (sd3, dit, pixart, cogvideox, mochi, flux, hunyuan, wan)}
