"""Every adaln op on every backend against the float64 reference, and what torch does to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map

import pydiffuse as pd
from pydiffuse._core import dispatch
from tests.cases.adaln import CASES, SHAPES, TOLERANCE, Maker
from tests.helpers import (
    DEVICE,
    GPU,
    check,
    check_compiled,
    check_refused,
    doubled,
    leaves,
    relative_error,
    run,
    values_and_gradients,
)

BACKENDS = ["triton"] if GPU else ["cpu", "triton"]
KERNELS = [case for case in CASES if case.op != "embed_t"]
by_case = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.id)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments(case, shape, dtype=torch.float32, **options):
    return case.make(Maker(shape, dtype, DEVICE, **options))


@by_case
@by_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(case, backend, shape):
    check(case, arguments(case, shape), backend, TOLERANCE)


@by_case
@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, dtype):
    check(case, arguments(case, SHAPES["odd"], dtype), backend, TOLERANCE, dtype)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about sizes of the CPU kernels")
def test_many_segments(columns):
    """Rows of the table with no token, one segment and many; features beyond one block of sums."""
    x, branch = (torch.randn(3000, 133).requires_grad_() for _ in range(2))
    rows = torch.randint(0, 40, (3000,)).square() // 40
    rows[:1500] = 7
    table = torch.randn(42, columns, 133).requires_grad_()

    def results(x, branch, table):
        if columns == 2:
            return (pd.modulate(x, table, rows),)
        return pd.gate_residual_modulate(x, branch, table, rows)

    inputs = [x, branch, table] if columns == 3 else [x, table]
    weights = [torch.randn(3000, 133) for _ in range(columns - 1)]
    found = torch.autograd.grad(results(x, branch, table), inputs, weights)
    wide = [t.detach().double().requires_grad_() for t in (x, branch, table)]
    with pd.use_backend("reference"):
        expected = torch.autograd.grad(
            results(*wide),
            [wide[0], wide[1], wide[2]] if columns == 3 else [wide[0], wide[2]],
            [w.double() for w in weights],
        )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 2e-6
    assert not found[-1][41].any()


def test_sums_that_registers_cannot_hold(monkeypatch):
    """The Triton kernels keep the table's gradient in memory where there are many features."""
    monkeypatch.setattr("pydiffuse.kernels.adaln.IN_REGISTERS", 0)
    case = next(c for c in CASES if c.op == "gate_residual_modulate")
    check(case, arguments(case, (2, 40, 33)), "triton", TOLERANCE)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "spaced": lambda t: torch.stack([t, t], -1)[..., 0],
    "every_other": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@by_case
@by_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(case, backend, layout):
    check(case, arguments(case, (2, 3, 21), layout=layout), backend, TOLERANCE)


