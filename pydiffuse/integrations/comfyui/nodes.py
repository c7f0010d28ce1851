"""The nodes, by ComfyUI's V3 interface; ComfyUI imports this module."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from pydiffuse.integrations.comfyui import attention, guidance
from pydiffuse.plans import TilePlan

Plan = io.Custom("PYDIFFUSE_PLAN")


def _schema(
    node: str, name: str, inputs: list[Any], output: Any, description: str, group: str = "guidance"
) -> Any:
    return io.Schema(
        node_id=f"Pydiffuse{node}",
        display_name=f"{name} (pydiffuse)",
        category=f"pydiffuse/{group}",
        inputs=inputs,
        outputs=[output],
        description=description,
    )


def _float(name: str, default: float, least: float, most: float, tip: str, step: float = 0.01) -> Any:
    return io.Float.Input(name, default=default, min=least, max=most, step=step, tooltip=tip)


def _int(name: str, default: int, least: int, most: int, tip: str) -> Any:
    return io.Int.Input(name, default=default, min=least, max=most, tooltip=tip)


_PATCH = (
    "patch_size",
    2,
    1,
    16,
    "Sides of a token in the latent: 2 in most video and image transformers.",
)
_TEXT = ("text_tokens", 0, 0, 65536, "Tokens of the prompt behind the latent's in the same attention.")


class TCFG(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        about = "Leaves the tangential part out of the negative prompt's prediction (arXiv 2503.18137)."
        return _schema("TCFG", "TCFG", [io.Model.Input("model")], io.Model.Output(), about)

    @classmethod
    def execute(cls, model: Any) -> Any:
        return io.NodeOutput(guidance.tcfg(model))


class CFGZeroStar(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        tip = "First steps with a prediction of zero, in runs that begin at full noise."
        inputs = [io.Model.Input("model"), _int("zero_init_steps", 0, 0, 100, tip)]
        about = "Scales the negative prompt's prediction to the positive one's (arXiv 2503.18886)."
        return _schema("CFGZeroStar", "CFG-Zero*", inputs, io.Model.Output(), about)

    @classmethod
    def execute(cls, model: Any, zero_init_steps: int) -> Any:
        return io.NodeOutput(guidance.cfg_zero(model, zero_init_steps=zero_init_steps))


class APG(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [
            io.Model.Input("model"),
            _float(
                "eta", 1.0, -10, 10, "Share of the part along the positive prediction; 1 is plain CFG."
            ),
            _float("norm_threshold", 5.0, 0, 1000, "Largest norm of the guidance; 0 for no limit.", 0.1),
            _float("momentum", 0.0, -5, 1, "Share of the steps before; the paper has negative values."),
        ]
        about = "Adaptive projected guidance (arXiv 2410.02416), over whole samples."
        return _schema("APG", "APG", inputs, io.Model.Output(), about)

    @classmethod
    def execute(cls, model: Any, eta: float, norm_threshold: float, momentum: float) -> Any:
        patched = guidance.apg(model, eta=eta, norm_threshold=norm_threshold, momentum=momentum)
        return io.NodeOutput(patched)


class MagnitudeAware(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [
            io.Model.Input("model"),
            _float(
                "alpha", 8.0, 0, 100, "How fast the scale shrinks where the predictions are far apart."
            ),
            _float("rescale", 0.0, 0, 1, "Share of the positive prediction's spread (arXiv 2305.08891)."),
        ]
        about = "Magnitude-aware guidance (MAMBO-G)."
        return _schema("MagnitudeAware", "Magnitude-aware guidance", inputs, io.Model.Output(), about)

    @classmethod
    def execute(cls, model: Any, alpha: float, rescale: float) -> Any:
        return io.NodeOutput(guidance.magnitude_aware(model, alpha=alpha, rescale=rescale))


class PerpNeg(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [
            io.Model.Input("model"),
            io.Conditioning.Input("empty_conditioning", tooltip="The encoding of an empty prompt."),
            _float("neg_scale", 1.0, 0, 100, "Weight of the negative prompt."),
        ]
        about = "Perp-Neg (arXiv 2304.04968), each sample of a batch by itself, with any sampler node."
        return _schema("PerpNeg", "Perp-Neg", inputs, io.Model.Output(), about)

    @classmethod
    def execute(cls, model: Any, empty_conditioning: Any, neg_scale: float) -> Any:
        from comfy.sampler_helpers import convert_cond
        from comfy.samplers import calc_cond_batch

        patched = guidance.perp_neg(model, convert_cond(empty_conditioning), calc_cond_batch, neg_scale)
        return io.NodeOutput(patched)


class TileAttention(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.Model.Input("model"), Plan.Input("plan")]
        about = "Self-attentions of the plan's length compute the tiles that it keeps, and no others."
        return _schema("TileAttention", "Tile attention", inputs, io.Model.Output(), about, "attention")

    @classmethod
    def execute(cls, model: Any, plan: TilePlan) -> Any:
        return io.NodeOutput(attention.tile_attention(model, plan))


class FramesPlan(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [
            io.Latent.Input("latent"),
            _int("references", 2, 0, 1024, "Frames that see and are seen by all."),
            _int(*_PATCH),
            _int(*_TEXT),
        ]
        about = "Frames see themselves and a few reference frames (Efficient-vDiT, arXiv 2502.06155)."
        return _schema("FramesPlan", "Plan: frames", inputs, Plan.Output(), about, "attention")

    @classmethod
    def execute(cls, latent: Any, references: int, patch_size: int, text_tokens: int) -> Any:
        plan = attention.frames_plan(latent["samples"], references, patch_size, text_tokens)
        return io.NodeOutput(plan)


class SlidingTilePlan(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        axes = {"frames": (6, 18), "height": (8, 24), "width": (8, 24)}
        tiles = [_int(f"tile_{n}", t, 1, 1024, "Tokens of a tile.") for n, (t, _) in axes.items()]
        windows = [
            _int(f"window_{n}", w, 1, 8192, "Tokens of the window, a multiple of the tile.")
            for n, (_, w) in axes.items()
        ]
        inputs = [io.Latent.Input("latent"), *tiles, *windows, _int(*_PATCH), _int(*_TEXT)]
        about = "Tiles see the tiles around them (Sliding Tile Attention, arXiv 2502.04507)."
        return _schema(
            "SlidingTilePlan", "Plan: sliding tiles", inputs, Plan.Output(), about, "attention"
        )

    @classmethod
    def execute(cls, latent: Any, patch_size: int, text_tokens: int, **sizes: int) -> Any:
        tile, window = (
            [sizes[f"{of}_{n}"] for n in ("frames", "height", "width")] for of in ("tile", "window")
        )
        plan = attention.sliding_plan(latent["samples"], tile, window, patch_size, text_tokens)
        return io.NodeOutput(plan)


class LoadPlan(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> Any:
        inputs = [io.String.Input("path", tooltip="A JSON file that TilePlan.save wrote.")]
        about = "A plan from a file."
        return _schema("LoadPlan", "Plan: from a file", inputs, Plan.Output(), about, "attention")

    @classmethod
    def execute(cls, path: str) -> Any:
        return io.NodeOutput(TilePlan.load(path))


class PydiffuseExtension(ComfyExtension):  # type: ignore[misc]
    async def get_node_list(self) -> list[Any]:
        return [
            TCFG, CFGZeroStar, APG, MagnitudeAware, PerpNeg,
            TileAttention, FramesPlan, SlidingTilePlan, LoadPlan,
        ]  # fmt: skip
