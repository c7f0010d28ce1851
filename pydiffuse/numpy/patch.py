"""Patches with a noise level of their own, on arrays: see pydiffuse.patch, whose names and arguments these are.

Images are [B, C, *spatial]; t is a number, (B,) or (B, N) over patches. `generator` is NumPy's, and draws
are its own: not those of torch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pydiffuse import _host
from pydiffuse._core.grids import (
    CONVERT,
    HISTORY,
    KINDS,
    METHODS,
    NOISE,
    NOISY,
    OWN_KIND,
    PATHS,
    PRED,
    UNCOND,
    PatchSize,
    X,
    count_patches,
    grid_of,
    patch_sizes,
)
from pydiffuse.numpy.arrays import (
    Array,
    Outputs,
    Scalar,
    array_of,
    count,
    describe,
    flag,
    floats,
    laid_out,
    name,
    per_patch,
    scalar,
)
from pydiffuse.numpy.levels import draw_like

_BOTH = 3
"""Both outputs: x' and what history becomes."""


class Patches(NamedTuple):
    batch: int
    total: int
    grid: list[int]


def noise_patches(
    x1: Array,
    t: Scalar,
    patch_size: PatchSize = None,
    path: str = "linear",
    noise: Array | None = None,
    generator: np.random.Generator | None = None,
    *,
    target: str | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """(x_t, target), each patch at its level.  See pydiffuse.noise_patches."""
    op = "noise_patches"
    route = name(op, "path", path, PATHS)
    kind = name(op, "target", target or OWN_KIND[path], KINDS)
    x1 = floats(op, "x1", x1)
    patches = _patches(op, x1, patch_size)
    noise = draw_like(op, x1, generator) if noise is None else floats(op, "noise", noise, like=x1)
    outs = Outputs(op, out, [(x1.shape, x1.dtype)] * 2, same=(x1, noise))
    rule = (NOISE, route, kind, kind, _BOTH, 1 << X | 1 << NOISY)
    _mix(op, patches, outs.arrays, (x1, noise), per_patch(op, "t", t, patches.batch, patches.total), rule)
    return outs.results()


def convert(
    x: Array,
    pred: Array,
    t: Scalar,
    source: str,
    target: str,
    patch_size: PatchSize = None,
    *,
    path: str = "linear",
    out: Array | None = None,
) -> Array:
    """A prediction as another kind.  See pydiffuse.convert."""
    op = "convert"
    route = name(op, "path", path, PATHS)
    kinds = [name(op, n, k, KINDS) for n, k in (("source", source), ("target", target))]
    x = floats(op, "x", x)
    pred = floats(op, "pred", pred, like=x)
    patches = _patches(op, x, patch_size)
    outs = Outputs(op, out, [(x.shape, pred.dtype)], same=(x, pred))
    rule = (CONVERT, route, *kinds, 1, 1 << X | 1 << PRED)
    _mix(op, patches, outs.arrays, (x, pred), per_patch(op, "t", t, patches.batch, patches.total), rule)
    return outs.results()


def patch_step(
    x: Array,
    pred: Array,
    t: Scalar,
    t_next: Scalar,
    patch_size: PatchSize = None,
    *,
    uncond: Array | None = None,
    scale: Scalar = 1.0,
    mask: Array | None = None,
    method: str = "euler",
    path: str = "linear",
    predicts: str | None = None,
    eta: float = 1.0,
    noise: Array | None = None,
    generator: np.random.Generator | None = None,
    history: tuple[Array, Array] | None = None,
    out: Array | None = None,
) -> tuple[Any, ...]:
    """(x', t'), and with multistep the new history: every patch from its t to its t_next in one pass.

    See pydiffuse.patch_step. `out` is where x' goes.
    """
    op = "patch_step"
    route = name(op, "path", path, PATHS)
    kind = name(op, "predicts", predicts or OWN_KIND[path], KINDS)
    code = name(op, "method", method, METHODS)
    if method != "ancestral" and noise is not None:
        raise ValueError(f"{op}: noise was given, but {method!r} adds none; accepted: 'ancestral'")
    if method != "multistep" and history is not None:
        raise ValueError(f"{op}: history was given, but {method!r} has none; accepted: 'multistep'")
    if method == "ancestral" and not 0 <= eta <= 1:
        raise ValueError(f"{op}: eta is {eta!r}; accepted: 0 to 1")
    if history is not None and (not isinstance(history, tuple | list) or len(history) != 2):
        raise TypeError(
            f"{op}: history is {describe(history)}; accepted: the pair that the last step returned"
        )
    x = floats(op, "x", x)
    patches = _patches(op, x, patch_size)
    B, N, _ = patches
    slopes, then = (None, None) if history is None else history
    if method == "ancestral" and noise is None:
        noise = draw_like(op, x, generator)
    found = {
        PRED: ("pred", pred),
        UNCOND: ("uncond", uncond),
        HISTORY: ("history[0]", slopes),
        NOISY: ("noise", noise),
    }
    terms = {X: x} | {
        place: floats(op, argument, term, like=x)
        for place, (argument, term) in found.items()
        if term is not None or place == PRED
    }  # fmt: skip
    weight = scalar(op, "scale", scale, B)
    if uncond is None and (isinstance(weight, np.ndarray) or weight != 1.0):
        raise ValueError(f"{op}: scale was given without uncond; give both, or neither")
    now, goal = per_patch(op, "t", t, B, N), per_patch(op, "t_next", t_next, B, N)
    last = None if then is None else per_patch(op, "history[1]", then, B, N)
    moves = _mask(op, mask, patches)
    keeps = method == "multistep"
    outs = Outputs(op, out, [(x.shape, x.dtype)], same=terms.values())
    arrays = [*outs.arrays, *([np.empty(x.shape, x.dtype)] if keeps else [])]
    arrived = np.empty((B, N), np.float32)
    rule = (code, route, kind, kind, _BOTH if keeps else 1, sum(1 << place for place in terms))
    _mix(
        op, patches, arrays, terms.values(), now, rule, goal, arrived, last, moves, weight, float(eta)
    )  # fmt: skip
    result = outs.results()
    if not keeps:
        return result, arrived
    moved = now != goal if moves is None else (now != goal) & moves
    return result, arrived, (arrays[1], np.where(moved, now, now if last is None else last))


def select_patches(score: Array, k: int, *, as_mask: bool = False, out: Any = None) -> Any:
    """ids (B, k) of the highest scores and of the rest, int64, ascending; or a mask (B, N).

    See pydiffuse.select_patches.
    """
    op = "select_patches"
    score, k = _score(op, score, k)
    B, N = score.shape
    if flag(op, "as_mask", as_mask):
        outs = Outputs(op, out, [((B, N), bool)], read=(score,))
        _host.select_patches(op, None, None, outs.arrays[0], None, score, k, None, None)
    else:
        outs = Outputs(op, out, [((B, k), np.int64), ((B, N - k), np.int64)], read=(score,))
        ids, rest = outs.arrays
        _host.select_patches(op, ids, rest, None, None, score, k, None, None)
    return outs.results()


def dual_loop_t(score: Array, k: int, t: Scalar, *, dt: Scalar, steps: int) -> Array:
    """Where all patches are after each part of a step of the dual loop, float32 (steps, B, N).

    See pydiffuse.dual_loop_t.
    """
    op = "dual_loop_t"
    score, k = _score(op, score, k)
    steps = count(op, "steps", steps, 1)
    begin, step = per_patch(op, "t", t, *score.shape), per_patch(op, "dt", dt, *score.shape)
    if not np.all((step >= 0) & np.isfinite(step)):
        raise ValueError(f"{op}: dt holds a value that is negative or not finite; accepted: 0 or more")
    levels = np.empty((steps, *score.shape), np.float32)
    _host.select_patches(op, None, None, None, levels, score, k, begin, step)
    return levels


def _score(op: str, score: Array, k: int) -> tuple[Array, int]:
    score = floats(op, "score", score)
    if score.ndim != 2:
        raise ValueError(f"{op}: score has shape {score.shape}; accepted: (B, N)")
    k = count(op, "k", k, 0, score.shape[1])
    return score.astype(np.float32, copy=False), k


@lru_cache(maxsize=256, typed=True)
def _divided(op: str, shape: tuple[int, ...], patch_size: PatchSize) -> Patches:
    sizes = patch_sizes(op, shape, patch_size)
    return Patches(shape[0], count_patches(shape, sizes), grid_of(shape, sizes).flat)


def _patches(op: str, x: Array, patch_size: PatchSize) -> Patches:
    """How the images of a call are divided."""
    if hasattr(patch_size, "__index__"):
        patch_size = operator.index(patch_size)  # type: ignore[arg-type]
    elif patch_size is not None:
        patch_size = tuple(operator.index(size) for size in patch_size)  # type: ignore[union-attr]
    return _divided(op, x.shape, patch_size)


def _mask(op: str, mask: Any, patches: Patches) -> Array | None:
    if mask is None:
        return None
    given, shape = array_of(op, "mask", mask), (patches.batch, patches.total)
    if given.dtype != bool or given.shape != shape:
        raise ValueError(f"{op}: mask is {describe(given)}; accepted: a bool array {shape}")
    return laid_out(given)


def _mix(
    op: str,
    patches: Patches,
    out: Sequence[Array],
    terms: Any,
    t: Array,
    rule: tuple[int, ...],
    t_next: Array | None = None,
    arrived: Array | None = None,
    last: Array | None = None,
    mask: Array | None = None,
    scale: float | Array = 1.0,
    eta: float = 1.0,
) -> None:
    """One call of the kernel: the rule's method, path and kinds, and the sets of outputs and terms."""
    if not out[0].size:
        if arrived is not None and t_next is not None:
            arrived[...] = t_next if mask is None else np.where(mask, t_next, t)
        return
    scales = scale.astype(np.float32) if isinstance(scale, np.ndarray) else None
    number = 1.0 if isinstance(scale, np.ndarray) else scale
    _host.mix_patches(
        op,
        list(out),
        arrived,
        list(terms),
        t,
        t_next,
        last,
        mask,
        scales,
        patches.grid,
        rule,
        number,
        eta,
    )