@by_case
@by_backend
def test_same_bits_twice_and_alone(case, backend):
    """Run to run; and a sample's results whatever its neighbours."""
    given = arguments(case, (3, 7, 50))
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    args, kwargs = given
    *tensors, table, rows = args
    alone = ((*(t[1:2] for t in tensors), table, rows[1:2]), kwargs)
    for a, b in zip(run(case, alone, backend), run(case, given, backend), strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU's threads")
def test_threads_change_nothing():
    x = torch.randn(2000, 96).requires_grad_()
    table, rows = torch.randn(5, 2, 96).requires_grad_(), torch.randint(0, 5, (2000,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = pd.modulate(x, table, rows)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, table))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@by_backend
def test_nan_stays_in_its_token(backend):
    x, table = torch.randn(6, 40, device=DEVICE), torch.randn(2, 2, 40, device=DEVICE)
    rows = torch.tensor([0, 1, 0, 1, 0, 1], device=DEVICE)
    with pd.use_backend(backend):
        clean = pd.modulate(x, table, rows)
        x[2, 5], x[4, 39] = float("nan"), float("inf")
        y = pd.modulate(x, table, rows)
    assert y[2].isnan().all() and not y[4].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@by_backend
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_features_far_from_zero(backend, mean):
    """A spread of 1 about a large mean: the mean's own rounding is taken out again."""
    x = torch.randn(4, 1000, device=DEVICE) + mean
    table, rows = torch.zeros(1, 2, 1000, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pd.use_backend(backend):
        y = pd.modulate(x, table, rows)
    with pd.use_backend("reference"):
        assert relative_error(y, pd.modulate(x.double(), table.double(), rows)) < 1e-6


@by_backend
def test_one_rounding(backend):
    """bfloat16 features: the norm of r sees it before it is rounded."""
    r, b = (torch.randn(3, 100, device=DEVICE).bfloat16() for _ in range(2))
    table = torch.randn(1, 3, 100, device=DEVICE)
    rows = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)[:, 0]
    with pd.use_backend(backend):
        _, y = pd.gate_residual_modulate(r, b, table, rows)
    with pd.use_backend("reference"):
        _, expected = pd.gate_residual_modulate(r.double(), b.double(), table.double(), rows)
    assert (y != expected.bfloat16()).float().mean() < 0.02  # only where float32 meets a tie


@by_case
@by_backend
def test_out(case, backend):
    """out= holds the same bits, contiguous or not, and may be an input."""
    (first, *rest), kwargs = arguments(case, (2, 5, 30))
    expected = run(case, ((first, *rest), kwargs), backend)
    for make in (torch.empty_like, lambda t: torch.empty(2, 30, 5, device=DEVICE).to(t.dtype).mT):
        out = [make(t) for t in expected]
        given = out[0] if len(out) == 1 else tuple(out)
        found = run(case, ((first, *rest), {**kwargs, "out": given}), backend)
        assert all(f is o and torch.equal(o, e) for f, o, e in zip(found, out, expected, strict=True))
    own = first.clone()
    out = own if len(expected) == 1 else (own, torch.empty_like(own))
    found = run(case, ((own, *rest), {**kwargs, "out": out}), backend)
    assert found[0] is own and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


X, TABLE = torch.randn(2, 3, 8, device=DEVICE), torch.randn(4, 2, 8, device=DEVICE)
GATED, ROWS = torch.randn(4, 3, 8, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
TIMES = torch.rand(2, 3, device=DEVICE)
BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "no tensor": (lambda: pd.modulate(3.0, TABLE, ROWS), TypeError, ["modulate", "x", "float", "[..., D]"]),
    "integers": (lambda: pd.modulate(X.long(), TABLE, ROWS), TypeError, ["x", "int64", "bfloat16"]),
    "float64": (lambda: pd.modulate(X.double(), TABLE, ROWS), TypeError, ["float64", "use_backend"]),
    "table width": (lambda: pd.modulate(X, TABLE[..., :5], ROWS), ValueError, ["table", "(4, 2, 5)", "8"]),
    "table of gates": (lambda: pd.modulate(X, GATED, ROWS), ValueError, ["table", "[K, 2, D]"]),
    "table without gates": (
        lambda: pd.gate_residual_modulate(X, X, TABLE, ROWS), ValueError, ["table", "[K, 3, D]"],
    ),
    "branch shape": (
        lambda: pd.gate_residual_modulate(X, X[:1], GATED, ROWS), ValueError, ["branch", "(1, 3, 8)"],
    ),
    "branch dtype": (
        lambda: pd.gate_residual_modulate(X, X.half(), GATED, ROWS), TypeError, ["branch", "float16"],
    ),
    "rows dtype": (lambda: pd.modulate(X, TABLE, ROWS.float()), TypeError, ["rows", "float32", "int64"]),
    "rows list": (lambda: pd.modulate(X, TABLE, [0, 1]), TypeError, ["rows", "list"]),
    "rows shape": (lambda: pd.modulate(X, TABLE, ROWS[:, :2]), ValueError, ["rows", "(2, 2)", "(2, 3)"]),
    "weight": (lambda: pd.modulate(X, TABLE, ROWS, weight=X), ValueError, ["weight", "[D]", "8"]),
    "norm": (lambda: pd.modulate(X, TABLE, ROWS, norm="batch"), ValueError, ["norm", "'batch'", "'rms'"]),
    "eps": (lambda: pd.modulate(X, TABLE, ROWS, eps=-1.0), ValueError, ["eps", "-1.0"]),
    "device": (lambda: pd.modulate(X, TABLE.to("meta"), ROWS), ValueError, ["table", "meta"]),
    "out": (lambda: pd.modulate(X, TABLE, ROWS, out=X.half()), ValueError, ["out", "float16"]),
    "out and grad": (
        lambda: pd.modulate(X.clone().requires_grad_(), TABLE, ROWS, out=X), ValueError, ["no_grad"],
    ),
    "out of two": (
        lambda: pd.gate_residual_modulate(X, X, GATED, ROWS, out=X), TypeError, ["out", "pair"],
    ),
    "integer times": (lambda: pd.embed_t(ROWS, 8), TypeError, ["embed_t", "int64"]),
    "dim": (lambda: pd.embed_t(TIMES, 0), ValueError, ["dim", "1 or more"]),
    "max_distinct": (lambda: pd.embed_t(TIMES, 8, max_distinct=0), ValueError, ["max_distinct"]),
    "no cuda kernels": (lambda: forced("cuda"), (ValueError, RuntimeError), ["cuda"]),
}  # fmt: skip
if not GPU:
    BAD |= {
        "row too high": (lambda: pd.modulate(X, TABLE, ROWS + 4), ValueError, ["rows", "4", "0 to 3"]),
        "row below": (lambda: pd.modulate(X, TABLE, ROWS - 1), ValueError, ["rows", "-1", "0 to 3"]),
        "many times": (
            lambda: pd.embed_t(TIMES, 8, max_distinct=5), ValueError, ["6 distinct", "max_distinct = 5"],
        ),
    }  # fmt: skip


def forced(backend):
    with pd.use_backend(backend):
        return pd.modulate(X, TABLE, ROWS)


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    check_refused(*row)


@pytest.mark.skipif(GPU, reason="this run is for a GPU; it calls the CPU kernels")
def test_raw_ops_refuse_too():
    op, x = torch.ops.pydiffuse.modulate, X.reshape(6, 8)
    table, rows, y = TABLE, torch.zeros(6, dtype=torch.int32), torch.empty(6, 8)
    good = [y, None, x, None, table, rows, 1, 1e-6, False]
    op(*good)
    for i, wrong in {
        0: torch.empty(6, 9), 2: x[:5], 4: table[:, :1], 5: rows + 4, 6: 7, 3: x,
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError):
            op(*good[:i], wrong, *good[i + 1 :])
    for wrong in (rows - 1, rows.long(), rows[:5]):
        with pytest.raises(RuntimeError):
            op(*good[:5], wrong, *good[6:])


def test_a_backend_that_an_op_lacks(monkeypatch):
    monkeypatch.setattr(dispatch, "_default", "cuda")
    with pytest.raises(ValueError, match=r"modulate.*'cuda'.*triton"):
        pd.modulate(X, TABLE, ROWS)


def test_on_a_gpu_triton_serves_ops_without_cuda_kernels(monkeypatch):
    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(dispatch, "built_cuda", True)
    monkeypatch.setattr(dispatch, "_missing", lambda backend: None)
    assert dispatch.ops_for("modulate", OnGpu()) is torch.ops.pydiffuse_triton
    assert dispatch.ops_for("tcfg", OnGpu()) is torch.ops.pydiffuse


def test_embedding_of_distinct_times():
    """Each t's row of the table is its embedding; the table is as long as it was told to be."""
    t = torch.tensor([[0.5, 0.25, 0.5], [1.0, 0.25, 0.125]], device=DEVICE)
    table, rows = pd.embed_t(t, 10, scale=1000.0, max_distinct=6)
    assert table.shape == (6, 10) and rows.tolist() == [[2, 1, 2], [3, 1, 0]]
    frequency = torch.exp(-math.log(10000.0) * torch.arange(5, dtype=torch.float64) / 5).to(DEVICE)
    angle = 1000 * t.double()[..., None] * frequency
    expected = torch.cat([angle.cos(), angle.sin()], -1)
    torch.testing.assert_close(table[rows], expected.float(), rtol=0, atol=1e-6)
    assert torch.equal(table[4:], table[3:4].expand(2, -1))
    assert pd.embed_t(t, 10)[0].shape == (6, 10)
    table, rows = pd.embed_t(t[:0], 7, max_distinct=2)
    assert table.shape == (2, 7) and rows.shape == (0, 3)
    odd = pd.embed_t(t, 7)[0]
    assert not odd[:, -1].any()


def test_from_times_to_tokens():
    """The way of a transformer: t per token, its embedding, a layer, the table, the modulation."""
    t = torch.rand(2, 1, device=DEVICE).expand(2, 12)
    x, layer = torch.randn(2, 12, 16, device=DEVICE), torch.nn.Linear(8, 32).to(DEVICE)
    table, rows = pd.embed_t(t, 8, max_distinct=2)
    y = pd.modulate(x, layer(table).unflatten(-1, (2, 16)), rows)
    shift, scale = layer(table[rows]).unflatten(-1, (2, 16)).unbind(-2)
    expected = torch.nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("case", KERNELS[1:5:3], ids=lambda case: case.id)
def test_compile_fullgraph(case):
    check_compiled(case, arguments(case, (2, 5, 24)), None)


def test_compile_with_inductor():
    """Embedding and modulation in one graph, with out= and shapes that change."""
    torch._dynamo.reset()

    def step(x, t, w, out):
        table, rows = pd.embed_t(t, 8, max_distinct=4)
        y = pd.modulate(x.sin(), (table @ w).unflatten(-1, (2, 12)), rows)
        return pd.modulate(y, torch.zeros_like(y[0, :1]).expand(2, -1)[None], rows * 0, out=out) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (5, 9):
        x, t = torch.randn(2, n, 12, device=DEVICE), torch.rand(2, 1, device=DEVICE).expand(2, n)
        given = (x, t, torch.randn(8, 24, device=DEVICE))
        torch.testing.assert_close(
            compiled(*given, torch.empty_like(x)), step(*given, torch.empty_like(x))
        )


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, b, table, rows):
            return pd.gate_residual_modulate(x, b, table, rows)

    given = (X, X + 1, GATED, ROWS)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch}, None, {0: batch})
    program = torch.export.export(Block(), given, dynamic_shapes=shapes, strict=False)
    other = tuple(t.repeat(2, 1, 1) if t.dim() == 3 and t is not GATED else t for t in given[:3])
    other = (*other, ROWS.repeat(2, 1))
    torch.testing.assert_close(program.module()(*other), Block()(*other))


