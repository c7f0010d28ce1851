"""What the demo draws."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pydiffuse.paths import ScanPath
from pydiffuse.plans import TilePlan

Panel = tuple[str, str, Tensor]  # title, subtitle, images (n, 1, H, W), n / rows of each row in turn


def save(figure: Figure, path: Path, colours: int = 128) -> None:
    """With few colours: small files."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(colours).save(path, optimize=True)


def bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def grids(panels: Sequence[Panel], rows: int, columns: int, path: Path) -> None:
    """A panel of digits per way of drawing them; each row is a class."""
    across = 5
    figure = Figure(figsize=(12, 3.15 * -(-len(panels) // across)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // across), across)
    for ax in axes.flat:
        bare(ax)
    for ax, (title, subtitle, images) in zip(axes.flat, panels, strict=False):
        images = images.unflatten(0, (rows, -1))[:, :columns, 0]  # (rows, columns, H, W)
        tiles = F.pad(images, (0, 2, 0, 2), value=-1.0).transpose(1, 2).flatten(2).flatten(0, 1)
        ax.imshow(tiles.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(f"{title}\n{subtitle}", fontsize=10)
    save(figure, path, colours=24)


def levels(name: str, seen: Sequence[tuple[Tensor, Tensor]], grid: Sequence[int], path: Path) -> None:
    """One sample at every call of the model: its state above, the level of each of its patches below.

    seen: pairs of x (1, H, W) and t (N,)."""
    figure = Figure(figsize=(12, 2.75), layout="constrained")
    axes = figure.subplots(2, len(seen))
    shown = None
    for i, (x, t) in enumerate(seen):
        for ax in axes[:, i]:
            bare(ax)
        axes[0, i].imshow(x[0].numpy(), cmap="gray_r", vmin=-1.2, vmax=1.2)
        shown = axes[1, i].imshow(t.unflatten(0, tuple(grid)).numpy(), cmap="viridis", vmin=0, vmax=1)
        axes[1, i].set_xlabel(f"{t.min():.2f}-{t.max():.2f}" if t.min() < t.max() else f"{t.min():.2f}")
    figure.suptitle(f"{name}: what the model is shown at each call, and the noise level of its patches")
    figure.colorbar(shown, ax=axes[1, :].tolist(), label="t", ticks=[0, 1], pad=0.01)
    save(figure, path)


def structure(paths: Sequence[ScanPath], plan: TilePlan, path: Path) -> None:
    """The way of every Mamba layer through the patches, and what attention sees."""
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    axes = figure.subplots(1, len(paths) + 2)
    H, W = paths[0].shape
    for i, (ax, way) in enumerate(zip(axes, paths, strict=False)):
        points = np.stack(np.unravel_index(way.order.numpy(), way.shape)[::-1], axis=1).astype(float)
        colours = colormaps["plasma"](np.linspace(0, 0.88, len(points)))
        lines = LineCollection(
            list(np.stack([points[:-1], points[1:]], 1)), colors=colours, linewidths=2.2
        )
        ax.add_collection(lines)
        ax.plot(*points[0], "o", color="#1a9850", markersize=7)
        ax.plot(*points[-1], "s", color="#d73027", markersize=6)
        ax.set(xlim=(-0.7, W - 0.3), ylim=(H - 0.3, -0.7), aspect="equal", title=f"Mamba layer {i + 1}")
        bare(ax)
    seen = plan.to_dense()[0]
    query = (H // 2) * W + W // 4
    around = seen[query].float().unflatten(0, (H, W))
    around[query // W, query % W] = 2
    axes[-2].imshow(around.numpy(), cmap="Blues", vmin=0, vmax=2.4)
    axes[-2].set_title("what a patch sees")
    if plan.order is not None:  # tile by tile, as the kernels walk
        seen = seen[plan.order.long()][:, plan.order.long()]
    axes[-1].imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=2)
    bounds = plan.q_bounds[1:-1] - 0.5
    axes[-1].hlines(bounds, -0.5, len(seen) - 0.5, color="0.75", linewidth=0.5)
    axes[-1].vlines(bounds, -0.5, len(seen) - 0.5, color="0.75", linewidth=0.5)
    axes[-1].set_title(f"the plan ({plan.density:.0%})")
    for ax in axes[-2:]:
        ax.set_xticks([])
        ax.set_yticks([])
    save(figure, path)


def losses(values: Sequence[float], path: Path) -> None:
    """The loss of every step, and its mean over the last hundred."""
    smooth = np.convolve(values, np.ones(100) / 100, "valid") if len(values) >= 100 else values
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.plot(values, color="0.8", linewidth=0.5)
    ax.plot(np.arange(len(values) - len(smooth), len(values)), smooth, color="#3b4cc0", linewidth=1.6)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)
