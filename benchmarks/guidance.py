"""Guidance: each op against its floor, its plain PyTorch reference and what a user would otherwise run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import pydiffuse
from benchmarks.measure import Contender, copy_seconds, race, sets_for
from benchmarks.row import Bar, Row
from pydiffuse.guidance import reference
from tests.cases.guidance import CASES, Maker

LARGE, SMALL, TINY = (1, 16, 21, 60, 104), (4, 4, 64, 64), (1, 4, 8, 8)
# Every op once on the large latent: the case that stands for it.
SWEEP = {
    "cfg": "number", "tcfg": "number", "cfg_zero": "number", "apg": "momentum", "magnitude_aware": "number",
    "perp_neg": "one", "compose": "and_not", "slerp": "number", "rescale": "number", "gram": "two",
    "combine": "two", "superpose": "and", "guide": "multistep",
}  # fmt: skip


def closed_form(c: Tensor, u: Tensor, w: float) -> Tensor:
    """TCFG as a user would write it for torch.compile."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.dim() - 1))

    cc, cu, uu = dot(c, c), dot(c, u), dot(u, u)
    D = torch.hypot(cc - uu, 2 * cu)
    u = cu / D * c + 0.5 * (1 + (uu - cc) / D) * u
    return u + w * (c - u)


def closed_euler(c: Tensor, u: Tensor, x: Tensor, w: float, dt: float) -> Tensor:
    return x + dt * closed_form(c, u, w)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def diffusers_tcfg(c: Tensor, u: Tensor, w: float) -> Tensor:
    from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance

    return normalized_guidance(c, u, w)


def svd_oracle(c: Tensor, u: Tensor, w: float) -> Tensor:
    """TCFG by its definition, a float64 SVD."""
    rows = torch.stack([c, u], 1).flatten(2).double()
    first = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
    damped = ((rows[:, 1] * first).sum(1, keepdim=True) * first).view(u.shape)
    return damped + w * (c.double() - damped)


def relative(expected: Tensor) -> Callable[[Any], float]:
    def error(result: Any) -> float:
        first = result[0] if isinstance(result, tuple) else result
        return ((first.double() - expected).norm() / expected.norm()).item()

    return error


def pair(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, apart: float = 0.4
) -> Any:
    u = torch.randn(shape, dtype=torch.float64)
    c = u + apart * torch.randn(shape, dtype=torch.float64)
    return c.to(dtype).to(device), u.to(dtype).to(device)


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 0.5 if quick else 3.0
    yield from accuracy_rows(device)
    yield tcfg_row(SMALL, "warm", device, seconds)
    for state in STATES:
        yield tcfg_row(LARGE, state, device, seconds)
        yield euler_row(state, device, seconds)
    if device == "cpu":
        yield call_row(seconds)
    for op, name in SWEEP.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield sweep_row(op, name, dtype, device, seconds / 3)
    for op in ("tcfg", "apg", "guide"):
        yield backward_row(op, device, seconds / 2)


def accuracy_rows(device: str) -> Iterator[Row]:
    """tcfg against the float64 SVD, as far apart and as close as predictions come."""
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 4e-3)):
        for apart, cosine in ((1.4, "0.6"), (0.4, "0.93"), (0.0045, "0.99999")):
            worst = 0.0
            for shape in (TINY, SMALL, (1, 16, 128, 128), LARGE):
                c, u = pair(shape, device, dtype, apart)
                error = relative(svd_oracle(c, u, 7.5))(pydiffuse.tcfg(c, u, 7.5))
                worst = max(worst, error)
            yield Row(
                op="tcfg",
                what=f"error to a float64 SVD, cosine {cosine}, worst of four shapes",
                shape=LARGE,
                dtype=dtype,
                error=worst,
                bars=[Bar("relative error", worst, bound, at_most=True)],
            )


# What the caches hold of a call's tensors. warm: all of them. cold: none. fresh: the predictions, which
# the model has just written; the latent is as old as the last step.
STATES = {
    "warm": "in cache",
    "cold": "from memory",
    "fresh": "predictions just written",
}


