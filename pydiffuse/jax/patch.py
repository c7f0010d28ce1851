"""Patches with a noise level of their own, on JAX arrays: see pydiffuse.patch.

Images are [B, C, *spatial]; t is a number, (B,) or (B, N) over patches. Levels, masks and scales take no
gradient. `key` of jax.random draws noise that is not given.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

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
    grid_of,
    patch_sizes,
)
from pydiffuse._core.words import check_flag
from pydiffuse.jax.arrays import Scalar, describe, floats, is_array, no_gradient
from pydiffuse.jax.calls import Like, alike, call
from pydiffuse.numpy.arrays import name


class Form(NamedTuple):
    """What a call to `mix_patches` is made of, beside its arrays."""

    op: str
    grid: tuple[int, ...]
    rule: tuple[int, int, int, int]  # method, path, source, target
    outs: int  # which places of the matrix the outputs stand for, bit by bit
    terms: int
    dtypes: tuple[str, ...]  # of the outputs
    scale: float = 1.0
    eta: float = 1.0
    transposed: bool = False
    donate: bool = False  # x' takes x's memory


class Tables(NamedTuple):
    """[B, N] float32, or None; mask bool; scales [B]."""

    t: Any
    t_next: Any = None
    t_last: Any = None
    mask: Any = None
    scales: Any = None


class Patches(NamedTuple):
    op: str
    batch: int
    total: int
    grid: tuple[int, ...]


def noise_patches(
    x1: Array,
    t: Scalar,
    patch_size: PatchSize = None,
    path: str = "linear",
    noise: Array | None = None,
    key: Array | None = None,
    *,
    target: str | None = None,
) -> tuple[Array, Array]:
    """(x_t, target), each patch at its level.  See pydiffuse.noise_patches."""
    op = "noise_patches"
    route = name(op, "path", path, PATHS)
    kind = name(op, "target", target or OWN_KIND[path], KINDS)
    x1 = floats(op, "x1", x1)
    patches = _patches(op, x1, patch_size)
    noise = _noise(op, x1, noise, key)
    form = Form(
        op, patches.grid, (NOISE, route, kind, kind), 3, 1 << X | 1 << NOISY, (x1.dtype.name,) * 2
    )
    x_t, goal = _mix(form, Tables(_levels(patches, "t", t)), x1, noise)
    return x_t, goal


def convert(
    x: Array,
    pred: Array,
    t: Scalar,
    source: str,
    target: str,
    patch_size: PatchSize = None,
    *,
    path: str = "linear",
) -> Array:
    """A prediction as another kind.  See pydiffuse.convert."""
    op = "convert"
    route = name(op, "path", path, PATHS)
    kinds = [name(op, n, k, KINDS) for n, k in (("source", source), ("target", target))]
    x = floats(op, "x", x)
    pred = _image(op, "pred", pred, x)
    patches = _patches(op, x, patch_size)
    rule = (CONVERT, route, kinds[0], kinds[1])
    form = Form(op, patches.grid, rule, 1, 1 << X | 1 << PRED, (pred.dtype.name,))
    return _mix(form, Tables(_levels(patches, "t", t)), x, pred)[0]


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
    key: Array | None = None,
    history: tuple[Array, Array] | None = None,
    donate_x: bool = False,
) -> tuple[Any, ...]:
    """(x', t'), and with multistep the new history: every patch from its t to its t_next in one pass.

    See pydiffuse.patch_step. donate_x: x' is written into x's memory, as in `guide`.
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
    slopes, then = (None, None) if history is None else history
    found = {PRED: ("pred", pred), UNCOND: ("uncond", uncond), HISTORY: ("history[0]", slopes)}
    terms = {X: x} | {
        place: _image(op, argument, term, x)
        for place, (argument, term) in found.items()
        if term is not None or place == PRED
    }
    if method == "ancestral":
        terms[NOISY] = _noise(op, x, noise, key)
    number, scales = _scale(op, scale, uncond is not None, patches.batch)
    now, goal = _levels(patches, "t", t), _levels(patches, "t_next", t_next)
    last = None if then is None else _levels(patches, "history[1]", then)
    if mask is not None:
        shape = (patches.batch, patches.total)
        if not is_array(mask) or mask.dtype != bool or mask.shape != shape:
            raise ValueError(f"{op}: mask is {describe(mask)}; accepted: a bool array {shape}")
        mask = jnp.asarray(mask)
    keeps = method == "multistep"
    form = Form(
        op, patches.grid, (code, route, kind, kind), 3 if keeps else 1, sum(1 << place for place in terms),
        (x.dtype.name,) * (2 if keeps else 1), number, float(eta), donate=donate_x,
    )  # fmt: skip
    new, *kept = _mix(form, Tables(now, goal, last, mask, scales), *terms.values())
    moved = now != goal if mask is None else (now != goal) & mask
    arrived = jnp.where(moved, goal, now)
    if not keeps:
        return new, arrived
    return new, arrived, (kept[0], jnp.where(moved, now, now if last is None else last))


def select_patches(score: Array, k: int, *, as_mask: bool = False) -> Any:
    """ids (B, k) of the highest scores and of the rest, int32, ascending; or a mask (B, N).

    See pydiffuse.select_patches. k is static.
    """
    op = "select_patches"
    score = _score(op, score, k)
    B, N = score.shape
    check_flag(op, "as_mask", as_mask)
    if as_mask:
        return call("select_patches", [Like((B, N), jnp.bool_)], [score], wanted=1, k=int(k))[0]
    ids = [Like((B, n), jnp.int32) for n in (k, N - k)]
    return tuple(call("select_patches", ids, [score], wanted=0, k=int(k)))


