"""A diffusion transformer whose patches each have their own noise level, made of pydiffuse's ops.

Flow matching, with t = 0 noise and t = 1 data, t (B, N) over the patches in raster order:

    x_t = t x1 + (1 - t) eps        v = x1 - eps

The network predicts v and, for every patch, how far off it expects to be. Mamba layers, each along a
zigzag of its own (ZigMa, arXiv 2403.13802), carry what they know across the image; attention layers
between them look at the patches around. What a layer does with a patch is set by the patch's noise
level and by the class, through the rows of a small table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiffuse import embed_t, gate_residual_modulate, gather_tokens, modulate, scatter_tokens
from pydiffuse.nn import TileAttention, ZigzagMamba
from pydiffuse.paths import ScanPath, from_order, zigzag_layers
from pydiffuse.plans import TilePlan, from_mask, sliding_tile

CHECKPOINT = Path(__file__).with_name("checkpoint.pt")


class Layer(nn.Module):
    """A branch, Mamba or attention, and the table of what follows it: the branch's gate, and the shift and
    scale with which the next branch sees the tokens. Gates start at zero (adaLN-zero)."""

    def __init__(self, dim: int, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.table = nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.table.weight)
        nn.init.zeros_(self.table.bias)

    def rows(self, cond: Tensor) -> Tensor:
        """cond (K, dim) -> shift, scale and gate (K, 3, dim)."""
        return self.table(cond).unflatten(-1, (3, -1))

    def forward(
        self, x: Tensor, y: Tensor, cond: Tensor, rows: Tensor, where: ScanPath | TilePlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens x and their modulation y, both (B, N, dim), after the branch; rows (B, N) of cond."""
        return gate_residual_modulate(x, self.branch(y, where), self.rows(cond), rows)


class ZigzagTransformer(nn.Module):
    """v and log-variance of a batch of images in which every patch has its own noise level.

    image: height and width. patch: pixels along a patch's side. depth: pairs of a Mamba and an attention
    layer. tile, window: attention is of tiles of tile x tile patches, each of which sees a window of window x
    window around it (STA, arXiv 2502.04507). Class `classes` is the dropped label: asking for it gives the
    unconditional prediction that guidance needs.
    """

    def __init__(
        self,
        image: Sequence[int] = (16, 16),
        channels: int = 1,
        patch: int = 2,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
        tile: int = 2,
        window: int = 6,
    ) -> None:
        super().__init__()
        self.dim, self.patch, self.classes = dim, patch, classes
        self.grid = image[0] // patch, image[1] // patch
        self.plan = sliding_tile(self.grid, (tile, tile), (window, window))
        self.tokens_in = nn.Linear(channels * patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], dim))
        self.level = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)
        self.begin = Layer(dim, nn.Identity())  # its table: how the first branch sees the tokens
        self.layers = nn.ModuleList()
        for path in zigzag_layers(self.grid, depth):
            self.layers.append(Layer(dim, ZigzagMamba(dim, path=path)))
            self.layers.append(Layer(dim, TileAttention(dim, heads, self.plan, qk_norm=True)))
        self.tokens_out = nn.Linear(dim, channels * patch**2 + 1)  # v of the pixels, and a log-variance
        nn.init.zeros_(self.tokens_out.weight)
        nn.init.zeros_(self.tokens_out.bias)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, levels: int | None = None, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), t (B, N), label (B,) -> v like x and the log-variance of each patch (B, N).

        levels: how many distinct values t has at most, for a smaller table. ids: (kept,), ascending: the
        tokens that go through the middle layers, for all images of the batch (TREAD, arXiv 2501.04765).
        """
        known, rows = embed_t(t, self.dim, scale=1000.0, max_distinct=levels)
        # A row for every pair of a level and a class.
        cond = F.silu(self.level(known)[:, None] + self.label.weight).flatten(0, 1)
        rows = rows * (self.classes + 1) + label[:, None]
        h = self.tokens_in(F.pixel_unshuffle(x, self.patch).flatten(2).mT) + self.position
        y = modulate(h, self.begin.rows(cond)[:, :2], rows)
        if ids is None:
            h, y = self.run(h, y, cond, rows, range(len(self.layers)))
        else:
            h, y = self.routed(h, y, cond, rows, ids)
        out = self.tokens_out(y)  # the last table modulated for it
        v = out[..., :-1].mT.unflatten(2, self.grid)
        return F.pixel_shuffle(v, self.patch), out[..., -1]

    def run(
        self, h: Tensor, y: Tensor, cond: Tensor, rows: Tensor, which: range, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some of the layers, on all tokens or on those of ids."""
        plan = None if ids is None else among(self.plan, ids)
        for layer in self.layers[which.start : which.stop]:
            mamba = isinstance(layer.branch, ZigzagMamba)
            where = plan if ids is None or not mamba else along(layer.branch.path, ids)
            h, y = layer(h, y, cond, rows, where)
        return h, y

    def routed(
        self, h: Tensor, y: Tensor, cond: Tensor, rows: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All tokens through the first and the last pair of layers, those of ids through all."""
        first, last = 2, len(self.layers) - 2
        h, y = self.run(h, y, cond, rows, range(first))
        each = ids.expand(len(h), -1)
        few = gather_tokens(h, each), gather_tokens(y, each)
        few = self.run(*few, cond, rows[:, ids], range(first, last), ids)
        h = scatter_tokens(h, few[0], each)
        y = modulate(h, self.layers[last - 1].rows(cond)[:, :2], rows)
        return self.run(h, y, cond, rows, range(last, len(self.layers)))


def along(path: ScanPath, ids: Tensor) -> ScanPath:
    """A path over all tokens as one over those of ids: the same order, the others left out."""
    place = torch.full((len(path),), -1).index_copy_(0, ids, torch.arange(len(ids)))[path.order.long()]
    return from_order(place[place >= 0])


def among(plan: TilePlan, ids: Tensor) -> TilePlan:
    """What tokens of ids see of each other."""
    return from_mask(plan.to_dense()[0][ids][:, ids], q_tiles=8)


def load_model(path: Path = CHECKPOINT) -> ZigzagTransformer:
    """The trained network in float32, ready for sampling."""
    model = ZigzagTransformer()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name: w.float() for name, w in state.items()})
    return model.eval().requires_grad_(False)
