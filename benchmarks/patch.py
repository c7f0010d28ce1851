"""Patches: each op against its floor, its plain PyTorch reference and what a user would otherwise run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import pydiffuse
from benchmarks.measure import Contender, copy_seconds, race, sets_for
from benchmarks.row import Bar, Row
from pydiffuse import samplers
from pydiffuse.patch import reference
from tests.cases.patch import CASES, Maker, with_gradients

LATENT, PATCH, INNER = (16, 4, 64, 64), 2, 3
# The small rows time a sampler's run of calls: with single calls in turns, each contender would first
# meet what the other's temporaries did to caches and page tables.
IN_A_ROW = 50
VIDEO, FRAMES = (1, 16, 21, 60, 104), (1, 60, 104)  # a level per frame
# Every op that has a kernel, on the video: the case that stands for it.
SWEEP = (
    ("noise_patches", "linear"), ("patch_step", "guided"), ("patch_step", "ddim_vp"),
    ("patch_step", "multistep"), ("convert", "v_to_flow"), ("patch_loss", "difficulty"),
)  # fmt: skip


def spread(table: Tensor) -> Tensor:
    """(B, N) to the elements of LATENT."""
    B, _, H, W = LATENT
    t = table.view(B, 1, H // PATCH, W // PATCH)
    return t.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def plain_step(
    x: Tensor, c: Tensor, u: Tensor, t: Tensor, t_next: Tensor, mask: Tensor, w: float
) -> tuple[Tensor, Tensor]:
    """What a user writes: guide, step, leave alone what is masked."""
    v = u + w * (c - u)
    y = x + spread(t_next - t) * v
    return torch.where(spread(mask), y, x), torch.where(mask, t_next, t)


def plain_noise(x1: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    s = spread(t)
    return s * x1 + (1 - s) * noise, x1 - noise


def plain_dual_loop(
    model: samplers.Model, x: Tensor, steps: int, certain: int, inner: int
) -> tuple[Tensor, Tensor]:
    """What a user writes: the surest patches by dt at once, the others in parts."""
    B, _, H, W = x.shape
    t = x.new_zeros(B, H * W // PATCH**2)
    dt = 1 / steps
    for _ in range(steps):
        v, score, _ = model(x, t)
        sure = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(certain, 1).indices, True)
        goal = t + dt
        for j in range(inner):
            part = goal if j == inner - 1 else t + dt * (j + 1) / inner
            if j == 0:
                now, to = t, torch.where(sure, goal, part)
                x = x + spread(to - now) * v
            else:
                v, *_ = model(x, to)
                now, to = to, torch.where(sure, to, part)
                x = torch.where(spread(sure), x, x + spread(to - now) * v)
        t = to
    return x, t


def relative(expected: Tensor) -> Callable[[Any], float]:
    def error(result: Any) -> float:
        first = result[0] if isinstance(result, tuple) else result
        return ((first.double() - expected).norm() / expected.norm()).item()

    return error


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 0.5 if quick else 3.0
    yield step_row(device, seconds)
    yield noise_row(device, seconds)
    yield dual_loop_row(device, seconds)
    yield select_row(device, seconds / 3)
    for op, name in SWEEP:
        for dtype in (torch.float32, torch.bfloat16):
            yield sweep_row(op, name, dtype, device, seconds / 3)
    for op, name in (("patch_step", "guided"), ("patch_loss", "difficulty")):
        yield backward_row(op, name, device, seconds / 2)


def in_a_row(call: Callable[[], Any]) -> Callable[[int], Any]:
    def calls(_: int) -> Any:
        for _ in range(IN_A_ROW):
            result = call()
        return result

    return calls


def images(count: int, device: str) -> list[Tensor]:
    return [torch.randn(LATENT, device=device) for _ in range(count)]


def levels(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """t, t_next, and a mask that holds 7 in 10 patches."""
    t, more, u = torch.rand(3, LATENT[0], LATENT[2] * LATENT[3] // PATCH**2, device=device)
    return 0.5 * t, 0.5 * t + 0.5 * more, u < 0.7


def step_row(device: str, seconds: float) -> Row:
    x, c, u = images(3, device)
    t, t_next, mask = levels(device)
    out = torch.empty_like(x)
    options = {"uncond": u, "scale": 7.5, "mask": mask}
    expected = plain_step(*(a.double() for a in (x, c, u, t, t_next)), mask, 7.5)[0]
    check = relative(expected)
    fast = torch.compile(plain_step, fullgraph=True, dynamic=False)
    ours = Contender(
        "pydiffuse", in_a_row(lambda: pydiffuse.patch_step(x, c, t, t_next, PATCH, **options)), check
    )
    into = Contender(
        "out=", in_a_row(lambda: pydiffuse.patch_step(x, c, t, t_next, PATCH, out=out, **options)), check
    )
    eager = Contender("eager", in_a_row(lambda: plain_step(x, c, u, t, t_next, mask, 7.5)), check)
    inductor = Contender("torch.compile", in_a_row(lambda: fast(x, c, u, t, t_next, mask, 7.5)), check)
    plain = Contender(
        "reference", in_a_row(lambda: reference.patch_step(x, c, t, t_next, PATCH, **options)), check
    )
    copy = Contender("copy", in_a_row(lambda: out.copy_(x)))
    again = Contender("pydiffuse", ours.call)
    race([ours, into, eager, copy], 1, device=device, seconds=seconds)
    race([again, inductor], 1, device=device, seconds=seconds)  # its threads, another pool's, spin
    race([plain], 1, device=device, seconds=seconds / 4, least=5)
    return Row(
        op="patch_step",
        what=f"guidance, Euler, mask and levels, {IN_A_ROW} in a row",
        headline=True,
        shape=LATENT,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=IN_A_ROW * 4 * x.numel() * 4,
        floor_ms=2 * copy.ms,
        rivals=[into, eager, inductor, plain],
        bars=[
            Bar("relative error", ours.error or 0.0, 1e-5, at_most=True),
            Bar("x eager", eager.ms / ours.ms, 4),
            Bar("x torch.compile", inductor.ms / again.ms, 1.2),
        ]
        if device == "cpu"
        else [],
    )


def noise_row(device: str, seconds: float) -> Row:
    x1, noise = images(2, device)
    t, _, _ = levels(device)
    out = torch.empty_like(x1)
    expected = plain_noise(x1.double(), noise.double(), t.double())[0]
    check = relative(expected)
    fast = torch.compile(plain_noise, fullgraph=True, dynamic=False)
    ours = Contender(
        "pydiffuse", in_a_row(lambda: pydiffuse.noise_patches(x1, t, PATCH, noise=noise)), check
    )
    pair = (torch.empty_like(x1), torch.empty_like(x1))
    into = Contender(
        "out=", in_a_row(lambda: pydiffuse.noise_patches(x1, t, PATCH, noise=noise, out=pair)), check
    )
    eager = Contender("eager", in_a_row(lambda: plain_noise(x1, noise, t)), check)
    inductor = Contender("torch.compile", in_a_row(lambda: fast(x1, noise, t)), check)
    copy = Contender("copy", in_a_row(lambda: out.copy_(x1)))
    race([ours, into, eager, copy], 1, device=device, seconds=seconds)
    race([inductor], 1, device=device, seconds=seconds)
    return Row(
        op="noise_patches",
        what=f"to the linear path, {IN_A_ROW} in a row",
        headline=True,
        shape=LATENT,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=IN_A_ROW * 4 * x1.numel() * 4,
        floor_ms=2 * copy.ms,
        rivals=[into, eager, inductor],
        bars=[
            Bar("relative error", ours.error or 0.0, 1e-5, at_most=True),
            Bar("x eager", eager.ms / ours.ms, 2),
        ]
        if device == "cpu"
        else [],
    )


def dual_loop_row(device: str, seconds: float) -> Row:
    """The sampler itself, with a model that has its predictions ready."""
    x, *preds = images(1 + INNER, device)
    score, _, _ = levels(device)
    k, out = score.shape[1] // 2, torch.empty_like(x)
    ready = [samplers.Prediction(p, score) for p in preds]
    parts = itertools.cycle(ready)
    given: dict[str, Any] = {"steps": IN_A_ROW, "certain": k, "inner": INNER}

    def model(x: Tensor, t: Tensor) -> samplers.Prediction:
        return next(parts)

    exact = itertools.cycle([samplers.Prediction(p.pred.double(), score) for p in ready])
    check = relative(plain_dual_loop(lambda x, t: next(exact), x.double(), **given)[0])
    ours = Contender("pydiffuse", lambda i: samplers.dual_loop(model, x, PATCH, **given), check)
    eager = Contender("eager", lambda i: plain_dual_loop(model, x, **given), check)
    copy = Contender("copy", in_a_row(lambda: out.copy_(x)))
    with torch.no_grad():
        race([ours, eager, copy], 1, device=device, seconds=2 * seconds)
    return Row(
        op="dual_loop",
        what=f"outer steps of {INNER} parts without the model, {IN_A_ROW} in a row",
        headline=True,
        shape=LATENT,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=IN_A_ROW * 3 * INNER * x.numel() * 4,
        floor_ms=1.5 * INNER * copy.ms,
        rivals=[eager],
        bars=[
            Bar("relative error", ours.error or 0.0, 1e-5, at_most=True),
            Bar("x eager", eager.ms / ours.ms, 5),
        ]
        if device == "cpu"
        else [],
    )


def select_row(device: str, seconds: float) -> Row:
    score, _, _ = levels(device)
    k = score.shape[1] // 2
    expected = reference.select_patches(score, k)[0].double()
    ours = Contender("pydiffuse", lambda i: pydiffuse.select_patches(score, k), relative(expected))
    plain = Contender("reference", lambda i: reference.select_patches(score, k))
    topk = Contender("topk", lambda i: score.topk(k, 1))
    race([ours, plain, topk], 1, device=device, seconds=seconds)
    return Row(
        op="select_patches",
        what="half of the patches",
        shape=tuple(score.shape),
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        rivals=[plain, topk],
    )


def arguments(op: str, name: str, dtype: torch.dtype, device: str, seed: int) -> Any:
    case = next(c for c in CASES if c.op == op and c.name == name)
    return case, case.make(Maker(VIDEO, FRAMES, dtype, device, seed))


def run(module: Any, op: str, given: Any) -> Any:
    args, kwargs = given
    return getattr(module, op)(*args, **kwargs)


def doubled(given: Any) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, given)


def bytes_of(op: str, moved: int, dtype: torch.dtype) -> int:
    """The state of a step, its history and what becomes of them stay float32 beside bfloat16."""
    return moved * math.prod(VIDEO) * (4 if op == "patch_step" else dtype.itemsize)


def sweep_row(op: str, name: str, dtype: torch.dtype, device: str, seconds: float) -> Row:
    case, first = arguments(op, name, dtype, device, 0)
    numel = math.prod(VIDEO)
    moved = bytes_of(op, case.reads + case.writes, dtype)
    if op in ("patch_step", "convert"):  # images: x and history are float32, predictions are not
        preds = {"guided": 2, "ddim_vp": 2, "multistep": 2, "v_to_flow": 2}[name]
        moved = (case.reads + case.writes - preds) * numel * 4 + preds * numel * dtype.itemsize
    sets = min(4, sets_for(moved))
    data = [first, *(arguments(op, name, dtype, device, i)[1] for i in range(1, sets))]
    expected = run(reference, op, doubled(first))
    check = relative(expected[0] if isinstance(expected, tuple) else expected)
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    ours = Contender("pydiffuse", lambda i: run(pydiffuse, op, data[i]), check, bound)
    plain = Contender("reference", lambda i: run(reference, op, data[i]))
    race([ours, plain], sets, device=device, seconds=seconds, least=5)
    copy = copy_seconds(numel, torch.float32, device, seconds / 4)
    return Row(
        op=op,
        what=name.replace("_", " ") + ", a level per frame",
        shape=VIDEO,
        dtype=dtype,
        ms=ours.ms,
        error=ours.error,
        bytes=moved,
        floor_ms=copy * 1e3 * moved / (2 * numel * 4),
        rivals=[plain],
    )


def backward_row(op: str, name: str, device: str, seconds: float) -> Row:
    """Forward and backward, as training runs it."""
    case, given = arguments(op, name, torch.float32, device, 0)
    given = with_gradients(case, given)

    def step(module: Any, given: Any) -> Any:
        result = run(module, op, given)
        first = result[0] if isinstance(result, tuple) else result
        inputs = [
            t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad
        ]
        return torch.autograd.grad(first.sum(), inputs)

    exact = with_gradients(
        case, tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, doubled(given))
    )
    check = relative(step(reference, exact)[0])
    ours = Contender("pydiffuse", lambda i: step(pydiffuse, given), check)
    plain = Contender("reference", lambda i: step(reference, given), check)
    race([ours, plain], 1, device=device, seconds=seconds, least=5)
    return Row(
        op=op,
        what=f"{name}, forward and backward",
        shape=VIDEO,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        rivals=[plain],
    )