def dual_loop_t(score: Array, k: int, t: Scalar, *, dt: Scalar, steps: int) -> Array:
    """Where all patches are after each part of a step of the dual loop, float32 (steps, B, N).

    See pydiffuse.dual_loop_t. k and steps are static.
    """
    op = "dual_loop_t"
    score = _score(op, score, k)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{op}: steps is {steps!r}; accepted: an int, 1 or more")
    patches = Patches(op, score.shape[0], score.shape[1], ())
    begin, step = _levels(patches, "t", t), _levels(patches, "dt", dt)
    if not isinstance(dt, Tracer) and not np.all((np.asarray(dt) >= 0) & np.isfinite(np.asarray(dt))):
        raise ValueError(f"{op}: dt holds a value that is negative or not finite; accepted: 0 or more")
    levels = Like((steps, *score.shape), jnp.float32)
    return call("select_patches", [levels], alike(score, begin, step), wanted=2, k=int(k))[0]


def _patches(op: str, x: Array, patch_size: PatchSize) -> Patches:
    grid = grid_of(x.shape, patch_sizes(op, x.shape, patch_size))
    return Patches(op, x.shape[0], grid.patches if x.ndim > 1 else 0, tuple(grid.flat))


def _image(op: str, argument: str, value: Any, x: Array) -> Array:
    image = floats(op, argument, value)
    if image.shape != x.shape:
        raise ValueError(f"{op}: {argument} has shape {image.shape}; accepted: {x.shape}")
    return image


def _noise(op: str, x: Array, noise: Any, key: Any) -> Array:
    if noise is not None:
        return _image(op, "noise", noise, x)
    if key is None:
        raise ValueError(
            f"{op}: neither noise nor key was given; accepted: noise, or key=jax.random.key(0)"
        )
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)


def _levels(patches: Patches, argument: str, value: Any) -> Array:
    """float32 [B, N] from a number, (B,) or (B, N)."""
    op, batch, total, _ = patches
    if not isinstance(value, int | float | np.generic) and not is_array(value):
        raise TypeError(f"{op}: {argument} is {describe(value)}; accepted: a number, (B,) or (B, N)")
    given = jnp.asarray(value, jnp.float32)
    if given.shape not in ((), (batch,), (batch, total)):
        raise ValueError(
            f"{op}: {argument} has shape {given.shape}; accepted: a number, ({batch},) or"
            f" ({batch}, {total}), a value for each of the {total} patches"
        )
    if is_array(value):
        remedy = f"{argument} takes no gradient; give jax.lax.stop_gradient({argument})"
        given = no_gradient(op, remedy, given)
    return jnp.broadcast_to(given[:, None] if given.ndim == 1 else given, (batch, total))


def _scale(op: str, scale: Any, guided: bool, batch: int) -> tuple[float, Array | None]:
    if not is_array(scale):
        if not isinstance(scale, int | float):
            raise TypeError(f"{op}: scale is {describe(scale)}; accepted: a number or ({batch},)")
        if not guided and scale != 1.0:
            raise ValueError(f"{op}: scale was given without uncond; give both, or neither")
        return float(scale), None
    if not guided:
        raise ValueError(f"{op}: scale was given without uncond; give both, or neither")
    if scale.shape not in ((), (batch,)):
        raise ValueError(f"{op}: scale has shape {scale.shape}; accepted: a number or ({batch},)")
    given = no_gradient(op, "scale takes no gradient; guide with pydiffuse.jax.cfg first", scale)
    return 1.0, jnp.broadcast_to(given.astype(jnp.float32), (batch,))


def _score(op: str, score: Any, k: Any) -> Array:
    score = floats(op, "score", score)
    if score.ndim != 2:
        raise ValueError(f"{op}: score has shape {score.shape}; accepted: (B, N)")
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 0 <= k <= score.shape[1]:
        raise ValueError(f"{op}: k is {k!r}; accepted: an int, 0 to {score.shape[1]}")
    return jax.lax.stop_gradient(score.astype(jnp.float32))


def _mix(form: Form, tables: Tables, *terms: Array) -> Any:
    arrays = alike(*tables, *terms)
    return _mix_patches(form, Tables(*arrays[:5]), *arrays[5:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix_patches(form: Form, tables: Tables, *terms: Array) -> tuple[Array, ...]:
    """out_j = sum_m c_jm term_m, c of the patch. Linear: its gradient is the same kernel with c transposed."""
    has = sum(1 << i for i, table in enumerate(tables[1:]) if table is not None)
    given = [*terms, *(table for table in tables if table is not None)]
    results = [Like(terms[0].shape, jnp.dtype(dtype)) for dtype in form.dtypes]
    found = call(
        "mix_patches", results, given, {0: 0} if form.donate else None, "broadcast_all", has=has,
        grid=form.grid, rule=(*form.rule, form.outs, form.terms), inner=terms[0].ndim - 1, scale=form.scale,
        eta=form.eta, transposed=int(form.transposed),
    )  # fmt: skip
    return tuple(found)


def _forward(form: Form, tables: Tables, *terms: Array) -> Any:
    return _mix_patches(form, tables, *terms), (tables, [Like((), t.dtype) for t in terms])


def _backward(form: Form, saved: Any, grads: tuple[Array, ...]) -> Any:
    tables, dtypes = saved
    flipped = form._replace(
        outs=form.terms, terms=form.outs, dtypes=tuple(d.dtype.name for d in dtypes),
        transposed=not form.transposed, donate=False,
    )  # fmt: skip
    return None, *_mix_patches(flipped, tables, *grads)


_mix_patches.defvjp(_forward, _backward)
