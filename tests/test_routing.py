"""Every routing op on every backend against the float64 reference, and what torch does to it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_map

import pydiffuse as pd
from tests.cases.routing import CASES, SHAPES, TOLERANCE, Maker
from tests.helpers import (
    DEVICE,
    GPU,
    check_compiled,
    check_refused,
    doubled,
    leaves,
    relative_error,
    run,
    values_and_gradients,
)

BACKENDS = ["triton"] if GPU else ["cpu", "triton"]
KERNELS = [case for case in CASES if case.op not in ("route", "channel_mask")]
TOKENS = [case for case in KERNELS if case.op != "routed_linear"]
by_case = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.id)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments(case, shape, dtype=torch.float32, **options):
    if case.op == "routed_linear":
        shape = (*shape[:2], shape[-1])
    return case.make(Maker(shape, dtype, DEVICE, **options))


def check(case, given, backend, dtype=torch.float32):
    results, gradients = values_and_gradients(case, given, backend)
    expected, slopes = values_and_gradients(case, doubled(given), "reference")
    for kind, ours, theirs in (("value", results, expected), ("grad", gradients, slopes)):
        bound = getattr(TOLERANCE[dtype], kind)
        if "gate" not in case.name and case.op != "routed_linear" and case.name != "number":
            bound = 0.0 if kind == "value" or dtype is torch.float32 else bound  # copies are exact
        bound = max(bound, 1e-7) if kind == "grad" else bound
        for i, (out, ref) in enumerate(zip(ours, theirs, strict=True)):
            assert out.shape == ref.shape and out.isfinite().all()
            assert relative_error(out, ref) <= bound, f"{kind} {i}: {relative_error(out, ref):.2e}"


@by_case
@by_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(case, backend, shape):
    check(case, arguments(case, shape), backend)


@by_case
@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, dtype):
    check(case, arguments(case, SHAPES["odd"], dtype), backend, dtype)


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "spaced": lambda t: torch.stack([t, t], -1)[..., 0],
    "every_other_token": lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2],
    "part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@by_case
@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(case, backend, layout):
    check(case, arguments(case, (2, 7, 21), layout=layout), backend)


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about sizes of the CPU kernels")
@pytest.mark.parametrize("features", [256, 251])
def test_outputs_past_the_caches(features):
    """Outputs beyond the threshold, on cache lines and off them."""
    x = torch.randn(2, 5000, features)
    ids = pd.route(2, 5000, 0.9)
    y = pd.gather_tokens(x, ids)
    assert torch.equal(y, x.gather(1, ids[..., None].expand(-1, -1, features)))
    back = pd.scatter_tokens(x, y + 1, ids)
    assert torch.equal(back, x.scatter(1, ids[..., None].expand(-1, -1, features), y + 1))


@by_case
@by_backend
def test_same_bits_twice_and_alone(case, backend):
    given = arguments(case, (3, 7, 50))
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    if case.op == "routed_linear":
        return  # the matrix product is torch's, and its sums are too
    alone = tree_map(lambda t: t[1:2] if isinstance(t, torch.Tensor) else t, given)
    for a, b in zip(run(case, alone, backend), run(case, given, backend), strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU's threads")
def test_threads_change_nothing():
    x, ids = torch.randn(3, 999, 100), pd.route(3, 999, 0.5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = pd.gather_tokens(x, ids)
            results.append((y, pd.scatter_tokens(x, 2 * y, ids, 0.3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@by_backend
def test_nan_stays_in_its_token(backend):
    x, ids = torch.randn(1, 6, 20, device=DEVICE), torch.tensor([[4, 1]], device=DEVICE)
    x[0, 1, 3], x[0, 2, 0] = float("nan"), float("inf")
    with pd.use_backend(backend):
        y = pd.gather_tokens(x, ids)
        z = pd.scatter_tokens(x, y * 0, ids)
        half = pd.scatter_tokens(x, torch.zeros_like(y), ids, 0.5)
    assert y[0, 1].isnan().sum() == 1 and not y[0, 0].isnan().any()
    assert z[0, 1].isnan().sum() == 1 and z[0, 2].isinf().sum() == 1 and not z[0, 4].any()
    assert half.isnan().sum() == 1 and half[0, 1, 3].isnan()


@by_backend
@pytest.mark.parametrize("case", TOKENS[2:5], ids=lambda case: case.id)
def test_out(case, backend):
    """out= holds the same bits, contiguous or not, and may be base."""
    (base, y, ids, *gate), kwargs = arguments(case, (2, 9, 30))
    expected = run(case, ((base, y, ids, *gate), kwargs), backend)[0]
    for out in (torch.empty_like(base), torch.empty(2, 30, 9, device=DEVICE).mT, base.clone()):
        source = out if torch.equal(out, base) else base
        found = run(case, ((source, y, ids, *gate), {"out": out}), backend)[0]
        assert found is out and torch.equal(found, expected)


def test_route_is_uniform():
    """Every token is as likely as any other, and so is every pair of them."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    ids = pd.route(20000, 6, 3, generator=generator, device=DEVICE)
    assert ids.shape == (20000, 3) and (ids[:, 1:] > ids[:, :-1]).all()
    taken = torch.zeros(20000, 6, device=DEVICE).scatter_(1, ids, 1.0)
    pairs = taken.T @ taken / 20000
    expected = torch.full((6, 6), 0.2, device=DEVICE).fill_diagonal_(0.5)
    assert (pairs - expected).abs().max() < 0.02  # five standard deviations


