"""What torch does to the scans: compile, export, opcheck, gradcheck, func transforms, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map

import pydiffuse
from pydiffuse._core import dispatch
from pydiffuse.paths import zigzag
from tests.cases.conv import CASES as CONV_CASES
from tests.cases.scan import CASES, ScanMaker, Size
from tests.helpers import (
    DEVICE,
    GPU,
    check_compiled,
    leaves,
    run,
)

BACKEND = "cuda" if GPU else "cpu"
SIZE = Size(2, 6, 9, 4)
ALL = [*CASES, *CONV_CASES]
by_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)


@by_case
def test_compile_fullgraph(case):
    """Values and gradients of the compiled function, in one graph."""
    check_compiled(case, case.make(ScanMaker(SIZE, device=DEVICE)), BACKEND)


def test_compile_with_inductor():
    """Between other work, for lengths that change."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(u, delta, A, B, C):
        return pydiffuse.selective_scan(u.sin(), delta, A, B, C, layout="bld") * 2

    for L in (12, 20):
        t = ScanMaker(Size(2, 6, L, 4), device=DEVICE, layout="bld")
        args = t.tokens(), t.delta(), t.A(), t.weights(), t.weights()
        expected = pydiffuse.selective_scan(args[0].sin(), *args[1:], layout="bld") * 2
        torch.testing.assert_close(layer(*args), expected)


def test_export():
    path = zigzag((3, 3), 2)

    class Layer(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            x = pydiffuse.causal_conv1d(u, A, path=path)
            return pydiffuse.selective_scan(x, delta, A, B, C, path=path, delta_softplus=True)

    def given(batch):
        t = ScanMaker(Size(batch, 6, 9, 4), device=DEVICE)
        return t.tokens(), t.delta(), t.A(), t.weights(), t.weights()

    dim = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: dim}, {0: dim}, None, {0: dim}, {0: dim})
    program = torch.export.export(Layer(), given(2), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(program.module()(*given(5)), Layer()(*given(5)))
    torch.testing.assert_close(program.run_decompositions().module()(*given(5)), Layer()(*given(5)))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck():
    ops = torch.ops.pydiffuse
    B, D, L, N = 2, 6, 70, 4

    def new(*shape):
        return torch.randn(shape, device=DEVICE)

    u, z, out, dout = (new(B, L, D) for _ in range(4))
    delta, A, w = new(B, 1, L, D).abs(), -new(1, D, N).exp(), new(B, 1, 1, L, N)
    D_, state, chunks = new(1, D), new(B, 1, 1, D, N), new(B, 1, 2, D, N)
    order = torch.randperm(L, dtype=torch.int32, device=DEVICE)[None]
    offsets = torch.tensor([0, L], dtype=torch.int32, device=DEVICE)
    inputs = (u, delta, A, w, new(B, 1, 1, L, N), D_, z, new(1, D), state, order, offsets, True)
    like = [torch.empty_like(t) for t in (u, delta, A, w, w, D_, z, D_, state)]
    weight, bias = new(D, 4), new(D)
    conv = (u, weight, bias, order[0], offsets, True)
    grads = [torch.empty_like(t) for t in (u, weight, bias)]
    row = [new(B, D) for _ in range(2)]
    calls = {
        ops.selective_scan.default: (out, torch.empty_like(state), chunks, *inputs),
        ops.selective_scan_backward.default: (*like, dout, state.clone(), chunks, *inputs),
        ops.selective_state_update.default: (
            row[0], state[:, 0, 0].contiguous(), row[1], row[1].abs(), A[0], new(B, 1, N), new(B, 1, N),
            D_[0], row[1], D_[0], True,
        ),
        ops.causal_conv1d.default: (out, *conv),
        ops.causal_conv1d_backward.default: (*grads, dout, *conv),
    }  # fmt: skip
    mine = {name for name, stem in dispatch.STEMS.items() if stem in ("scan", "conv")}
    assert {op.name().split("::")[1] for op in calls} == mine
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils=CHECKS)


@by_case
def test_gradcheck_of_the_reference(case):
    """The oracle's own gradients, by finite differences in float64."""
    args, kwargs = tree_map(
        lambda t: t.double().requires_grad_() if isinstance(t, torch.Tensor) else t,
        case.make(ScanMaker(Size(1, 3, 4, 2))),
    )
    inputs = leaves((args, kwargs))

    def function(*tensors):
        rest = iter(tensors)
        given = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, (args, kwargs))
        return tuple(run(case, given, "reference"))

    assert gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


@by_case
def test_func_grad_and_vmap(case):
    """torch.func.grad equals autograd; vmap equals a loop, whatever is mapped."""
    given = case.make(ScanMaker(SIZE, device=DEVICE))
    tensors = leaves(given)

    def total(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, given)
        return sum(r.double().square().sum() for r in run(case, args, BACKEND))

    expected = torch.autograd.grad(total(*[t.requires_grad_() for t in tensors]), tensors)
    slopes = torch.func.grad(total, tuple(range(len(tensors))))(*tensors)
    for a, b in zip(slopes, expected, strict=True):
        torch.testing.assert_close(a, b)
    every = [torch.stack([t.detach(), 0.5 * t.detach()]) for t in tensors]
    first = [every[0], *[t.detach() for t in tensors[1:]]]
    for stacked, dims in ((every, 0), (first, (0, *[None] * (len(tensors) - 1)))):
        one = [[s[i] if s is e else s for s, e in zip(stacked, every)] for i in range(2)]
        torch.testing.assert_close(
            torch.func.vmap(total, dims)(*stacked), torch.stack([total(*x) for x in one])
        )
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(total), dims)(*stacked),
            torch.stack([torch.func.grad(total)(*x) for x in one]),
            rtol=1e-4,
            atol=1e-4,
        )


def test_second_derivatives_are_refused():
    t = ScanMaker(SIZE, device=DEVICE)
    u = t.tokens().requires_grad_()
    for y in (
        pydiffuse.selective_scan(u, t.delta(), t.A(), t.weights(), t.weights(), z=t.tokens()),
        pydiffuse.causal_conv1d(u, t.matrix(6, 4)),
    ):
        g = torch.autograd.grad(y.square().sum(), u, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="use_backend"):
            torch.autograd.grad(g.sum(), u)


def test_autocast():
    """Under autocast the projections are bfloat16, the scan takes them as they are."""
    t = ScanMaker(SIZE, device=DEVICE)
    (xz, *rest), kwargs = next(c for c in CASES if c.op == "zigzag_mamba_inner").make(t)
    plain = pydiffuse.zigzag_mamba_inner(xz, *rest, **kwargs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = pydiffuse.zigzag_mamba_inner(xz, *rest, **kwargs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)
