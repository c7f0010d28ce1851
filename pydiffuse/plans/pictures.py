"""A plan as text and as a picture."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from pydiffuse.plans.arguments import count
from pydiffuse.plans.rows import FULL

if TYPE_CHECKING:
    from pydiffuse.plans.plan import TilePlan

PAPER, WHOLE, KEPT, LEFT, EDGE = (
    (245, 245, 243), (38, 70, 122), (224, 122, 47), (250, 222, 197), (255, 255, 255)
)  # fmt: skip
"""Colours: no tile; a whole tile; in a partial tile what its mask keeps and leaves out; between tiles."""
ROOM = 6
"""Edges are drawn where tiles are so many pixels apart in the mean, or more."""


def summary(plan: TilePlan) -> str:
    pairs = plan.q_length * plan.k_length
    kept, computed = plan.kept / pairs, plan.computed / pairs
    q_tiles, k_tiles = (len(b) - 1 for b in (plan.q_bounds, plan.k_bounds))
    heads = f", {plan.heads} heads" if plan.heads > 1 else ""
    runs = plan.runs
    tiles = int((runs.end - runs.begin).sum(dtype=np.int64))
    whole = tiles - int((runs.masks != FULL).sum())
    lines = [
        f"{plan.name}: {plan.q_length:,} queries x {plan.k_length:,} keys{heads}",
        f"tiles     {q_tiles:,} of {_range(plan.q_bounds)} queries x {k_tiles:,} of {_range(plan.k_bounds)} keys",
        f"kept      {tiles:,} of {plan.heads * q_tiles * k_tiles:,} tiles:"
        f" {whole:,} whole, {tiles - whole:,} partial with {len(runs.bits)} masks",
        f"density   {_shares(kept)} of all pairs, {_shares(computed)} computed",
        f"speed-up  {1 / computed.mean() if computed.any() else math.inf:.2f}x over dense at best",
        f"memory    {_bytes(sum(a.nbytes for a in plan.walk if a is not None))}",
    ]
    return "\n".join(lines)


def _range(bounds: np.ndarray) -> str:
    lengths = np.diff(bounds)
    low, high = lengths.min(), lengths.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _shares(shares: np.ndarray) -> str:
    """One for each head; the mean, and the range where they differ."""
    text = f"{shares.mean():.1%}"
    return text if np.ptp(shares) == 0 else f"{text} ({shares.min():.1%} to {shares.max():.1%} by head)"


def _bytes(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.4g} GiB"


def picture(plan: TilePlan, size: int, head: int) -> np.ndarray:
    """uint8 [h, w, 3]: every pixel shows the pair of positions at its centre."""
    size = count("picture", "size", size)
    head = count("picture", "head", head, 0, plan.heads - 1)
    longer = max(plan.q_length, plan.k_length)
    h, w = (max(1, round(size * n / longer)) for n in (plan.q_length, plan.k_length))
    at_q, at_k = (
        (np.arange(n) * 2 + 1) * side // (2 * n) for n, side in ((h, plan.q_length), (w, plan.k_length))
    )
    tile_q, tile_k = (
        np.searchsorted(b, at, side="right") - 1
        for b, at in ((plan.q_bounds, at_q), (plan.k_bounds, at_k))
    )
    starts, begin, end, masks, bits = plan.runs
    image = np.empty((h, w, 3), np.uint8)
    for y in range(h):
        row = slice(starts[head, tile_q[y]], starts[head, tile_q[y] + 1])
        run = np.searchsorted(begin[row], tile_k, side="right") - 1
        within = (run >= 0) & (tile_k < np.append(end[row], 0)[run])
        mask = np.where(within, np.append(masks[row], 0)[run], FULL - 1)
        image[y] = np.where((mask == FULL)[:, None], WHOLE, PAPER)
        for x in np.flatnonzero(mask > FULL):
            bit = bits[mask[x]][at_q[y] - plan.q_bounds[tile_q[y]], at_k[x] - plan.k_bounds[tile_k[x]]]
            image[y, x] = KEPT if bit else LEFT
    if h >= ROOM * (len(plan.q_bounds) - 1):
        image[1:][np.diff(tile_q) > 0] = EDGE
    if w >= ROOM * (len(plan.k_bounds) - 1):
        image[:, 1:][:, np.diff(tile_k) > 0] = EDGE
    return image


def save_picture(plan: TilePlan, path: str | PathLike[str], size: int, head: int) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("TilePlan.save_picture needs Pillow: `pip install pillow`") from error
    Image.fromarray(picture(plan, size, head)).save(path)