def test_route_counts():
    for keep, count in ((0, 0), (5, 5), (0.0, 0), (1.0, 5), (0.5, 3), (0.49, 2)):
        ids = pd.route(4, 5, keep, device=DEVICE)
        assert ids.shape == (4, count) and ids.dtype == torch.int64
    first, again = (
        pd.route(2, 50, 0.5, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
        for _ in range(2)
    )
    assert torch.equal(first, again) and not torch.equal(first, pd.route(2, 50, 0.5, device=DEVICE))


def test_channel_mask():
    """A window of floor(beta C) that slides to the end, slowly at first."""
    level = torch.linspace(0, 1, 1000, device=DEVICE, dtype=torch.float64)
    mask = pd.channel_mask(level, 1152)
    assert mask.shape == (1000, 1152) and mask.dtype == torch.bool
    assert (mask.sum(1) == 921).all()
    first = mask.float().argmax(1)
    assert first[0] == 0 and first[-1] == 1152 - 921 and (first.diff() >= 0).all()
    assert first[500] == round(231 * (500 / 999) ** 4)
    assert torch.equal(mask.cumsum(1).diff(dim=1).bool().sum(1) + mask[:, 0], mask.sum(1))
    assert pd.channel_mask(1.0, 10, beta=0.5).tolist() == [False] * 5 + [True] * 5
    assert pd.channel_mask(0.5, 10, beta=1.0).all()


def test_round_trip_trains():
    """TREAD's way through a middle block: who did not take it comes back as he left."""
    x = torch.randn(2, 10, 8, device=DEVICE, requires_grad=True)
    ids = pd.route(2, 10, 0.5, device=DEVICE)
    out = pd.scatter_tokens(x, pd.gather_tokens(x, ids).exp(), ids)
    (slope,) = torch.autograd.grad(out.sum(), x)
    on = torch.zeros(2, 10, 1, device=DEVICE, dtype=torch.bool).scatter_(1, ids[..., None], True)
    torch.testing.assert_close(out, torch.where(on, x.exp(), x))
    torch.testing.assert_close(slope, torch.where(on, x.exp(), torch.ones_like(x)))


@by_backend
@pytest.mark.parametrize("case", KERNELS[-2:], ids=lambda case: case.id)
def test_routed_linear_without_gradients(case, backend):
    """Products go straight into one buffer where nothing is to be differentiated."""
    given = arguments(case, (2, 9, 33))
    expected = run(case, doubled(given), "reference")[0]
    assert relative_error(run(case, given, backend)[0], expected) < 1e-6


def test_routed_linear_sizes():
    x, weights = torch.randn(2, 6, 8, device=DEVICE), torch.randn(3, 4, 8, device=DEVICE)
    modality = torch.tensor([[0, 0, 2, 2, 2, 0], [2, 0, 0, 0, 2, 2]], device=DEVICE)
    expected = torch.stack([
        torch.stack([weights[m] @ v for m, v in zip(r, s)]) for r, s in zip(modality, x)
    ])  # fmt: skip
    for sizes in (None, (6, 0, 6)):
        torch.testing.assert_close(pd.routed_linear(x, weights, modality, sizes=sizes), expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = pd.routed_linear(x.bfloat16(), weights, modality)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 1e-2


X, Y = torch.randn(2, 5, 4, device=DEVICE), torch.randn(2, 2, 4, device=DEVICE)
IDS, W = torch.tensor([[0, 3], [4, 1]], device=DEVICE), torch.randn(3, 6, 4, device=DEVICE)
MODALITY = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "no tensor": (lambda: pd.gather_tokens([1], IDS), TypeError, ["gather_tokens", "x", "list"]),
    "one dimension": (lambda: pd.gather_tokens(X[0, 0], IDS), TypeError, ["x", "(4,)", "[B, N, D...]"]),
    "integers": (lambda: pd.gather_tokens(X.int(), IDS), TypeError, ["x", "int32", "bfloat16"]),
    "float64": (lambda: pd.gather_tokens(X.double(), IDS), TypeError, ["float64", "use_backend"]),
    "ids dtype": (lambda: pd.gather_tokens(X, IDS.float()), TypeError, ["ids", "float32", "int64"]),
    "ids shape": (lambda: pd.gather_tokens(X, IDS[:1]), ValueError, ["ids", "(1, 2)", "(2, keep)"]),
    "ids list": (lambda: pd.gather_tokens(X, [[0]]), TypeError, ["ids", "list"]),
    "y shape": (lambda: pd.scatter_tokens(X, X, IDS), ValueError, ["y", "(2, 5, 4)", "(2, 2, 4)"]),
    "y dtype": (lambda: pd.scatter_tokens(X, Y.half(), IDS), TypeError, ["y", "float16", "float32"]),
    "gate": (lambda: pd.scatter_tokens(X, Y, IDS, X), ValueError, ["gate", "(2, 5, 4)", "(2, 2)"]),
    "gate type": (lambda: pd.scatter_tokens(X, Y, IDS, "1"), TypeError, ["gate", "str"]),
    "gate dtype": (lambda: pd.scatter_tokens(X, Y, IDS, IDS), ValueError, ["gate", "int64"]),
    "out": (lambda: pd.scatter_tokens(X, Y, IDS, out=Y), ValueError, ["out", "(2, 2, 4)"]),
    "out is y": (
        lambda: pd.scatter_tokens(X, X[:, :2], IDS, out=X), ValueError, ["out", "memory", "y"],
    ),
    "out and grad": (
        lambda: pd.scatter_tokens(X, Y.clone().requires_grad_(), IDS, out=X), ValueError, ["no_grad"],
    ),
    "route N": (lambda: pd.route(2, -1, 0.5), ValueError, ["route", "N", "-1"]),
    "route count": (lambda: pd.route(2, 5, 6), ValueError, ["keep", "6", "0 to 5"]),
    "route fraction": (lambda: pd.route(2, 5, 1.5), ValueError, ["keep", "1.5", "0.0 to 1.0"]),
    "channels": (lambda: pd.channel_mask(0.5, 0), ValueError, ["channel_mask", "channels", "0"]),
    "beta": (lambda: pd.channel_mask(0.5, 8, beta=1.5), ValueError, ["beta", "1.5", "(0, 1]"]),
    "alpha": (lambda: pd.channel_mask(0.5, 8, alpha=0), ValueError, ["alpha", "0", "> 0"]),
    "level": (lambda: pd.channel_mask(7, 8), ValueError, ["level", "7", "0 to 1"]),
    "level type": (lambda: pd.channel_mask("1", 8), TypeError, ["level", "str"]),
    "weights": (lambda: pd.routed_linear(X, W[..., :3], MODALITY), ValueError, ["weights", "4"]),
    "no weights": (lambda: pd.routed_linear(X, W[:0], MODALITY), ValueError, ["weights", "M > 0"]),
    "weights dtype": (lambda: pd.routed_linear(X, W.half(), MODALITY), TypeError, ["weights", "float16"]),
    "modality": (lambda: pd.routed_linear(X, W, MODALITY[:, :2]), ValueError, ["modality", "(2, 5)"]),
    "bias": (lambda: pd.routed_linear(X, W, MODALITY, W[0]), ValueError, ["bias", "(3, 6)"]),
    "sizes count": (
        lambda: pd.routed_linear(X, W, MODALITY, sizes=[10]), ValueError, ["sizes", "3 counts"],
    ),
    "sizes sum": (
        lambda: pd.routed_linear(X, W, MODALITY, sizes=[9, 0, 0]), ValueError, ["sizes", "9", "10"],
    ),
}  # fmt: skip
if not GPU:
    BAD |= {
        "id too high": (lambda: pd.gather_tokens(X, IDS + 1), ValueError, ["ids", "5", "0 to 4"]),
        "id below": (lambda: pd.gather_tokens(X, IDS - 1), ValueError, ["ids", "-1", "0 to 4"]),
        "id twice": (
            lambda: pd.scatter_tokens(X, Y, torch.tensor([[0, 1], [2, 2]])),
            ValueError,
            ["ids", "2 twice", "sample 1", "unique"],
        ),
        "modality too high": (
            lambda: pd.routed_linear(X, W, MODALITY + 3), ValueError, ["modality", "3", "0 to 2"],
        ),
        "sizes of others": (
            lambda: pd.routed_linear(X, W, MODALITY, sizes=[9, 1, 0]), ValueError, ["[9, 1, 0]", "[10, 0, 0]"],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    check_refused(*row)


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it calls the CPU kernels")
def test_raw_ops_refuse_too():
    ops, ids, gate = torch.ops.pydiffuse, IDS.int(), torch.ones(2, 2)
    out = torch.empty(2, 5, 4)
    ops.gather_tokens(torch.empty_like(Y), X, ids, gate)
    ops.scatter_tokens(out, X, Y, ids, gate)
    for bad in (ids + 1, ids - 1, ids[:1], IDS, ids.repeat(1, 2)):
        with pytest.raises(RuntimeError):
            ops.gather_tokens(torch.empty_like(Y), X, bad, None)
        with pytest.raises(RuntimeError):
            ops.scatter_tokens(out, X, Y.repeat(1, bad.shape[1] // 2, 1), bad, None)
    for x, y in ((X[..., :3], Y), (X, Y[:, :1]), (X.half(), Y), (X[0], Y), (X.mT, Y)):
        with pytest.raises(RuntimeError):
            ops.scatter_tokens(out, x, y, ids, None)
    with pytest.raises(RuntimeError):
        ops.scatter_tokens(out, X, Y, ids, gate[:, :1])


def real(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


@pytest.mark.parametrize("case", [KERNELS[0], KERNELS[4], KERNELS[7]], ids=lambda case: case.id)
def test_compile_fullgraph(case):
    args, kwargs = arguments(case, (2, 5, 24))
    if case.op == "routed_linear":
        kwargs = {"sizes": torch.bincount(args[2].flatten(), minlength=4).tolist()}
    check_compiled(case, (args, kwargs), None)


def test_compile_with_inductor():
    torch._dynamo.reset()

    def step(x, ids, gate):
        y = pd.gather_tokens(x.sin(), ids)
        x = pd.scatter_tokens(x, y * 2, ids, gate)
        return pd.scatter_tokens(x + 1, y, ids, out=torch.empty_like(x))

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for N in (6, 9):
        x, ids = torch.randn(2, N, 12, device=DEVICE), pd.route(2, N, 0.5, device=DEVICE)
        torch.testing.assert_close(compiled(x, ids, 0.5), step(x, ids, 0.5))


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, ids):
            return pd.scatter_tokens(x, 2 * pd.gather_tokens(x, ids), ids)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Block(), (X, IDS), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    other = X.repeat(2, 1, 1) + 1, IDS.repeat(2, 1)
    torch.testing.assert_close(program.module()(*other), Block()(*other))


def test_opcheck():
    ops = torch.ops.pydiffuse_triton if GPU else torch.ops.pydiffuse
    ids, gate = IDS.int(), torch.rand(2, 2, device=DEVICE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in {
        ops.gather_tokens.default: (Y.clone(), X, ids, None),
        ops.scatter_tokens.default: (torch.empty_like(X), X, Y, ids, gate),
    }.items():
        torch.library.opcheck(op, args, test_utils=tests)


@by_case
def test_gradcheck_of_the_reference(case):
    given = doubled(arguments(case, (2, 3, 4), torch.float64))
    tensors = [t.requires_grad_() for t in leaves(given) if real(t)]

    def function(*tensors):
        rest = iter(tensors)
        return tuple(run(case, tree_map(lambda t: next(rest) if real(t) else t, given), "reference"))

    assert gradcheck(function, tensors, atol=1e-5, rtol=1e-4)


def test_second_derivatives():
    """Gather and scatter are linear in their tokens and differentiate to any order."""
    x, y, gate = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((2, 5, 4), (2, 2, 4), (2, 2)))

    def hessian_times(*tensors):
        x, y, gate = tensors
        out = pd.scatter_tokens(x, y * pd.gather_tokens(x, IDS), IDS, gate)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), tensors)

    found = hessian_times(x, y, gate)
    with pd.use_backend("reference"):
        expected = hessian_times(*(t.detach().double().requires_grad_() for t in (x, y, gate)))
        assert gradgradcheck(
            lambda x: pd.gather_tokens(x, IDS), X.double().requires_grad_(), check_fwd_over_rev=False
        )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.id)
def test_func_grad_and_vmap(case):
    given = arguments(case, (2, 5, 12))
    tensors = leaves(given)
    inputs = tuple(i for i, t in enumerate(tensors) if real(t))

    def total(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, given)
        return sum(r.square().sum() for r in run(case, args, None))

    copies = [t.clone().requires_grad_(i in inputs) for i, t in enumerate(tensors)]
    expected = torch.autograd.grad(total(*copies), [copies[i] for i in inputs])
    for a, b in zip(torch.func.grad(total, inputs)(*tensors), expected, strict=True):
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([t, t.flip(1) if i not in inputs else 0.5 * t]) for i, t in enumerate(tensors)]
    mapped = torch.func.vmap(torch.func.grad(total, inputs))(*stacked)
    for v in range(2):
        one = torch.func.grad(total, inputs)(*(t[v] for t in stacked))
        for a, b in zip(mapped, one, strict=True):
            torch.testing.assert_close(a[v], b)


def test_autocast_and_inference_mode():
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.inference_mode():
        assert pd.gather_tokens(X, IDS).dtype == torch.float32
        assert pd.scatter_tokens(X.bfloat16(), Y.bfloat16(), IDS, 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [-7, 5, 2**31 - 1])
def test_ids_that_nobody_checked(wrong):
    """On a GPU ids are not looked at beforehand; the kernels touch nothing outside the tokens."""
    ops = torch.ops.pydiffuse_triton
    ids = torch.tensor([[1, wrong], [2, 3]], dtype=torch.int32, device=DEVICE)

    def results(ids):
        y, out, own = torch.empty_like(Y), torch.empty_like(X), X.clone()
        ops.gather_tokens(y, X, ids, None)
        ops.scatter_tokens(out, X, Y, ids, None)
        ops.scatter_tokens(own, own, Y, ids, None)
        return y, out, own

    for a, b in zip(results(ids), results(ids.clamp(0, 4)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not GPU, reason="this machine has no GPU")
@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.id)
def test_graph_capture_without_sync(case):
    given = arguments(case, (2, 40, 64))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(case, given, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, given, "triton")
    for t in leaves(given):
        if real(t):
            t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(results, run(case, given, "triton"), strict=True):
        assert torch.equal(a, b)
