"""How patches lie in an image or a video, and the names that levels, predictions and updates go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydiffuse._core.words import plain

PATHS = ("linear", "vp", "trig")
KINDS = ("flow", "v", "eps", "x1")
METHODS = ("euler", "ddim", "ancestral", "multistep")
NOISE, CONVERT, RESIDUAL = range(len(METHODS), len(METHODS) + 3)
"""Rules of the kernels beside the methods. The codes are those of csrc/patch.h."""

OWN_KIND = {"linear": "flow", "vp": "v", "trig": "v"}
"""What a model trained on a path usually predicts."""

SAMPLES = ("uniform", "logit_normal", "mode", "ltg", "nondecreasing")
"""Draws of levels to train at."""
MOVES = ("uniform", "dual_loop", "look_ahead", "schedule")
"""Ways of patches from level to level."""

PatchSize = int | Sequence[int] | None


class Grid(NamedTuple):
    """The patches of one sample [C, *spatial], in the fewest dimensions that tell them apart."""

    sizes: tuple[int, int, int, int]
    """Channels, planes, rows, columns; a patch has all channels."""
    patch: tuple[int, int, int]
    """Planes, rows and columns of a patch."""

    @property
    def patches(self) -> int:
        _, planes, rows, columns = self.sizes
        p, r, c = self.patch
        return (planes // p) * (rows // r) * (columns // c) if p and r and c else 0

    @property
    def flat(self) -> list[int]:
        return [*self.sizes, *self.patch]


def patch_sizes(op: str, shape: Sequence[int], patch_size: PatchSize) -> tuple[int, ...]:
    """The extent of a patch in every spatial dimension of a [B, C, *spatial] tensor.

    An int p is p x p in the last two dimensions and 1 in a third before them, the frames; None is one
    patch, the whole sample.
    """
    spatial = tuple(shape[2:])
    if not 1 <= len(spatial) <= 3:
        raise ValueError(
            f"{op}: x has shape {tuple(shape)}; accepted: [B, C, L], [B, C, H, W] or [B, C, T, H, W]"
        )
    patch_size = plain(patch_size)
    if patch_size is None:
        return spatial
    if not isinstance(patch_size, Sequence):
        sizes = tuple(1 if i < len(spatial) - 2 else patch_size for i in range(len(spatial)))
    else:
        sizes = tuple(map(plain, patch_size))
    if len(sizes) != len(spatial):
        raise ValueError(
            f"{op}: patch_size {sizes} has {len(sizes)} values; x has {len(spatial)} spatial dimensions:"
            " give an int or one value for each"
        )
    for size, extent in zip(sizes, spatial, strict=True):
        whole = isinstance(size, int) or hasattr(size, "__index__")  # also a symbol of a traced size
        if isinstance(size, bool) or not whole or size < 1 or extent % size:
            raise ValueError(
                f"{op}: patch_size {sizes} does not divide {spatial}; accepted: a positive divisor of"
                " each spatial dimension"
            )
    return sizes


def count_patches(shape: Sequence[int], sizes: Sequence[int]) -> int:
    count = 1
    for extent, size in zip(shape[2:], sizes, strict=True):
        count *= extent // size if size else 0
    return count


def grid_of(shape: Sequence[int], sizes: Sequence[int]) -> Grid:
    """Inner dimensions that a patch spans, and neighbours that it does not span at all, are one: rows
    get long, which is what vectors want."""
    dims = [(shape[1], shape[1]), *zip(shape[2:], sizes, strict=True)]
    while len(dims) > 1:
        (outer, outer_patch), (extent, patch) = dims[-2:]
        if patch != extent and not (patch == outer_patch == 1 and len(dims) > 2):
            break
        dims[-2:] = [(outer * extent, outer_patch * patch)]
    if len(dims) == 1:
        dims.insert(0, (1, 1))
    channels, spatial = dims[0][0], [(1, 1)] * (4 - len(dims)) + dims[1:]
    return Grid(
        (channels, *(d[0] for d in spatial)),  # type: ignore[arg-type]
        tuple(d[1] for d in spatial),  # type: ignore[arg-type]
    )


X, PRED, UNCOND, HISTORY, NOISY = range(5)
"""Places of the terms; those of the outputs are 0, x', and 1, what history becomes."""
