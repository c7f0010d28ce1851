"""Samplers in which patches go at their own pace: thin loops over the patch ops and a model of yours.

A model is called as model(x, t) with the state x [B, C, *spatial] and the levels t (B, N), float32, of its
patches, and returns a prediction like x, or a `Prediction` with what else the sampler needs. `step` is
whatever pydiffuse.patch_step takes by name: method, path, predicts, scale, eta, generator. `progress`,
if given, is called as progress(i, x, t) after every outer step i. Run them under torch.no_grad(): then
the state is one buffer, stepped in place, and a model or a progress that keeps an x must copy it.

x: noise [B, C, *spatial]. patch_size: as in pydiffuse.patch. start: the level of x, by default 0, or 0.001
where predicts="eps". Each returns the sample, like x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse._core.draws import drawn
from pydiffuse._core.grids import PatchSize, count_patches, patch_sizes
from pydiffuse._core.words import plain
from pydiffuse.patch import dual_loop_t, next_t, patch_step, select_patches

Progress = Callable[[int, Tensor, Tensor], None] | None


class Prediction(NamedTuple):
    """What a model may return in place of a tensor."""

    pred: Tensor
    score: Tensor | None = None
    """(B, N), higher for patches the model is surer of: minus the log-variance of a difficulty head."""
    uncond: Tensor | None = None
    """The unconditional prediction; the step then wants scale=."""


Model = Callable[[Tensor, Tensor], Tensor | Prediction]


def _predict(sampler: str, model: Model, x: Tensor, t: Tensor, scored: bool = False) -> Prediction:
    given = model(x, t)
    found = Prediction(given) if isinstance(given, Tensor) else Prediction(*given)
    if scored and found.score is None:
        raise ValueError(
            f"{sampler}: the model returned no score; it must return Prediction(pred, score)"
        )
    return found


class _Stepper:
    """patch_step with its options, and the history that multistep passes on."""

    def __init__(self, patch_size: PatchSize, options: dict[str, Any]) -> None:
        self.patch_size, self.options = patch_size, options
        self.history: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        x: Tensor,
        p: Prediction,
        t: Tensor,
        t_next: Tensor,
        mask: Tensor | None = None,
        in_place: bool = True,
        guided: bool = True,
    ) -> tuple[Tensor, Tensor]:
        more = dict(self.options)
        if not guided:
            more.pop("scale", None)
        if in_place and not torch.is_grad_enabled():
            more["out"] = x
        if self.history is not None:
            more["history"] = self.history
        result = patch_step(
            x, p.pred, t, t_next, self.patch_size, uncond=p.uncond if guided else None, mask=mask, **more
        )
        self.history = result[2] if len(result) > 2 else None
        return result[0], result[1]


def _state(x: Tensor) -> Tensor:
    """A buffer to step in, or x itself where gradients need every state."""
    return x if torch.is_grad_enabled() else x.clone()


FIRST = 1e-3
"""Where predictions of the noise start by default: at t = 0 they say nothing of the data."""


def _start(
    sampler: str, x: Tensor, patch_size: PatchSize, steps: int, start: float | None, step: dict[str, Any]
) -> tuple[Tensor, list[float]]:
    """The levels of all patches, and the steps from there to 1, which add up to the bit."""
    blind = step.get("predicts") == "eps"
    if start is None:
        start = FIRST if blind else 0.0
    steps = plain(steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{sampler}: steps is {steps!r}; accepted: an int, 1 or more")
    if not 0 <= start < 1 or (blind and start == 0):
        least = "above 0, where a prediction of the noise says something," if blind else "0"
        raise ValueError(f"{sampler}: start is {start}; accepted: {least} to below 1")
    count = count_patches(x.shape, patch_sizes(sampler, x.shape, patch_size))
    levels = [start + (1 - start) * i / steps for i in range(steps + 1)]
    rounded = torch.tensor(levels, dtype=torch.float32).double()
    t = torch.full((len(x), count), start, dtype=torch.float32, device=x.device)
    return t, rounded.diff().tolist()


def dual_loop(
    model: Model,
    x: Tensor,
    patch_size: PatchSize,
    *,
    steps: int,
    certain: int,
    inner: int = 2,
    start: float | None = None,
    progress: Progress = None,
    **step: Any,
) -> Tensor:
    """Patch Forcing's dual loop (arXiv 2604.19141): sure patches first, the others in their light.

    An outer step takes all patches from t to t + dt: the `certain` patches of the highest score at once,
    the others in `inner` parts, of which all but the first see the sure ones already there. One call of the
    model per part: steps * inner in all.
    """
    inner = plain(inner)
    if isinstance(inner, bool) or not isinstance(inner, int) or inner < 1:
        raise ValueError(f"dual_loop: inner is {inner!r}; accepted: an int, 1 or more")
    t, parts = _start("dual_loop", x, patch_size, steps, start, step)
    advance, x = _Stepper(patch_size, step), _state(x)
    for i, dt in enumerate(parts):
        p = _predict("dual_loop", model, x, t, scored=True)
        assert p.score is not None
        levels = dual_loop_t(p.score, certain, t, dt=dt, steps=inner)
        for j, to in enumerate(levels):
            if j:
                p = _predict("dual_loop", model, x, t)
            x, t = advance(x, p, t, to)
        if progress is not None:
            progress(i, x, t)
    return x


def look_ahead(
    model: Model,
    x: Tensor,
    patch_size: PatchSize,
    *,
    steps: int,
    certain: int,
    factor: float = 1.4,
    plain: float = 0.05,
    guided_jump: bool = False,
    start: float | None = None,
    progress: Progress = None,
    **step: Any,
) -> Tensor:
    """Patch Forcing's look-ahead: sure patches jump to min(factor t, 1), for the others to look at.

    The others step to t + dt by a prediction that sees the jump; the sure ones step there from where they
    were, by the prediction before it. Two calls of the model per step. As published, the jump itself is not
    guided (`guided_jump` guides it), and steps from levels of `plain` or less are plain ones of all patches,
    one call each and not guided; plain=-1 has none.
    """
    if step.get("method") == "multistep":
        raise ValueError("look_ahead: multistep has no history of a jump; accepted: the other methods")
    t, parts = _start("look_ahead", x, patch_size, steps, start, step)
    level = 1 - sum(parts)
    advance, x = _Stepper(patch_size, step), _state(x)
    for i, dt in enumerate(parts):
        to = next_t(t, dt=dt)
        if level <= plain:
            x, t = advance(x, _predict("look_ahead", model, x, t), t, to, guided=False)
        else:
            p = _predict("look_ahead", model, x, t, scored=True)
            assert p.score is not None
            sure = select_patches(p.score, certain, as_mask=True)
            jump = next_t(t, "look_ahead", mask=sure, factor=factor)
            ahead, levels = advance(x, p, t, jump, in_place=False, guided=guided_jump)
            q = _predict("look_ahead", model, ahead, levels)
            y, _ = advance(x, p, t, to, sure)
            x, _ = advance(y, q, t, to, ~sure)
            t = to
        level += dt
        if progress is not None:
            progress(i, x, t)
    return x


def staggered(
    frames: int, steps: int, lag: int, *, block: int = 1, ready: int = 0, shift: float = 1.0
) -> Tensor:
    """A schedule (K, frames): every block of frames takes `steps` steps and starts `lag` steps after the one
    before it, at the latest when that is done. lag = 0 is all at once, lag = steps one after the other; noise
    never decreases from frame to frame (SkyReels-V2, arXiv 2504.13074).

    block: frames that go together. ready: the first frames are data already, at level 1 throughout. shift:
    takes each level t to s t / (1 + (s - 1) t), as in `sample_t`.
    """
    frames, steps, lag, block, ready = map(plain, (frames, steps, lag, block, ready))
    for name, value, least in (
        ("frames", frames, 1), ("steps", steps, 1), ("lag", lag, 0), ("block", block, 1), ("ready", ready, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"staggered: {name} is {value!r}; accepted: an int, {least} or more")
    if not shift > 0:
        raise ValueError(f"staggered: shift is {shift}; accepted: above 0")
    lag = min(lag, steps)
    f = torch.arange(frames, dtype=torch.float64)
    place = ((f - ready) / block).floor().clamp(min=0)  # of its block
    rows = steps + lag * int(place[-1]) + 1 if ready < frames else 1
    i = torch.arange(rows, dtype=torch.float64)
    t = ((i[:, None] - lag * place) / steps).clamp(0, 1)
    t = shift * t / (1 + (shift - 1) * t)
    return torch.where(f < ready, 1.0, t).float()


def diffusion_forcing(
    model: Model,
    x: Tensor,
    patch_size: PatchSize,
    *,
    schedule: Tensor | Sequence[Sequence[float]],
    progress: Progress = None,
    **step: Any,
) -> Tensor:
    """Diffusion forcing (arXiv 2407.01392): patches, or frames, along the rows of a schedule.

    schedule: (K, N) or (K, B, N), row 0 where x is: `staggered` makes one. A patch whose level stays keeps
    its bits. One call of the model per row after the first.
    """
    rows = torch.as_tensor(schedule, dtype=torch.float32, device=x.device)
    count = count_patches(x.shape, patch_sizes("diffusion_forcing", x.shape, patch_size))
    if rows.dim() not in (2, 3) or rows.shape[-1] != count or len(rows) < 1:
        raise ValueError(
            f"diffusion_forcing: schedule has shape {tuple(rows.shape)}; accepted: (K, {count}) or"
            f" (K, {len(x)}, {count})"
        )
    if step.get("predicts") == "eps" and not rows.is_cuda and bool((rows[0] == 0).any()):
        raise ValueError(
            "diffusion_forcing: schedule starts at 0, where a prediction of the noise says nothing of the"
            ' data; accepted with predicts="eps": levels above 0'
        )
    t = rows[0].expand(len(x), count)
    advance, x = _Stepper(patch_size, step), _state(x)
    for i in range(len(rows) - 1):
        p = _predict("diffusion_forcing", model, x, t)
        x, t = advance(x, p, t, next_t(t, "schedule", schedule=rows, index=i))
        if progress is not None:
            progress(i, x, t)
    return x


def sparse_guidance(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    patch_size: PatchSize,
    *,
    steps: int,
    keep: int,
    scale: float,
    start: float | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = None,
    **step: Any,
) -> Tensor:
    """Guidance by the same model on fewer tokens: sparse + scale (dense - sparse).

    The model is called as model(x, t, ids): ids None is all tokens, ids (B, keep), int64, ascending, the
    ones to route through. They are drawn anew for each step, where the generator is. Two calls per step.
    """
    t, parts = _start("sparse_guidance", x, patch_size, steps, start, step)
    advance, x = _Stepper(patch_size, {**step, "scale": scale}), _state(x)
    for i, dt in enumerate(parts):
        where = x.device if generator is None else generator.device
        draw = drawn(torch.rand, t.shape, generator, where).to(x.device)
        ids, _ = select_patches(draw, keep)
        p = Prediction(model(x, t, None), uncond=model(x, t, ids))
        x, t = advance(x, p, t, next_t(t, dt=dt))
        if progress is not None:
            progress(i, x, t)
    return x