def freshen(data: list[Any]) -> Callable[[int], None]:
    sources = [t.clone() for t in data[0][:2]]

    def write(i: int) -> None:
        for t, source in zip(data[i][:2], sources, strict=True):
            t.copy_(source)

    return write


def tcfg_row(shape: tuple[int, ...], state: str, device: str, seconds: float) -> Row:
    numel, size = math.prod(shape), 4
    sets = 1 if state == "warm" else sets_for(3 * numel * size)
    data = [pair(shape, device) for _ in range(sets)]
    out = [torch.empty(shape, device=device) for _ in range(sets)]
    prepare = freshen(data) if state == "fresh" else None
    check = relative(svd_oracle(*data[0], 7.5))
    fast = compiled(closed_form)
    into = Contender("out=", lambda i: pydiffuse.tcfg(*data[i], 7.5, out=out[i]), check)
    ours = Contender("pydiffuse", lambda i: pydiffuse.tcfg(*data[i], 7.5), check)
    plain = Contender("reference", lambda i: reference.tcfg(*data[i], 7.5), check)
    inductor = Contender("torch.compile", lambda i: fast(*data[i], 7.5), check)
    # diffusers' float32 SVD is off by far more than the bound; it is the yardstick all the same.
    rival = Contender("diffusers", lambda i: diffusers_tcfg(*data[i], 7.5), check, bound=math.inf)
    rival.capturable = False  # the SVD waits for the device
    copy = Contender("copy", lambda i: out[i].copy_(data[i][0]))
    for c in (into, ours, plain, inductor, rival):
        c.prepare = prepare
    race([into, ours, plain, inductor, copy], sets, device=device, seconds=2 * seconds)
    race([rival], sets, device=device, seconds=seconds / 2, least=5)
    floor = 2.5 * copy.ms  # reads c and u twice, writes once: 5 N elements, a copy moves 2 N
    bars = [
        Bar("x diffusers", rival.ms / ours.ms, 50 if shape == LARGE else 40),
        Bar("x torch.compile", inductor.ms / ours.ms, 1.0 if shape == LARGE else 1.3),
    ]
    if shape == LARGE:
        bars.append(Bar("of the floor, with out=", floor / into.ms, 0.7))
    return Row(
        op="tcfg",
        what=f"beside its rivals, {STATES[state]}",
        headline=True,
        shape=shape,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=5 * numel * size,
        floor_ms=floor,
        rivals=[into, plain, inductor, rival],
        bars=bars if device == "cpu" else [],
    )


def euler_row(state: str, device: str, seconds: float) -> Row:
    numel, size = math.prod(LARGE), 4
    sets = 1 if state == "warm" else sets_for(4 * numel * size)
    data = [(*pair(LARGE, device), torch.randn(LARGE, device=device)) for _ in range(sets)]
    out = [torch.empty(LARGE, device=device) for _ in range(sets)]
    c, u, x = data[0]
    check = relative(x.double() + 0.02 * svd_oracle(c, u, 7.5))
    fast = compiled(closed_euler)

    def ours(i: int, target: Tensor | None = None) -> Any:
        c, u, x = data[i]
        return pydiffuse.guide([c, u], "tcfg", scale=7.5, x=x, b=0.02, out=target)

    def plain(i: int) -> Any:
        c, u, x = data[i]
        return reference.guide([c, u], "tcfg", scale=7.5, x=x, b=0.02)

    one = Contender("pydiffuse", ours, check)
    into = Contender("out=", lambda i: ours(i, out[i]), check)
    eager = Contender("reference", plain, check)
    inductor = Contender("torch.compile", lambda i: fast(*data[i], 7.5, 0.02), check)
    copy = Contender("copy", lambda i: out[i].copy_(data[i][0]))
    for contender in (one, into, eager, inductor):
        contender.prepare = freshen(data) if state == "fresh" else None
    race([one, into, eager, inductor, copy], sets, device=device, seconds=2 * seconds)
    return Row(
        op="guide",
        what=f"tcfg and an Euler step, {STATES[state]}",
        headline=state != "cold",
        shape=LARGE,
        dtype=torch.float32,
        ms=one.ms,
        error=one.error,
        bytes=6 * numel * size,
        floor_ms=3 * copy.ms,
        rivals=[into, eager, inductor],
        bars=[Bar("x torch.compile", inductor.ms / one.ms, 1.5)] if device == "cpu" else [],
    )


