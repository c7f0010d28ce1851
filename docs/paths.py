"""Draws docs/paths.png: `python docs/paths.py` where pydiffuse and matplotlib are installed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from PIL import Image

from pydiffuse.paths import ScanPath, hilbert, sweep, zigzag

START, END = "#1a9850", "#d73027"


def colours(n: int) -> np.ndarray:
    """Along the path, from dark to light; the palest tenth of the map is left out."""
    return colormaps["plasma"](np.linspace(0, 0.88, n))


def draw(ax: Axes, points: np.ndarray, near: np.ndarray, title: str, far: bool = True) -> None:
    """points: [L, 2] as (right, down); near: [L - 1], whether a step leads to a neighbour. With `far`
    the other steps are drawn, too."""
    segments = np.stack([points[:-1], points[1:]], axis=1)
    colour = colours(len(points))
    for which, width, style in ((near, 2.4, "solid"), (~near & far, 0.9, "dashed")):
        lines = LineCollection(list(segments[which]), colors=colour[1:][which], linewidths=width)
        lines.set(linestyle=style, capstyle="round", zorder=2)
        ax.add_collection(lines)
    ax.scatter(*points.T, c=colour, s=14, zorder=3)
    ax.plot(*points[0], "o", color=START, markersize=9, markeredgecolor="white", zorder=4)
    ax.plot(*points[-1], "s", color=END, markersize=8, markeredgecolor="white", zorder=4)
    ax.set_title(title, fontsize=10.5, family="monospace")
    ax.set_aspect("equal")
    ax.axis("off")


def plane(ax: Axes, path: ScanPath, title: str, extent: int) -> None:
    """extent: how many tokens the panel has room for, in width and height."""
    H, W = path.shape
    places = np.stack(np.unravel_index(path.order.numpy(), path.shape), axis=1)
    near = np.abs(np.diff(places, axis=0)).sum(1) == 1
    draw(ax, places[:, ::-1].astype(float), near, title)
    ax.set_xlim((W - 1 - extent) / 2, (W - 1 + extent) / 2)
    ax.set_ylim((H - 1 + extent) / 2, (H - 1 - extent) / 2)


def frames(ax: Axes, path: ScanPath, title: str) -> None:
    """A video's frames side by side; dashed arcs: to the same place in the next frame."""
    T, H, W = path.shape
    t, h, w = np.unravel_index(path.order.numpy(), path.shape)
    points = np.stack([w + (W + 1) * t, h], axis=1).astype(float)
    within = np.diff(t) == 0
    draw(ax, points, within, title, far=False)
    for step in np.flatnonzero(~within):
        bend = 0.3 if h[step] > H / 2 else -0.3  # below the frames, or above
        ends = {"posA": points[step], "posB": points[step + 1], "shrinkA": 4, "shrinkB": 4}
        arc = FancyArrowPatch(**ends, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>")
        arc.set(color=colours(len(t))[step], linestyle="dashed", linewidth=1.2, mutation_scale=11)
        ax.add_patch(arc)
    for frame in range(T):
        ax.text((W + 1) * frame + (W - 1) / 2, H + 1.1, f"t = {frame}", ha="center", color="0.4")
    ax.set_xlim(-0.7, (W + 1) * T - 1.3)
    ax.set_ylim(H + 1.6, -2.2)


def box(ax: Axes3D, path: ScanPath, title: str) -> None:
    """A video as a box, its first frame in front."""
    T, H, W = path.shape
    t, h, w = np.unravel_index(path.order.numpy(), path.shape)
    points = np.stack([w, t, H - 1 - h], axis=1).astype(float)
    colour = colours(len(points))
    segments = np.stack([points[:-1], points[1:]], axis=1)
    ax.add_collection3d(Line3DCollection(list(segments), colors=colour[1:], linewidths=2.4))
    ax.scatter(*points.T, c=colour, s=14, depthshade=False)
    ax.plot(*points[:1].T, "o", color=START, markersize=9, markeredgecolor="white", zorder=9)
    ax.plot(*points[-1:].T, "s", color=END, markersize=8, markeredgecolor="white", zorder=9)
    around = np.array([(0, 0), (W - 1, 0), (W - 1, H - 1), (0, H - 1), (0, 0)])
    for frame in range(T):
        ax.plot(around[:, 0], np.full(5, frame), around[:, 1], color="0.85", linewidth=0.8)
        ax.text(W - 0.65, frame - 0.2, -0.15, f"t = {frame}", color="0.4", va="top")
    ax.set_box_aspect((W - 1, 1.5 * (T - 1), H - 1), zoom=1.15)
    ax.view_init(elev=20, azim=-62)
    ax.set_title(title, fontsize=10.5, family="monospace", y=1.0)
    ax.axis("off")


def main() -> None:
    figure = Figure(figsize=(10.4, 12.0), layout="constrained")
    grid = figure.add_gridspec(4, 4, height_ratios=(1, 1, 1, 1.2))
    for i in range(8):
        plane(figure.add_subplot(grid[i // 4, i % 4]), zigzag((8, 8), i), f"zigzag((8, 8), {i})", 8)
    row = (sweep((8, 8)), hilbert((8, 8)), hilbert((6, 10)), hilbert((9, 7)))
    for i, path in enumerate(row):
        plane(figure.add_subplot(grid[2, i]), path, f"{path.name}({path.shape})", 10)
    frames(figure.add_subplot(grid[3, :2]), zigzag((3, 4, 6), 0), "zigzag((3, 4, 6), 0)")
    box(figure.add_subplot(grid[3, 2:], projection="3d"), hilbert((4, 4, 4)), "hilbert((4, 4, 4))")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    few = Image.open(drawn).convert("RGB").quantize(128)
    few.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
