"""Plans in closed form: none looks at all pairs of tokens."""

from __future__ import annotations

import functools

import numpy as np

from pydiffuse.plans.plan import FULL, TilePlan, Tiles, make_plan


def frames(num_frames: int, tokens_per_frame: int, references: int, text: int = 0) -> TilePlan:
    """Efficient-vDiT's attention tile (arXiv 2502.06155): a frame sees itself and the reference frames, and
    the reference frames see and are seen by all.

    `references` of the frames, spread evenly, are R = {floor(i num_frames / references)}. `text` tokens
    after the frames see and are seen by all.
    """
    for name, value, least in (
        ("num_frames", num_frames, 1), ("tokens_per_frame", tokens_per_frame, 1),
        ("references", references, 0), ("text", text, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"frames: {name} is {value!r}; accepted: an int, {least} or more")
    if references > num_frames:
        raise ValueError(f"frames: references is {references}; accepted: 0 to {num_frames}, the frames")
    return _frames(num_frames, tokens_per_frame, references, text)


@functools.lru_cache(maxsize=256)
def _frames(num_frames: int, tokens_per_frame: int, references: int, text: int) -> TilePlan:
    tiles = num_frames + (text > 0)
    seen = np.zeros(tiles, bool)
    seen[[i * num_frames // references for i in range(references)]] = True
    seen[num_frames:] = True
    keep = seen[:, None] | seen[None] | np.eye(tiles, dtype=bool)
    lengths = [tokens_per_frame] * num_frames + [text] * (text > 0)
    parameters = [
        ("num_frames", num_frames), ("tokens_per_frame", tokens_per_frame), ("references", references),
        ("text", text),
    ]  # fmt: skip
    return make_plan("frames", parameters, lengths, lengths, full_tiles(keep[None]))


def full_tiles(keep: np.ndarray) -> Tiles:
    """keep: bool [P, query tiles, key tiles], every kept tile whole."""
    counts = keep.sum(2)
    ends = counts.ravel().cumsum().reshape(counts.shape)
    starts = np.concatenate([ends[:, :1] - counts[:, :1], ends], 1)
    tiles = np.nonzero(keep)[2].astype(np.int32)
    return Tiles(starts, tiles, np.full(len(tiles), FULL, np.int32))
