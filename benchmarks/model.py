"""A whole model at ZigMa's width, a training step and a sampling step: the transformer of examples/digits on
pydiffuse's ops, and the same weights on the best that there is without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pydiffuse
from benchmarks.measure import Contender, race
from benchmarks.row import Bar, Row
from examples.digits.model import Layer, ZigzagTransformer
from pydiffuse.nn import TileAttention, ZigzagMamba

# A latent of 32 x 32 patches: two Mamba and two attention layers, which see 144 of the 1,024 patches.
SIDE, PATCH, CHANNELS, WIDTH = 32, 2, 4, 384
SIZE = {
    "image": (SIDE * PATCH, SIDE * PATCH), "channels": CHANNELS, "patch": PATCH, "dim": WIDTH, "depth": 2,
    "heads": 6, "classes": 10, "tile": 4, "window": 12,
}  # fmt: skip
TOKENS, LEVELS, NO_CLASS = SIDE**2, 64, 10
SCALE, NOW, DT = 2.0, 0.5, 1 / 32  # of the sampling step


class Batch(NamedTuple):
    x1: Tensor  # (B, CHANNELS, 64, 64)
    noise: Tensor  # like x1
    t: Tensor  # (B, TOKENS), multiples of 1 / LEVELS
    label: Tensor  # (B,)


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    if device == "cpu":  # mamba.py's scan is written for training on a CPU; a GPU has another best rival
        yield from step_rows(1 if quick else 3)


# The same model without pydiffuse: mamba.py between gathers, SDPA under a mask, the rest in plain PyTorch.


def plain_mamba(ours: ZigzagMamba) -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    class Gathered(MambaBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, order])[:, inverse]

        # Its in-place steps over strided views took torch.compile four times as long as they take by themselves.
        selective_scan = torch.compiler.disable(MambaBlock.selective_scan)

    assert ours.path is not None
    order, inverse = ours.path.order.long(), ours.path.inverse.long()
    return Gathered(MambaConfig(d_model=ours.d_model, n_layers=1))


class PlainAttention(nn.Module):
    def __init__(self, ours: TileAttention) -> None:
        super().__init__()
        assert ours.plan is not None
        self.qkv, self.proj = nn.Linear(ours.dim, 3 * ours.dim), nn.Linear(ours.dim, ours.dim)
        self.q_norm, self.k_norm = nn.RMSNorm(ours.head_dim, 1e-6), nn.RMSNorm(ours.head_dim, 1e-6)
        self.heads = ours.heads
        self.register_buffer("mask", ours.plan.to_dense()[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=self.mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PlainTransformer(nn.Module):
    """ZigzagTransformer's parameters and arithmetic."""

    def __init__(self, ours: ZigzagTransformer) -> None:
        super().__init__()
        self.dim, self.patch, self.classes, self.grid = ours.dim, ours.patch, ours.classes, ours.grid
        for name in ("tokens_in", "level", "label", "begin", "tokens_out"):
            setattr(self, name, getattr(ours, name))
        self.position = ours.position
        self.layers = nn.ModuleList()
        for layer in ours.layers:
            mamba = isinstance(layer.branch, ZigzagMamba)
            self.layers.append(
                Layer(self.dim, plain_mamba(layer.branch) if mamba else PlainAttention(layer.branch))
            )
        self.load_state_dict(ours.state_dict())
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, known: Tensor, rows: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """known (K,): the distinct levels, rows (B, N): which one a patch has."""
        angle = 1000.0 * known[:, None] * self.frequencies
        embedded = torch.cat([angle.cos(), angle.sin()], 1)
        cond = F.silu(self.level(embedded)[:, None] + self.label.weight).flatten(0, 1)
        rows = rows * (self.classes + 1) + label[:, None]
        h = self.tokens_in(F.pixel_unshuffle(x, self.patch).flatten(2).mT) + self.position
        y = normed(h, *self.begin.rows(cond)[:, :2][rows].unbind(-2))
        for layer in self.layers:
            shift, scale, gate = layer.rows(cond)[rows].unbind(-2)
            h = h + gate * layer.branch(y)
            y = normed(h, shift, scale)
        out = self.tokens_out(y)
        v = out[..., :-1].mT.unflatten(2, self.grid)
        return F.pixel_shuffle(v, self.patch), out[..., -1]


def spread(t: Tensor) -> Tensor:
    """(B, N) on every pixel: (B, 1, H, W)."""
    return t.unflatten(1, (SIDE, SIDE)).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]


def plain_loss(net: Callable[..., Any], b: Batch) -> Tensor:
    t = spread(b.t)
    x_t, v = t * b.x1 + (1 - t) * b.noise, b.x1 - b.noise
    known = torch.arange(LEVELS + 1) / LEVELS
    pred, logvar = net(x_t, known, (b.t * LEVELS).round().long(), b.label)
    squared, l = (pred - v).square(), spread(logvar)
    nll = 0.5 * (math.log(2 * math.pi) + l + squared.detach() / l.exp())
    return squared.mean() + 0.01 * nll.mean()


