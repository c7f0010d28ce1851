"""Multi-head attention over the tiles of a plan, as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pydiffuse._core.checks import check_flag, describe, plain
from pydiffuse._core.structs import MAX_HEAD_DIM
from pydiffuse.attention import tile_attention
from pydiffuse.plans import TilePlan

Rotary = tuple[Tensor, Tensor]


class TileAttention(nn.Module):
    """Self-attention that computes the tiles of a plan: qkv, QK norm, rotary positions, attention, output.

    x [B, S, dim] -> [B, S, dim]. Parameters go by timm's names: `qkv` (queries of all heads, then keys, then
    values), `q_norm`, `k_norm`, `proj`; state dicts of timm's Attention fit where head counts are equal, biases
    are alike (timm's qkv has none by default) and norms are RMS norms.

    dim: features of x. heads: query heads. plan: this layer's TilePlan; `forward` takes another one for a
    call, for another length, say. kv_heads: key and value heads, a divisor of heads (grouped queries); heads
    by default. head_dim: dim / heads by default; a multiple of 8 up to 256. bias, out_bias: of qkv, of proj.
    qk_norm: RMS norms over head_dim with a weight, with `eps`, before the rotation. scale: of the scores,
    1/sqrt(head_dim) by default; `pydiffuse.entropy_scale` has the one for lengths other than the trained one.
    rotary_interleaved: which features a rotation turns together: neighbours 2i and 2i + 1 (diffusers, timm,
    Flux, Wan), or with False i and i + head_dim / 2 (Llama).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        plan: TilePlan | None = None,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        scale: float | None = None,
        rotary_interleaved: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, heads, kv_heads, head_dim = map(plain, (dim, heads, kv_heads, head_dim))
        kv_heads = heads if kv_heads is None else kv_heads
        for name, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TileAttention: {name} is {value!r}; accepted: 1, 2, ...")
        if heads % kv_heads:
            raise ValueError(
                f"TileAttention: kv_heads is {kv_heads}; accepted: a divisor of heads, which is {heads}"
            )
        if head_dim is None and dim % heads:
            raise ValueError(
                f"TileAttention: heads is {heads}; accepted: a divisor of dim, which is {dim}, or give"
                " head_dim"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        if not isinstance(head_dim, int) or head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"TileAttention: head_dim is {head_dim!r}; accepted: a multiple of 8 from 8 to"
                f" {MAX_HEAD_DIM}"
            )
        for name, flag in (
            ("bias", bias), ("out_bias", out_bias), ("qk_norm", qk_norm),
            ("rotary_interleaved", rotary_interleaved),
        ):  # fmt: skip
            check_flag("TileAttention", name, flag)
        real = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if scale is not None and not real:
            raise ValueError(f"TileAttention: scale is {scale!r}; accepted: a finite number or None")
        if plan is not None:
            _check_plan(plan)
        factory = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.plan, self.scale, self.rotary_interleaved = plan, scale, rotary_interleaved
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=bias, **factory)
        self.q_norm = nn.RMSNorm(head_dim, eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps, **factory) if qk_norm else nn.Identity()
        self.proj = nn.Linear(heads * head_dim, dim, bias=out_bias, **factory)
        self.reset_parameters()

    attend = staticmethod(tile_attention)
    """What runs the attention; `pydiffuse.distributed.split_tokens` puts another function in its place."""

    def reset_parameters(self) -> None:
        """Xavier-uniform weights of q, k, v (each by itself) and proj, zero biases, norms of ones."""
        with torch.no_grad():
            widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
            for weight in (*self.qkv.weight.split(widths), self.proj.weight):
                nn.init.xavier_uniform_(weight)
            for linear in (self.qkv, self.proj):
                if linear.bias is not None:
                    linear.bias.zero_()
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def forward(self, x: Tensor, plan: TilePlan | None = None, rotary: Rotary | None = None) -> Tensor:
        """x: [B, S, dim]. plan: instead of the layer's own. rotary: (cos, sin) of the angles of tokens, each
        [S, head_dim] or [B, S, head_dim] ([B, S, 1, head_dim] as Wan has them), or half as wide, one for each pair
        of features that turn together.

        Tokens and positions stand in x's order, also where the plan has an order of its own.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"TileAttention: x is {describe(x)}; accepted: (B, S, {self.dim})")
        plan = self.plan if plan is None else plan
        if plan is None:
            raise ValueError(
                "TileAttention: plan is None; accepted: a TilePlan, of the layer or of the call"
            )
        _check_plan(plan)
        B, S = x.shape[:2]
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin = self._angles(rotary, B, S)
            q, k = (rotate(t, cos, sin, self.rotary_interleaved) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = self.attend(q, k, v, plan, scale=self.scale)
        assert isinstance(out, Tensor)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _angles(self, rotary: Rotary, B: int, S: int) -> Rotary:
        """(cos, sin), each [1 or B, S, 1, head_dim]."""
        if not isinstance(rotary, tuple | list) or len(rotary) != 2:
            raise TypeError(f"TileAttention: rotary is {describe(rotary)}; accepted: a pair (cos, sin)")
        D = self.head_dim
        wide = []
        for name, t in zip(("cos", "sin"), rotary, strict=True):
            if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == 1:
                t = t[:, :, 0]
            fits = isinstance(t, Tensor) and t.is_floating_point() and t.dim() in (2, 3)
            if not fits or t.shape[-1] not in (D, D // 2) or t.shape[:-1] not in ((S,), (1, S), (B, S)):
                raise ValueError(
                    f"TileAttention: rotary's {name} is {describe(t)}; accepted: ({S}, {D}) or"
                    f" ({B}, {S}, {D}), or {D // 2} wide"
                )
            if t.shape[-1] != D:
                t = t.repeat_interleave(2, -1) if self.rotary_interleaved else torch.cat([t, t], -1)
            wide.append(t.unsqueeze(-2))
        return wide[0], wide[1]

    def extra_repr(self) -> str:
        grouped = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"{self.dim}, heads={self.heads}{grouped}, head_dim={self.head_dim}{scale}, plan={self.plan!r}"


def rotate(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """t [B, S, H, D] with its pairs of features turned, computed in float32 or wider, rounded once."""
    if interleaved:
        first, second = t.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], -1).flatten(-2)
    else:
        first, second = t.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    wide = t.dtype if t.dtype is torch.float64 else torch.float32
    return (t.to(wide) * cos + turned.to(wide) * sin).to(t.dtype)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, TilePlan):
        raise TypeError(
            f"TileAttention: plan is {describe(plan)}; accepted: a TilePlan of pydiffuse.plans"
        )