def call_row(seconds: float) -> Row:
    """What a call costs where there is nothing to compute."""
    c, u = pair(TINY, "cpu")
    check = relative(svd_oracle(c, u, 7.5))
    ours = Contender("pydiffuse", lambda i: pydiffuse.tcfg(c, u, 7.5), check)
    add = Contender("torch.add", lambda i: torch.add(c, u))
    race([ours, add], 1, seconds=seconds)
    return Row(
        op="tcfg",
        what="one call on a tiny latent",
        shape=TINY,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        rivals=[add],
        bars=[Bar("x a torch.add call", ours.ms / add.ms, 12, at_most=True)],
    )


def sweep_row(op: str, name: str, dtype: torch.dtype, device: str, seconds: float) -> Row:
    case = next(c for c in CASES if c.op == op and c.name == name)
    numel = math.prod(LARGE)
    moved = case.bytes_moved(numel, dtype.itemsize)
    sets = min(4, sets_for(moved))
    data = [case.make(Maker(LARGE, dtype, device, seed=i)) for i in range(sets)]
    doubled = tree_map(lambda t: t.double() if isinstance(t, Tensor) else t, data[0])
    expected = run(reference, case.op, doubled)
    check = relative(expected[0] if isinstance(expected, tuple) else expected)
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    ours = Contender("pydiffuse", lambda i: run(pydiffuse, op, data[i]), check, bound)
    plain = Contender("reference", lambda i: run(reference, op, data[i]), None)
    race([ours, plain], sets, device=device, seconds=seconds)
    copy = copy_seconds(numel, dtype, device, seconds / 4)
    return Row(
        op=op,
        what=f"{name.replace('_', ' ')}",
        shape=LARGE,
        dtype=dtype,
        ms=ours.ms,
        error=ours.error,
        bytes=moved,
        floor_ms=copy * 1e3 * moved / (2 * numel * dtype.itemsize),
        rivals=[plain],
    )


def run(module: Any, op: str, arguments: Any) -> Any:
    args, kwargs = arguments
    return getattr(module, op)(*args, **kwargs)


def backward_row(op: str, device: str, seconds: float) -> Row:
    """Forward and backward, as guided distillation runs it."""
    case = next(c for c in CASES if c.op == op and c.name == ("euler" if op == "guide" else "number"))
    sets = 3
    data = [
        tree_map(
            lambda t: t.requires_grad_() if isinstance(t, Tensor) else t,
            case.make(Maker(LARGE, torch.float32, device, seed=i)),
        )
        for i in range(sets)
    ]
    weight = torch.randn(LARGE, device=device)

    def step(module: Any, given: Any) -> Any:
        result = run(module, op, given)
        inputs = [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor)]
        return torch.autograd.grad(result, inputs, weight.to(result.dtype))

    doubled = tree_map(
        lambda t: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t, data[0]
    )
    check = relative(step(reference, doubled)[0])
    fast = compiled(getattr(reference, op))
    ours = Contender("pydiffuse", lambda i: step(pydiffuse, data[i]), check)
    plain = Contender("reference", lambda i: step(reference, data[i]), check)
    as_module = SimpleNamespace(**{op: fast})
    inductor = Contender("torch.compile", lambda i: step(as_module, data[i]), check)
    race([ours, plain, inductor], sets, device=device, seconds=seconds)
    numel = math.prod(LARGE)
    forward = case.reads + case.writes
    backward = 2 * 3 + 2 + (1 if op == "guide" else 0)  # (y, c, u) twice, dc and du, dx
    copy = copy_seconds(numel, torch.float32, device, seconds / 4)
    return Row(
        op=op,
        what="forward and backward",
        shape=LARGE,
        dtype=torch.float32,
        ms=ours.ms,
        error=ours.error,
        bytes=(forward + backward) * numel * 4,
        floor_ms=copy * 1e3 * (forward + backward) / 2,
        rivals=[plain, inductor],
    )