def plain_sample(net: Callable[..., Any], b: Batch) -> Tensor:
    """Both passes of cfg and an Euler step from NOW, which is the level of all patches."""
    rows, null = torch.zeros_like(b.t, dtype=torch.long), torch.full_like(b.label, NO_CLASS)
    v, _ = net(
        torch.cat([b.noise, b.noise]),
        torch.full((2,), NOW),
        torch.cat([rows, rows]),
        torch.cat([b.label, null]),
    )
    cond, uncond = v.chunk(2)
    return b.noise + DT * (uncond + SCALE * (cond - uncond))


def our_loss(net: ZigzagTransformer, b: Batch) -> Tensor:
    x_t, v = pydiffuse.noise_patches(b.x1, b.t, net.patch, noise=b.noise)
    pred, logvar = net(x_t, b.t, b.label, levels=LEVELS + 1)
    return pydiffuse.patch_loss(pred, v, logvar, patch_size=net.patch)


def our_sample(net: ZigzagTransformer, b: Batch) -> Tensor:
    t, null = torch.full_like(b.t, NOW), torch.full_like(b.label, net.classes)
    v, _ = net(torch.cat([b.noise, b.noise]), torch.cat([t, t]), torch.cat([b.label, null]), levels=2)
    cond, uncond = v.chunk(2)
    return pydiffuse.patch_step(b.noise, cond, t, t + DT, net.patch, uncond=uncond, scale=SCALE)[0]


def trainer(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    """A step of AdamW on one batch, whose learning rate is nil: every step is the first one."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)

    def step(i: int) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step


def gradients(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(net.named_parameters()) if p.grad is not None])


def step_rows(least: int) -> Iterator[Row]:
    torch.manual_seed(0)
    net = ZigzagTransformer(**SIZE)  # type: ignore[arg-type]
    for p in net.parameters():  # gates and the head begin at zero, where layers and gradients vanish
        if p.dim() == 2 and not p.any():
            nn.init.normal_(p, std=0.02)
    plain = PlainTransformer(net)
    t = (pydiffuse.sample_t(1, TOKENS, "ltg") * LEVELS).round() / LEVELS
    x1, noise = torch.randn(2, 1, CHANNELS, SIDE * PATCH, SIDE * PATCH)
    b = Batch(x1, noise, t, torch.tensor([3]))
    fast = torch.compile(plain, dynamic=False)

    expected, slopes = trainer(net, lambda: our_loss(net, b))(0).item(), gradients(net)

    def check_step(value: Tensor) -> float:
        """The loss and all gradients; of plain, whichever way it just ran."""
        found = gradients(plain)
        return max(abs(value.item() / expected - 1), ((found - slopes).norm() / slopes.norm()).item())

    ours = Contender("pydiffuse", trainer(net, lambda: our_loss(net, b)))
    ways: dict[str, Any] = {"eager": plain, "torch.compile": fast}
    theirs = [
        Contender(name, trainer(plain, lambda n=n: plain_loss(n, b)), check_step, 1e-3)
        for name, n in ways.items()
    ]
    yield raced("training step, beside mamba.py's scan and SDPA", ours, theirs, 1, least)
    with torch.no_grad():
        drawn = our_sample(net, b)

        def check_sample(x: Tensor) -> float:
            return ((x - drawn).norm() / drawn.norm()).item()

        ours = Contender("pydiffuse", lambda i: our_sample(net, b))
        theirs = [
            Contender(name, lambda i, n=n: plain_sample(n, b), check_sample, 1e-4)
            for name, n in ways.items()
        ]
        yield raced(
            "sampling step, both passes of cfg, beside mamba.py's scan and SDPA", ours, theirs, 2, least
        )


def raced(what: str, ours: Contender, theirs: list[Contender], batch: int, least: int) -> Row:
    """In turns with each rival by itself: threads of torch.compile spin after their work."""
    ratios = {}
    for rival in theirs:
        again = Contender("pydiffuse", ours.call)
        race([again, rival], 1, seconds=0, least=least)
        if rival.error is None or not rival.error <= rival.bound:
            raise AssertionError(f"{what}: {rival.name} is off by {rival.error}")
        ratios[rival.name] = rival.ms / again.ms
        ours.seconds += again.seconds
    best = min(ratios, key=lambda name: ratios[name])
    return Row(
        op="ZigzagTransformer",
        what=what,
        shape=(batch, TOKENS, WIDTH),
        dtype=torch.float32,
        ms=ours.ms,
        error=max(rival.error or 0.0 for rival in theirs),
        rivals=theirs,
        headline=True,
        bars=[Bar(f"x the better rival, {best}", ratios[best], 3)],
    )
