"""The selective scan, the convolution before it and the layer around both: against the floor of their
arithmetic and against what a user without a GPU would otherwise run."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pydiffuse
from benchmarks.measure import Contender, copy_seconds, race, sets_for
from benchmarks.row import Bar, Row
from pydiffuse.nn import ZigzagMamba
from pydiffuse.paths import ScanPath, zigzag
from tests.cases.scan import ScanMaker, Size

B, D, L, N = SHAPE = Size(1, 1536, 1024, 16)  # ZigMa's inner width, 32 x 32 tokens
ROWS, COLUMNS = zigzag((32, 32), 0), zigzag((32, 32), 1)


def rows(device: str, quick: bool = False) -> Iterator[Row]:
    seconds = 1.0 if quick else 4.0
    yield from accuracy_rows(device)
    floor = floor_ms(SHAPE, seconds / 2) if device == "cpu" else moved_ms(SHAPE, device)
    for layout in ("bld", "bdl"):
        for state in STATES:
            yield from order_rows(layout, state, device, floor, seconds)
    for dtype in (torch.bfloat16, torch.float16):
        yield plain_row("forward, zigzag", SHAPE, dtype, device, floor, seconds / 2)
    yield from length_rows(device, seconds)
    for layout in ("bld", "bdl"):
        yield backward_row(layout, device, floor, seconds)
    yield several_row(device, floor, seconds)
    yield conv_row(device, seconds / 2)
    for backward in (False, True):
        yield layer_row(device, backward, seconds)


def error_of(found: Any, expected: Any) -> float:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple | list) else [(found, expected)]
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def make(size: Size, layout: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """(u, delta, A, B, C, D, z) of a trained layer's sizes: delta from 0.001 to 0.1, A = -1 .. -N."""
    t = ScanMaker(size, dtype, device, layout, seed)
    delta = (0.001 * 100 ** t.tokens().float().sigmoid()).to(dtype)
    A = -torch.arange(1.0, size.N + 1, device=device).repeat(size.D, 1)
    return t.tokens(), delta, A, t.weights(), t.weights(), t.channels(), t.tokens()


def scan(args: Any, layout: str, path: ScanPath | None = None) -> Tensor:
    y = pydiffuse.selective_scan(*args, layout=layout, path=path)
    assert isinstance(y, Tensor)
    return y


def exact(args: Any, layout: str, path: ScanPath | None = None, gradients: Tensor | None = None) -> Any:
    """The float64 loop of the reference: the result, or the gradients of all arguments."""
    wide = [t.detach().double().requires_grad_(gradients is not None) for t in args]
    with pydiffuse.use_backend("reference"):
        y = pydiffuse.selective_scan(*wide, layout=layout, path=path)
    return y if gradients is None else torch.autograd.grad(y, wide, gradients.double())


# Rivals, as their users call them: tokens before channels.


def mamba_py() -> Callable[..., Tensor]:
    from mambapy.mamba import MambaBlock

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return MambaBlock.selective_scan(None, u, delta, A, B, C, D) * F.silu(z)

    return run


def plain_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    decay = torch.exp(delta[..., None] * A)
    x = (delta * u)[..., None] * B[:, :, None]
    h, y = torch.zeros_like(x[:, 0]), []
    for l in range(u.shape[1]):
        h = decay[:, l] * h + x[:, l]
        y.append((h @ C[:, l, :, None])[..., 0])
    return (torch.stack(y, 1) + D * u) * F.silu(z)


def turned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rival that knows tokens before channels, for a caller who has channels before tokens."""

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return function(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT).mT

    return run


def mamba_ssm(layout: str) -> Callable[..., Tensor]:
    """Its CUDA scan, which knows channels before tokens."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn if layout == "bdl" else turned(selective_scan_fn)


def rivals_in(layout: str, device: str) -> dict[str, Callable[..., Tensor]]:
    """The first is the best there is."""
    rivals = {"mamba.py": mamba_py()}
    if device == "cpu":
        rivals["loop"] = plain_loop
    if layout == "bdl":
        rivals = {name: turned(f) for name, f in rivals.items()}
    if device == "cuda" and importlib.util.find_spec("selective_scan_cuda"):
        rivals = {"mamba_ssm": mamba_ssm(layout), **rivals}
    return rivals


