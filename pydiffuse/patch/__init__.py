"""Patches with a noise level of their own: training and sampling where some of an image knows more.

Images are [B, C, H, W], videos [B, C, T, H, W], signals [B, C, L], of float32, bfloat16 or float16.
t = 0 is noise, t = 1 data; t is a number, (B,) for one level per sample, or (B, N) over patches in
raster order. patch_size is an int p (p x p, and one frame of a video), a tuple with a value for each
spatial dimension, or None, one patch that is all of the sample. The same thing under other names: a
level per frame is patch_size=(1, H, W); a level per token of [B, L, D] is x[:, None] with patch_size
(1, D), and a level per modality repeats it over that modality's tokens.

Levels outside [0, 1] are an error on the CPU; on a GPU, where looking would be a sync, they make their
patch NaN. Levels, masks and the guidance scale take no gradient. Noise is drawn where the generator
is: a CPU generator gives one draw for every backend and device; without a generator, or with one on a
GPU, the draw is that device's own. Paths, predictions and formulas stand in pydiffuse.reference.patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_flag, check_no_grad, check_outs, describe, is_integer, plain
from pydiffuse._core.functions import differentiable
from pydiffuse._core.grids import (
    CONVERT,
    HISTORY,
    KINDS,
    METHODS,
    MOVES,
    NOISE,
    NOISY,
    OWN_KIND,
    PATHS,
    PRED,
    SAMPLES,
    UNCOND,
    PatchSize,
    X,
)  # fmt: skip
from pydiffuse.patch import reference
from pydiffuse.patch.apply import directly, mixed, select
from pydiffuse.patch.arguments import (
    Patches,
    Scalar,
    check_dt,
    check_level,
    check_mask,
    check_name,
    check_scales,
    check_score,
    check_table,
    check_within,
    patches_of,
)
from pydiffuse.patch.autograd import Call, LossCall, Tables


def sample_t(
    batch: int,
    patches: int,
    kind: str = "uniform",
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    std: float = 0.25,
    mode_scale: float = 1.29,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Levels to train at, float32 (batch, patches) in [0, 1].

    uniform        each patch by itself, uniform
    logit_normal   each patch by itself, sigmoid(loc + scale n)
    mode           each patch by itself, SD3's mode sampling with heavy tails `mode_scale`
    ltg            a bound per sample, b = sigmoid(loc + scale n), and patches b - min(b/2, std) |n|: none
                   knows more than b. What falls below 0 is drawn uniformly from [0, b). Patch Forcing
    nondecreasing  frames whose noise does not decrease, t_0 >= t_1 >= ...: a random frame at a uniform
                   level, cleaner ones before it, noisier ones after. Diffusion forcing, SkyReels-V2

    `shift` s > 0 takes t to s t / (1 + (s - 1) t), last: s < 1 is noisier, as larger images want it
    (SD3 states it for 1 - t, so that its shift is 1/s). The draw is made where the generator is.
    """
    check_name("sample_t", "kind", kind, SAMPLES)
    batch, patches = plain(batch), plain(patches)
    loc, scale, std, mode_scale, shift = map(plain, (loc, scale, std, mode_scale, shift))
    for name, value in (("batch", batch), ("patches", patches)):
        if not is_integer(value) or value < 0:
            raise ValueError(f"sample_t: {name} is {value!r}; accepted: an int, 0 or more")
    for name, number in (("loc", loc), ("scale", scale), ("std", std), ("shift", shift)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < math.inf:
            raise ValueError(f"sample_t: {name} is {number!r}; accepted: a finite number")
    if not shift > 0 or not std >= 0:
        raise ValueError(f"sample_t: shift is {shift}, std {std}; accepted: shift > 0, std >= 0")
    if not -1 <= mode_scale <= 1.75:
        raise ValueError(
            f"sample_t: mode_scale is {mode_scale}; accepted: -1 to 1.75, where the density is positive"
        )
    return reference.sample_t(
        batch, patches, kind, loc=loc, scale=scale, std=std, mode_scale=mode_scale, shift=shift,
        generator=generator, device=device,
    )  # fmt: skip


def noise_patches(
    x1: Tensor,
    t: Scalar,
    patch_size: PatchSize = None,
    path: str = "linear",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    target: str | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise data to a level per patch, and what a model should predict there, in one pass.

    x1: data [B, C, *spatial]. t: a number, (B,) or (B, N). path: "linear", "vp" or "trig". noise: like
    x1, or drawn. target: "flow" (x1 - eps), "v" (alpha eps - sigma x1), "eps" or "x1"; by default
    "flow" on the linear path and "v" on the others. out: where x_t and the target go, for callers that
    use the same memory again; either may be x1 or noise, and no gradient passes. Returns (x_t, target),
    each like x1; gradients for x1 and noise, to any order.
    """
    op = "noise_patches"
    route = check_name(op, "path", path, PATHS)
    kind = check_name(op, "target", target or OWN_KIND[path], KINDS)
    given = (x1,) if noise is None else (x1, noise)
    if out is None and noise is not None:
        made = directly(op, (NOISE, route, kind, kind), x1, None, None, noise, t, None, patch_size)
        if made is not None:
            return made
    patches = patches_of(op, "x1, noise", given, patch_size)
    table = check_level(op, "t", t, patches, x1)
    if out is not None and (not isinstance(out, tuple | list) or len(out) != 2):
        raise TypeError(f"{op}: out is {describe(out)}; accepted: the pair (x_t, target)")
    if dispatch.forced_reference():
        if out is not None:
            check_outs(op, out, (x1, x1), given)
            check_no_grad(op, given, out)
        return reference.noise_patches(x1, t, patch_size, path, noise, generator, target=target, out=out)
    if noise is None:
        noise = reference.draw_like(x1, generator)
    rule = (NOISE, route, kind, kind)
    call = Call(op, patches.grid, rule, 3, 1 << X | 1 << NOISY, (x1.dtype, x1.dtype))
    (x_t, goal), _ = mixed(call, Tables(table), (x1, noise), () if out is None else tuple(out))
    return x_t, goal


def convert(
    x: Tensor,
    pred: Tensor,
    t: Scalar,
    source: str,
    target: str,
    patch_size: PatchSize = None,
    *,
    path: str = "linear",
) -> Tensor:
    """A prediction as another kind: Diff2Flow (arXiv 2506.02221) and the way back.

    x: the state on `path` [B, C, *spatial]; pred: what a model predicts there. source, target: "flow"
    (x1 - eps), "v" (alpha eps - sigma x1 at unit variance), "eps", "x1". t: a number, (B,) or (B, N).

    To sample with a diffusion model as a flow, give it x / sqrt(t^2 + (1 - t)^2), the state on the
    variance-preserving path with the same signal to noise, at the step that has this ratio t / (1 - t) of
    signal to noise, and convert its "v" or "eps" to "flow" at x. Where a kind says nothing ("eps" at
    t = 0, "x1" at t = 1) what is derived from it is not finite. Returns [B, C, *spatial] in pred's dtype;
    gradients for x and pred, to any order.
    """
    op = "convert"
    route = check_name(op, "path", path, PATHS)
    kinds = [check_name(op, n, k, KINDS) for n, k in (("source", source), ("target", target))]
    made = directly(op, (CONVERT, route, *kinds), x, pred, None, None, t, None, patch_size)
    if made is not None:
        return made
    patches = patches_of(op, "x, pred", (x, pred), patch_size)
    table = check_level(op, "t", t, patches, x)
    if dispatch.forced_reference():
        return reference.convert(x, pred, t, source, target, patch_size, path=path)
    rule = (CONVERT, route, kinds[0], kinds[1])
    call = Call(op, patches.grid, rule, 1, 1 << X | 1 << PRED, (pred.dtype,))
    return mixed(call, Tables(table), (x, pred))[0][0]


@overload
def patch_step(
    x: Tensor, pred: Tensor, t: Scalar, t_next: Scalar, patch_size: PatchSize = ..., *,
    uncond: Tensor | None = ..., scale: Scalar = ..., mask: Tensor | None = ...,
    method: Literal["multistep"], path: str = ..., predicts: str | None = ..., eta: float = ...,
    noise: Tensor | None = ..., generator: torch.Generator | None = ...,
    history: tuple[Tensor, Tensor] | None = ..., out: Tensor | None = ...,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def patch_step(
    x: Tensor, pred: Tensor, t: Scalar, t_next: Scalar, patch_size: PatchSize = ..., *,
    uncond: Tensor | None = ..., scale: Scalar = ..., mask: Tensor | None = ...,
    method: Literal["euler", "ddim", "ancestral"] = ..., path: str = ..., predicts: str | None = ...,
    eta: float = ..., noise: Tensor | None = ..., generator: torch.Generator | None = ...,
    history: tuple[Tensor, Tensor] | None = ..., out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def patch_step(
    x: Tensor, pred: Tensor, t: Scalar, t_next: Scalar, patch_size: PatchSize = ..., *,
    uncond: Tensor | None = ..., scale: Scalar = ..., mask: Tensor | None = ..., method: str, path: str = ...,
    predicts: str | None = ..., eta: float = ..., noise: Tensor | None = ...,
    generator: torch.Generator | None = ..., history: tuple[Tensor, Tensor] | None = ..., out: Tensor | None = ...,
) -> tuple[Any, ...]: ...  # fmt: skip


def patch_step(
    x: Tensor,
    pred: Tensor,
    t: Scalar,
    t_next: Scalar,
    patch_size: PatchSize = None,
    *,
    uncond: Tensor | None = None,
    scale: Scalar = 1.0,
    mask: Tensor | None = None,
    method: str = "euler",
    path: str = "linear",
    predicts: str | None = None,
    eta: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    history: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> tuple[Any, ...]:
    """One step of every patch from its own t to its own t_next, guidance fused, in one pass.

    euler      along the slope dx/dt
    ddim       exact where x1 and eps stay; what the path's data and noise are at t_next
    ancestral  ddim with eta of the noise drawn anew; a step backwards is ddim's
    multistep  Adams-Bashforth over steps of any length; the slopes of the last step come in `history`,
               (slopes [B, C, *spatial], the t of each patch then (B, N)), and go out as the third result

    A patch outside `mask`, or with t_next = t, keeps x bit for bit, its t and its history, whatever is
    predicted for it (NaN, too).

    x: [B, C, *spatial]. pred: like x, of any accepted dtype; with `uncond`, the prediction is
    uncond + scale (pred - uncond). scale: a number or (B,). t, t_next: a number, (B,) or (B, N).
    mask: bool (B, N), True steps. path: "linear", "vp" or "trig"; predicts: "flow", "v", "eps" or "x1", by
    default "flow" on the linear path and "v" on the others. noise: like x, for ancestral, or drawn.
    out: where x' goes; it may be x.

    Returns (x', t'), t' float32 (B, N), and the new history with multistep. Gradients for x, pred,
    uncond, noise and history, to any order.
    """
    op = "patch_step"
    if predicts is None and path in OWN_KIND:
        predicts = OWN_KIND[path]
    route = check_name(op, "path", path, PATHS)
    kind = check_name(op, "predicts", predicts or "flow", KINDS)
    code = check_name(op, "method", method, METHODS)
    if method != "ancestral" and noise is not None:
        raise ValueError(f"patch_step: noise was given, but {method!r} adds none; accepted: 'ancestral'")
    if method != "multistep" and history is not None:
        raise ValueError(f"patch_step: history was given, but {method!r} has none; accepted: 'multistep'")
    if method == "ancestral" and not 0 <= eta <= 1:
        raise ValueError(f"patch_step: eta is {eta}; accepted: 0 to 1")
    guides = isinstance(scale, float | int) and (uncond is not None or scale == 1.0)
    if guides and out is None and method in ("euler", "ddim"):
        rule = (code, route, kind, kind)
        made = directly(op, rule, x, pred, uncond, None, t, t_next, patch_size, mask, scale)  # type: ignore[arg-type]
        if made is not None:
            return made
    slopes, then = _history(history)
    found = {X: x, PRED: pred, UNCOND: uncond, HISTORY: slopes, NOISY: noise}
    terms = {place: term for place, term in found.items() if term is not None}
    patches = patches_of(op, "x, pred, uncond, history, noise", tuple(terms.values()), patch_size)
    number, scales = check_scales(op, scale, x)
    if uncond is None and (scales is not None or number != 1.0):
        raise ValueError("patch_step: scale was given without uncond; give both, or neither")
    now = check_level(op, "t", t, patches, x)
    goal = check_level(op, "t_next", t_next, patches, x)
    last = None if then is None else check_level(op, "history[1]", then, patches, x)
    if last is not None:
        check_within(op, "history[1]", last)
    moves = check_mask(op, mask, patches, x)
    if dispatch.forced_reference():
        if out is not None:
            check_outs(op, [out], [x], tuple(terms.values()))
            check_no_grad(op, tuple(terms.values()), [out])
        return reference.patch_step(
            x, pred, t, t_next, patch_size, uncond=uncond, scale=scale, mask=mask, method=method,
            path=path, predicts=predicts, eta=eta, noise=noise, generator=generator, history=history,
            out=out,
        )  # fmt: skip
    if method == "ancestral" and noise is None:
        terms[NOISY] = reference.draw_like(x, generator)
    tables = Tables(now, goal, last, moves, scales)
    keeps = method == "multistep"
    call = Call(
        op,
        patches.grid,
        (code, route, kind, kind),
        3 if keeps else 1,
        sum(1 << place for place in terms),
        (x.dtype,) * (1 + keeps),
        number,
        float(eta),
    )
    results, arrived = mixed(call, tables, tuple(terms.values()), () if out is None else (out,))
    assert arrived is not None
    if not keeps:
        return results[0], arrived
    moved = now != goal if moves is None else (now != goal) & moves
    return results[0], arrived, (results[1], torch.where(moved, now, now if last is None else last))


def _history(history: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if history is None:
        return None, None
    if not isinstance(history, tuple | list) or len(history) != 2:
        raise TypeError(
            f"patch_step: history is {describe(history)}; accepted: the pair that the last step returned"
        )
    return history[0], history[1]


def patch_loss(
    pred: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    weight: Tensor | None = None,
    patch_size: PatchSize = None,
    *,
    nll: float = 0.01,
) -> Tensor:
    """The mean squared error, and what teaches a model how sure to be of each patch.

    mean w (p - u)^2 + nll mean w 1/2 (log 2 pi + l + (u - p)^2 / e^l), means over elements; the second part
    comes with `logvar` and its gradient does not reach pred (Patch Forcing, arXiv 2604.19141).

    pred, target: p, u, [B, C, *spatial]. logvar, weight: l, w, (B, N). Returns a scalar float32; gradients
    for all four, once.
    """
    op = "patch_loss"
    patches = patches_of(op, "pred, target", (pred, target), patch_size)
    check_table(op, "logvar", logvar, patches, pred)
    check_table(op, "weight", weight, patches, pred)
    if dispatch.forced_reference():
        return reference.patch_loss(pred, target, logvar, weight, patch_size, nll=nll)
    call = LossCall(patches.grid, float(nll))
    sums, _ = differentiable("patch.PatchLoss", call, logvar, weight, pred, target)
    return (sums.sum() / pred.numel()).float() if pred.numel() else (sums.sum() * float("nan")).float()


@overload
def select_patches(score: Tensor, k: int) -> tuple[Tensor, Tensor]: ...
@overload
def select_patches(score: Tensor, k: int, *, as_mask: Literal[False]) -> tuple[Tensor, Tensor]: ...
@overload
def select_patches(score: Tensor, k: int, *, as_mask: Literal[True]) -> Tensor: ...


def select_patches(score: Tensor, k: int, *, as_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Which patches advance: the k highest scores, exact and in a shape that does not depend on them.

    Of equal scores the first counts as the highest, -0 equals 0, and NaN is below every number: a patch
    whose score is unknown is not certain.

    score: (B, N) float32, bfloat16 or float16; k: 0 to N. Returns ids (B, k) and the rest (B, N - k), int64,
    ascending; with `as_mask` a bool (B, N), True for the k. No gradient.
    """
    op = "select_patches"
    ops = dispatch.direct(op, score)
    if ops and k.__class__ is int and as_mask.__class__ is bool:
        first, rest = ops.select_patches.new(score.detach(), k, as_mask)
        if first is not None:
            return first if as_mask else (first, rest)
    k = plain(k)
    check_score(op, score, k)
    check_flag(op, "as_mask", as_mask)
    if dispatch.forced_reference():
        found: Tensor | tuple[Tensor, Tensor] = reference.select_patches(score, k, as_mask=as_mask)
        return found
    if as_mask:
        return select(op, "mask", score, k)[0]
    ids, rest = select(op, "ids", score, k)
    return ids, rest


def dual_loop_t(score: Tensor, k: int, t: Scalar, *, dt: Scalar, steps: int) -> Tensor:
    """Where all patches are after each part of a step of the dual loop, by their scores, in one pass.

    The k patches of the highest score (as select_patches has it) are at min(t + dt, 1) after the first
    part, the others go there in `steps` equal parts: after the last all are there, to the bit. But for
    roundings on the way, part j is what next_t(t, "dual_loop", index=j, ...) says of that mask.

    score: (B, N) float32, bfloat16 or float16; k: 0 to N. t, at the beginning of the step, and dt >= 0: a
    number, (B,) or (B, N). Returns float32 (steps, B, N), the t_next of patch_step for every part. No
    gradient.
    """
    op = "dual_loop_t"
    k, steps = plain(k), plain(steps)
    patches = check_score(op, score, k)
    begin = check_level(op, "t", t, patches, score)
    dt = check_dt(op, dt, patches)
    if not is_integer(steps) or steps < 1:
        raise ValueError(f"{op}: steps is {steps!r}; accepted: an int, 1 or more")
    if dispatch.forced_reference():
        return reference.dual_loop_t(score, k, t, dt=dt, steps=steps)
    return select(op, "levels", score, k, begin, dt, steps)[0]


def next_t(
    t: Tensor,
    kind: str = "uniform",
    *,
    dt: Scalar | None = None,
    mask: Tensor | None = None,
    index: int = 0,
    steps: int = 1,
    factor: float = 1.4,
    schedule: Tensor | Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """Where every patch goes next: the t_next of patch_step, (B, N) in [0, 1].

    uniform     min(t + dt, 1)
    dual_loop   patches in `mask`, the certain ones, step dt at once; the others take dt in `steps` parts.
                t is the level at which the outer step began, `index` the part: after the last all
                patches are at min(t + dt, 1), to the bit
    look_ahead  patches in `mask` jump to min(factor t, 1), for the others to look at; the others stay
    schedule    row index + 1 of a schedule, (K, N) or (K, B, N), whose row 0 is the start

    t: (B, N). dt: a number >= 0, (B,) or (B, N). mask: bool (B, N); None is all patches (in dual_loop: none
    is certain). dual_loop_t has all parts of a dual loop's step at once.
    """
    op = "next_t"
    check_name(op, "kind", kind, MOVES)
    if not isinstance(t, Tensor) or t.dim() != 2 or not t.is_floating_point():
        raise TypeError(f"next_t: t is {describe(t)}; accepted: a float tensor (B, N)")
    patches = Patches(t.shape[0], t.shape[1], ())
    check_mask(op, mask, patches, t)
    if not 0 <= index < max(steps, 1) and kind == "dual_loop":
        raise ValueError(f"next_t: index is {index}; accepted: 0 to {steps - 1}, the parts of the step")
    if kind in ("uniform", "dual_loop"):
        check_dt(op, dt, patches)
    if kind == "look_ahead" and not 1 <= factor < math.inf:
        raise ValueError(f"next_t: factor is {factor}; accepted: 1 or more")
    if kind == "schedule":
        rows = len(schedule) if schedule is not None else 0
        if schedule is not None:
            check_within(op, "schedule", torch.as_tensor(schedule))
        if not 0 <= index < rows - 1:
            raise ValueError(
                f"next_t: index is {index}; accepted: 0 to {rows - 2}, of a schedule with {rows} rows"
            )
    return reference.next_t(
        t, kind, dt=dt, mask=mask, index=index, steps=steps, factor=factor, schedule=schedule
    )