def test_opcheck():
    ops, rows = torch.ops.pydiffuse, torch.tensor([0, 1, 3, 1, 0], dtype=torch.int32, device=DEVICE)
    x = [torch.randn(5, 8, device=DEVICE) for _ in range(6)]
    rest = (GATED, rows, 1, 1e-6, False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if GPU:
        ops = torch.ops.pydiffuse_triton
    for op, args in {
        ops.modulate.default: (x[0], x[1], x[2], x[3], *rest),
        ops.modulate_backward.default: (x[0], x[1], GATED.clone(), x[2], x[3], x[4], x[5], *rest),
    }.items():
        torch.library.opcheck(op, args, test_utils=tests)


@by_case
def test_gradcheck_of_the_reference(case):
    args, kwargs = arguments(case, (2, 5), torch.float64)
    given = doubled((args, kwargs))
    tensors = [t.requires_grad_() for t in leaves(given) if t.is_floating_point()]

    def function(*tensors):
        rest = iter(tensors)
        real = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()  # noqa: E731
        return tuple(run(case, tree_map(lambda t: next(rest) if real(t) else t, given), "reference"))

    assert gradcheck(function, tensors, atol=1e-5, rtol=1e-4)


@by_case
def test_func_grad_and_vmap(case):
    """torch.func.grad equals autograd; vmap equals a loop, over tokens, tables and rows."""
    given = arguments(case, (2, 5, 12))
    tensors = leaves(given)
    real = [i for i, t in enumerate(tensors) if t.is_floating_point()]

    def total(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, given)
        return sum(r.square().sum() for r in run(case, args, None))

    inputs = [t.clone().requires_grad_(i in real) for i, t in enumerate(tensors)]
    expected = torch.autograd.grad(total(*inputs), [inputs[i] for i in real])
    found = torch.func.grad(total, tuple(real))(*tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

    everything = tuple(0 for _ in tensors)
    only_tokens = tuple(0 if t.shape == (2, 5, 12) else None for t in tensors)
    only_tables = tuple(0 if t.dim() == 3 and t.shape[1] in (2, 3) else None for t in tensors)
    for dims in (everything, only_tokens, only_tables):
        stacked = [
            t if d is None else torch.stack([t, t.flip(0) if i not in real else 0.5 * t])
            for i, (t, d) in enumerate(zip(tensors, dims, strict=True))
        ]
        slopes = torch.func.vmap(torch.func.grad(total, tuple(real)), in_dims=dims)(*stacked)
        for v in range(2):
            one = [t if d is None else t[v] for t, d in zip(stacked, dims, strict=True)]
            for a, b in zip(slopes, torch.func.grad(total, tuple(real))(*one), strict=True):
                torch.testing.assert_close(a[v], b, rtol=1e-4, atol=1e-4)


def test_second_derivative_is_refused():
    x = X.clone().requires_grad_()
    g = torch.autograd.grad(pd.modulate(x, TABLE, ROWS).square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"modulate.*use_backend"):
        torch.autograd.grad(g.sum(), x)


def test_autocast_and_inference_mode():
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.inference_mode():
        assert pd.modulate(X, TABLE, ROWS).dtype == torch.float32
        assert pd.modulate(X.bfloat16(), TABLE, ROWS).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [-7, 4, 2**31 - 1])
def test_rows_that_nobody_checked(wrong):
    """On a GPU rows are not looked at beforehand; the kernels read nothing outside the table."""
    ops, x = torch.ops.pydiffuse_triton, X.reshape(6, 8)
    rows = torch.tensor([0, wrong, 3, 1, 2, wrong], dtype=torch.int32, device=DEVICE)

    def results(rows):
        y, dx, dtable = torch.empty_like(x), torch.empty_like(x), torch.empty_like(TABLE)
        rest = (x, None, TABLE, rows, 1, 1e-6, False)
        ops.modulate(y, None, *rest)
        ops.modulate_backward(dx, None, dtable, y, None, *rest)
        return y, dx, dtable

    for a, b in zip(results(rows), results(rows.clamp(0, 3)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not GPU, reason="this machine has no GPU")
@by_case
def test_graph_capture_without_sync(case):
    """A captured call, with its backward, replays on new data; capture itself refuses host syncs."""
    given = arguments(case, (2, 40, 64))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        values_and_gradients(case, given, "triton")
    torch.cuda.synchronize()
    real = [t for t in leaves(given) if t.is_floating_point()]
    inputs = [t.requires_grad_() for t in real]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, given, "triton")
        slopes = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])
    with torch.no_grad():
        for t in inputs:
            t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    again = run(case, given, "triton")
    expected = torch.autograd.grad(again, inputs, [torch.ones_like(r) for r in again])
    for a, b in zip((*results, *slopes), (*again, *expected), strict=True):
        assert torch.equal(a, b)