def accuracy_rows(device: str) -> Iterator[Row]:
    """Against a float64 loop at odd lengths, for every number of states and groups that the bars name."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        worst = slope = 0.0
        for states, groups, length in itertools.product((1, 5, 16, 64), (1, 2, 3), (37, 201)):
            t = ScanMaker(Size(2, 36, length, states), dtype, device, "bld")
            leading = (groups,) if groups > 1 else ()
            args = [
                t.tokens(),
                t.delta(),
                t.A(),
                t.weights(*leading),
                t.weights(*leading),
                t.channels(),
                t.tokens(),
            ]
            path = t.path()
            worst = max(worst, error_of(scan(args, "bld", path), exact(args, "bld", path)))
            if dtype is torch.float32:
                leaves = [a.requires_grad_() for a in args]
                y = scan(leaves, "bld", path)
                w = torch.randn_like(y)
                found = torch.autograd.grad(y, leaves, w)
                slope = max(slope, error_of(found, exact(args, "bld", path, w)))
        bars = [Bar("relative error", worst, bound, at_most=True)]
        if dtype is torch.float32:
            bars.append(Bar("relative error of gradients", slope, 1e-4, at_most=True))
        what = "error to a float64 loop, 1 to 64 states, 1 to 3 groups"
        yield Row("selective_scan", what, (2, 36, 201), dtype, error=worst, bars=bars)


def floor_ms(size: Size, seconds: float) -> float:
    """N exponentials and 2 N multiply-adds per channel and token, in cache, on all threads."""
    from pydiffuse import _host

    _host.set_threads(torch.get_num_threads())
    c = Contender("floor", lambda i: _host.scan_floor(size.N, size.B * size.D * size.L))
    race([c], 1, seconds=seconds)
    return c.ms


def moved_ms(size: Size, device: str) -> float:
    """The floor on a GPU: u, delta, z read and y written."""
    return 1e3 * copy_seconds(2 * size.B * size.D * size.L, torch.float32, device)


def bytes_of(size: Size, itemsize: int) -> int:
    """u, delta, z read and y written."""
    return 4 * size.B * size.D * size.L * itemsize


def contender(
    name: str, data: list[Any], call: Callable[[Any], Any], expected: Any, **options: Any
) -> Contender:
    return Contender(name, lambda i: call(data[i]), lambda y: error_of(y, expected), **options)


def sets(size: Size, layout: str, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    count = sets_for(bytes_of(size, dtype.itemsize))
    return [make(size, layout, device, dtype, seed) for seed in range(count)]


# What the caches hold of a call's tensors: what the layer's convolution and projections have just written,
# or nothing.
STATES = ("in cache", "from memory")


def order_rows(
    layout: str, state: str, device: str, floor: float | None, seconds: float
) -> Iterator[Row]:
    """One layout: the identity, both kinds of zigzag, and the rivals on the identity."""
    warm = state == "in cache"
    data = sets(SHAPE, layout, device)[: 1 if warm else None]
    orders: dict[str, ScanPath | None] = {
        "identity": None,
        "zigzag along rows": ROWS,
        "zigzag along columns": COLUMNS,
    }
    ours = {
        name: contender(name, data, lambda a, p=path: scan(a, layout, p), exact(data[0], layout, path))
        for name, path in orders.items()
    }
    rivals = []
    with torch.no_grad():
        race(list(ours.values()), len(data), device=device, seconds=seconds, least=40)
        if warm:
            expected = exact(data[0], layout)
            for name, rival in rivals_in(layout, device).items():
                rivals.append(contender(name, data, lambda a, f=rival: f(*a), expected))
                race(rivals[-1:], 1, device=device, seconds=0, least=5)
    for name, c in ours.items():
        row = Row(
            "selective_scan", f"forward, {name}, {layout}, {state}", (B, D, L), torch.float32, c.ms, c.error,
            bytes_of(SHAPE, 4), floor,
        )  # fmt: skip
        if name != "identity":
            row.bars.append(Bar("x the identity", c.ms / ours["identity"].ms, 1.12, at_most=True))
        if rivals and name == "zigzag along rows":
            row.rivals, row.headline = rivals, True
            if device == "cpu":
                row.bars.append(Bar("x mamba.py", rivals[0].ms / c.ms, 20 if layout == "bld" else 15))
        if device == "cpu" and floor and warm and layout == "bld" and name != "identity":
            row.bars.append(Bar("of the floor", floor / c.ms, 0.7))
        yield row


def plain_row(
    what: str, size: Size, dtype: torch.dtype, device: str, floor: float | None, seconds: float
) -> Row:
    data = sets(size, "bld", device, dtype)
    c = contender("ours", data, lambda a: scan(a, "bld", ROWS), exact(data[0], "bld", ROWS), bound=5e-3)
    race([c], len(data), device=device, seconds=seconds)
    return Row(
        "selective_scan",
        f"{what}, bld",
        size[:3],
        dtype,
        c.ms,
        c.error,
        bytes_of(size, dtype.itemsize),
        floor,
    )


def length_rows(device: str, seconds: float) -> Iterator[Row]:
    """Long rows and short ones: the time per element is that of 1,024 tokens."""
    sizes = {
        Size(1, D, 1024, N): "1,024 tokens",
        Size(1, D, 4096, N): "4,096 tokens",
        Size(256, D, 16, N): "short",
    }
    paths = {1024: ROWS, 4096: zigzag((64, 64), 0), 16: None}
    cs = []
    for size, name in sizes.items():
        data = sets(size, "bld", device)
        path = paths[size.L]
        cs.append(contender(name, data, lambda a, p=path: scan(a, "bld", p), exact(data[0], "bld", path)))
    race(cs, 2, device=device, seconds=seconds)
    elements = [size.B * size.L for size in sizes]
    for size, c, count in list(zip(sizes, cs, elements, strict=True))[1:]:
        ratio = c.ms / count / (cs[0].ms / elements[0])
        yield Row(
            "selective_scan", "forward, other lengths, bld", size[:3], torch.float32, c.ms, c.error,
            bytes_of(size, 4), bars=[Bar("x the time per element of 1,024 tokens", ratio, 1.3, at_most=True)],
        )  # fmt: skip


def backward_row(layout: str, device: str, floor: float | None, seconds: float) -> Row:
    data = [[t.requires_grad_() for t in args] for args in sets(SHAPE, layout, device)]
    dy = torch.randn_like(data[0][0])

    def both(call: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
        return lambda a: torch.autograd.grad(call(a), a, dy)

    expected = exact(data[0], layout, ROWS, dy)
    ours = contender("ours", data, both(lambda a: scan(a, layout, ROWS)), expected)
    name, mamba = next(iter(rivals_in(layout, device).items()))
    rival = contender(name, data, both(lambda a: mamba(*a)), exact(data[0], layout, None, dy))
    bare = [[t.detach() for t in args] for args in data]
    forward = contender("forward", bare, lambda a: scan(a, layout, ROWS), exact(bare[0], layout, ROWS))
    race([ours, forward], len(data), device=device, seconds=seconds)
    race([rival], len(data), device=device, seconds=0, least=4)
    row = Row(
        "selective_scan",
        f"forward and backward, zigzag, {layout}",
        (B, D, L),
        torch.float32,
        ours.ms,
        ours.error,
    )
    row.rivals, row.headline = [rival], True
    row.bars = [
        Bar(f"x {name}, both", rival.ms / ours.ms, 15 if device == "cpu" else 1),
        Bar("x the forward", ours.ms / forward.ms, 5, at_most=True),
    ]
    return row


def several_row(device: str, floor: float | None, seconds: float) -> Row:
    """Both directions in one call, and as two."""
    data = sets(SHAPE, "bld", device)
    ways = [ROWS, ROWS.reversed()]
    expected = exact(data[0], "bld", ROWS) + exact(data[0], "bld", ROWS.reversed())
    one = contender(
        "one call", data, lambda a: pydiffuse.selective_scan(*a, layout="bld", path=ways), expected
    )
    two = contender(
        "two calls", data, lambda a: scan(a, "bld", ways[0]) + scan(a, "bld", ways[1]), expected
    )
    race([one, two], len(data), device=device, seconds=seconds)
    return Row(
        "selective_scan", "both directions in one call, bld", (B, D, L), torch.float32, one.ms, one.error,
        bytes_of(SHAPE, 4), 2 * floor if floor else None, [two],
    )  # fmt: skip


def conv_row(device: str, seconds: float) -> Row:
    data = [
        (
            torch.randn(B, L, D, device=device),
            torch.randn(D, 4, device=device),
            torch.randn(D, device=device),
        )
        for _ in range(sets_for(2 * L * D * 4))
    ]

    def eager(a: Any) -> Tensor:
        x, w, b = a
        return F.silu(F.conv1d(x.mT, w[:, None], b, padding=3, groups=D)[..., :L]).mT

    x, w, b = (t.double() for t in data[0])
    expected = eager((x, w, b))
    ours = contender(
        "ours", data, lambda a: pydiffuse.causal_conv1d(*a, activation="silu", layout="bld"), expected
    )
    rivals = [
        contender("eager", data, eager, expected),
        contender("torch.compile", data, torch.compile(eager, dynamic=False), expected),
    ]
    if device == "cuda" and importlib.util.find_spec("causal_conv1d_cuda"):
        from causal_conv1d import causal_conv1d_fn

        def theirs(a: Any) -> Tensor:
            x, w, b = a
            return causal_conv1d_fn(x.mT, w, b, activation="silu").mT

        rivals.insert(0, contender("causal-conv1d", data, theirs, expected))
    with torch.no_grad():
        race([ours, *rivals], len(data), device=device, seconds=seconds)
    copy = copy_seconds(B * L * D, torch.float32, device) * 1e3
    return Row(
        "causal_conv1d",
        "forward, bld",
        (B, D, L),
        torch.float32,
        ours.ms,
        ours.error,
        2 * B * L * D * 4,
        copy,
        rivals,
    )


def layer_row(device: str, backward: bool, seconds: float) -> Row:
    """A ZigMa-sized layer (d_model 768) along a zigzag: ours, mamba.py's and transformers' between gathers."""
    from mambapy.mamba import MambaBlock, MambaConfig
    from transformers import MambaConfig as TransformersConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    layer = ZigzagMamba(768, path=ROWS, device=device)
    theirs = MambaBlock(MambaConfig(d_model=768, n_layers=1)).to(device)
    config = TransformersConfig(hidden_size=768, state_size=16, use_mambapy=True)
    mixer = MambaMixer(config, 0).to(device)
    for other in (theirs, mixer):
        other.load_state_dict(layer.state_dict())
    order, inverse = ROWS.order.to(device), ROWS.inverse.to(device)
    data = [torch.randn(B, L, 768, device=device).requires_grad_(backward) for _ in range(4)]

    def contestant(name: str, module: torch.nn.Module, gathers: bool) -> Contender:
        def run(i: int) -> Tensor:
            y = module(data[i][:, order])[:, inverse] if gathers else module(data[i])
            if not backward:
                return y
            return torch.autograd.grad(y.square().sum(), [data[i], *module.parameters()])[0]

        return Contender(name, run, lambda y: error_of(y, expected))

    with torch.set_grad_enabled(backward):
        expected = contestant("", layer, False).call(0)
        ours = contestant("ours", layer, False)
        rivals = [contestant("mamba.py", theirs, True), contestant("transformers", mixer, True)]
        race([ours], len(data), device=device, seconds=seconds)
        for rival in rivals:
            race([rival], 1, device=device, seconds=0, least=3)
    what = "a layer of d_model 768, zigzag" + (", forward and backward" if backward else "")
    return Row(
        "zigzag_mamba_inner",
        what,
        (B, L, 768),
        torch.float32,
        ours.ms,
        ours.error,
        rivals=rivals,
        headline=True,
    )
