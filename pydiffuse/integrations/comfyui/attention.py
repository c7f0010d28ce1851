"""Tile attention as ComfyUI's `optimized_attention_override`, and plans for latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse import attention, plans
from pydiffuse._core.checks import describe
from pydiffuse.integrations.comfyui.guidance import KEY
from pydiffuse.integrations.masks import Masks
from pydiffuse.plans import TilePlan

OP = "tile_attention"
_NO_SAY = {
    "transformer_options",
    "_inside_attn_wrapper",
    "low_precision_attention",
    "preferred_attention",
}


class _Call(NamedTuple):
    """What ComfyUI's attention functions take. q, k, v: [B, S, H D], or [B, H, S, D] with skip_reshape."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    attn_precision: torch.dtype | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False

    @property
    def lengths(self) -> tuple[int, int]:
        axis = 2 if self.skip_reshape else 1
        return self.q.shape[axis], self.k.shape[axis]

    def by_heads(self) -> list[Tensor]:
        """q, k, v: [B, H, S, D]; views."""
        given = [self.q, self.k, self.v]
        if self.skip_reshape:
            return given
        D = self.q.shape[-1] // self.heads
        return [t.unflatten(-1, (-1, D)).transpose(1, 2) for t in given]

    def mask_by_heads(self) -> Tensor | None:
        """[B or 1, H or 1, Sq or 1, Sk]: two dimensions are queries and keys, a third one is the batch."""
        mask = self.mask
        if mask is None or mask.dim() == 4:
            return mask
        return mask[None, None] if mask.dim() == 2 else mask[:, None]


def tile_attention(model: Any, plan: TilePlan) -> Any:
    """A clone of the model (a ModelPatcher) whose self-attentions compute the tiles of a plan.

    They are known by their length: attention with the plan's numbers of queries and keys. All other attention,
    cross-attention above all, goes to the override that the model had before, or to ComfyUI's function. A
    prompt that has as many tokens as the plan would be taken for self-attention.

    A mask may leave out keys of a sample. Raises ValueError for another mask and for arguments that
    tile_attention does not know; RuntimeError at the end of a sampling run in which no attention had the
    plan's length.
    """
    if not isinstance(plan, TilePlan):
        raise TypeError(f"{OP}: plan is {describe(plan)}; accepted: a TilePlan")
    wanted = (plan.q_length, plan.k_length)
    seen: set[tuple[int, int]] = set()
    masks = Masks()
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    before = options.get("optimized_attention_override")

    @torch.compiler.disable
    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(*args, **{name: kwargs[name] for name in _Call._fields if name in kwargs})
        seen.add(call.lengths)
        if call.lengths != wanted:
            return function(*args, **kwargs) if before is None else before(function, *args, **kwargs)
        return _attend(call, plan, masks, {n: v for n, v in kwargs.items() if n not in _Call._fields})

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        result = executor(*args, **kwargs)
        if wanted not in seen:
            raise RuntimeError(
                f"{OP}: no attention had the {wanted[0]} queries and {wanted[1]} keys of {plan!r}; these were"
                f" asked for: {sorted(seen)}"
            )
        return result

    options["optimized_attention_override"] = override
    patched.add_wrapper_with_key("outer_sample", KEY, run)
    return patched


def _attend(call: _Call, plan: TilePlan, masks: Masks, rest: dict[str, Any]) -> Tensor:
    scale = rest.pop("scale", None)
    rest.pop("enable_gqa", None)  # what tile_attention sees in the heads of k
    unknown = [n for n, v in rest.items() if n not in _NO_SAY and v is not None and v is not False]
    if unknown:
        raise ValueError(f"{OP}: unknown arguments {unknown}; accepted: those of ComfyUI's attention")
    q, k, v = call.by_heads()
    each = masks.plans(OP, plan, call.mask_by_heads(), q.shape[0])
    if isinstance(each, TilePlan):
        out = attention.tile_attention(q, k, v, each, scale=scale)
    else:
        samples = zip(q.split(1), k.split(1), v.split(1), each, strict=True)
        out = torch.cat([attention.tile_attention(*s, scale=scale) for s in samples])  # type: ignore[misc]
    assert isinstance(out, Tensor)
    return out if call.skip_output_reshape else out.transpose(1, 2).flatten(2)


def frames_plan(samples: Tensor, references: int, patch_size: int = 2, text_tokens: int = 0) -> TilePlan:
    """Efficient-vDiT's plan (`plans.frames`) for a video's latent [B, C, T, H, W] in patches of one frame.

    text_tokens: so many tokens stand behind the video's in the same attention (HunyuanVideo; none in Wan).
    """
    T, H, W = _grid("frames_plan", samples, patch_size, (3,))
    return plans.frames(T, H * W, references, text_tokens)


def sliding_plan(
    samples: Tensor,
    tile: Sequence[int],
    window: Sequence[int],
    patch_size: int = 2,
    text_tokens: int = 0,
) -> TilePlan:
    """Sliding Tile Attention's plan (`plans.sliding_tile`) for a latent [B, C, H, W] or [B, C, T, H, W].

    tile, window: (T, H, W) in tokens; an image has no use for T.
    """
    grid = _grid("sliding_plan", samples, patch_size, (2, 3))
    many = len(grid)
    return plans.sliding_tile(grid, tuple(tile)[-many:], tuple(window)[-many:], text=text_tokens)


def _grid(op: str, samples: Tensor, patch_size: int, axes: tuple[int, ...]) -> list[int]:
    """Tokens along each axis; ComfyUI's models fill the last patch up."""
    if samples.dim() - 2 not in axes:
        accepted = " or ".join(["[B, C, H, W]", "[B, C, T, H, W]"][n - 2] for n in axes)
        raise ValueError(f"{op}: the latent is {describe(samples)}; accepted: {accepted}")
    H, W = (-(-n // patch_size) for n in samples.shape[-2:])
    return [*samples.shape[2:-2], H, W]
