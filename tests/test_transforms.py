"""What torch does to an op: compile, export, opcheck, gradcheck, func transforms, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map

import pydiffuse
from pydiffuse._core import dispatch
from tests.cases.guidance import CASES, Maker
from tests.helpers import (
    DEVICE,
    GPU,
    arguments,
    check_compiled,
    leaves,
    relative_error,
    run,
)

BACKEND = "cuda" if GPU else "cpu"
SHAPE = (3, 4, 5, 7)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
# One case per op and kind of argument: each compiles a graph.
COMPILED = [
    case
    for case in CASES
    if case.id
    in {
        "cfg-number", "tcfg-number", "tcfg-rescaled_per_sample", "tcfg-many", "cfg_zero-per_sample",
        "apg-momentum", "magnitude_aware-alpha", "perp_neg-two", "compose-and_not", "slerp-per_sample",
        "rescale-number", "gram-two", "combine-two", "superpose-and", "guide-multistep", "guide-momentum",
    }
]  # fmt: skip


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)
def test_compile_fullgraph(case):
    """Values and gradients of the compiled function, in one graph."""
    check_compiled(case, arguments(case, SHAPE, torch.float32), BACKEND)


def test_compile_with_inductor():
    """Around other work, in inference, with out=, and with shapes that change."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(c, u, x, w):
        g = pydiffuse.tcfg(c.sin(), u, w, rescale=0.5)
        return pydiffuse.guide([c, u], "cfg", scale=w, x=x + g, b=0.1) * 2

    for n in (33, 50):
        c, u, x = (torch.randn(2, n, device=DEVICE) for _ in range(3))
        g = pydiffuse.tcfg(c.sin(), u, 3.0, rescale=0.5)
        expected = pydiffuse.guide([c, u], "cfg", scale=3.0, x=x + g, b=0.1) * 2
        torch.testing.assert_close(step(c, u, x, 3.0), expected)


def test_compiled_out():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def into(c, u, out):
        pydiffuse.tcfg(c, u, 3.0, out=out)
        return out + 1

    c, u, out = (torch.randn(2, 30, device=DEVICE) for _ in range(3))
    expected = pydiffuse.tcfg(c, u, 3.0)
    torch.testing.assert_close(into(c, u, out), expected + 1)
    torch.testing.assert_close(out, expected)


def test_export():
    class Sampler(torch.nn.Module):
        def forward(self, c, u, x):
            return pydiffuse.guide([c, u], "tcfg", scale=7.5, x=x, b=0.02)

    given = tuple(torch.randn(2, 4, 6, device=DEVICE) for _ in range(3))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Sampler(), given, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False
    )
    other = tuple(torch.randn(5, 4, 6, device=DEVICE) for _ in range(3))
    torch.testing.assert_close(program.module()(*other), Sampler()(*other))
    torch.testing.assert_close(program.run_decompositions().module()(*other), Sampler()(*other))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck():
    ops = torch.ops.pydiffuse
    p = [torch.randn(3, 20, device=DEVICE) for _ in range(3)]
    x, out = (torch.randn(3, 20, device=DEVICE) for _ in range(2))
    params = [0.9, 0.1, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 7.5]
    varied = torch.rand(3, 1, dtype=torch.float64, device=DEVICE)
    G, sums = varied.new_empty(3, 3, 3), varied.new_empty(3, 3)
    calls = {
        ops.guide.default: ([out], p[:2], x, None, None, 2, params, True, varied, [8], 1),
        ops.guide_backward.default: (p[:2], varied.clone(), out, [x, p[2]], 2, params, True, varied, [8]),
        ops.mix.default: ([out], p, torch.rand(3, 1, 3, dtype=torch.float64, device=DEVICE), None),
        ops.gram.default: (G, sums, p),
    }
    assert {op.name().split("::")[1] for op in calls} == {
        name for name, stem in dispatch.STEMS.items() if stem == "guidance"
    }
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils=CHECKS)


@by_case
def test_gradcheck_of_the_reference(case):
    """The oracle's own gradients, by finite differences in float64."""
    maker = Maker((2, 6), torch.float64)
    args, kwargs = tree_map(
        lambda t: t.double().requires_grad_() if isinstance(t, torch.Tensor) else t, case.make(maker)
    )
    inputs = leaves((args, kwargs))

    def function(*tensors):
        rest = iter(tensors)
        given = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, (args, kwargs))
        return tuple(run(case, given, "reference"))

    assert gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


def test_second_derivatives():
    """gram and combine differentiate twice, guide says that it does not."""
    given = [torch.randn(2, 5, device=DEVICE) for _ in range(3)] + [torch.randn(2, 3, device=DEVICE)]

    def hessian_times(tensors, v):
        tensors = [t.clone().requires_grad_() for t in tensors]
        *preds, coefficients = tensors
        weights = coefficients + pydiffuse.gram(preds)[:, 0].to(coefficients.dtype)
        loss = pydiffuse.combine(preds, weights).square().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, v, strict=True)), tensors)

    v = [torch.randn_like(t) for t in given]
    found = hessian_times(given, v)
    with pydiffuse.use_backend("reference"):
        expected = hessian_times([t.double() for t in given], [t.double() for t in v])
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5
    p = [t.requires_grad_() for t in given[:2]]
    g = torch.autograd.grad(pydiffuse.tcfg(*p, 3.0).sum(), p[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="use_backend"):
        torch.autograd.grad(g.sum(), p[0])


@by_case
def test_func_grad_and_vmap(case):
    """torch.func.grad equals autograd; vmap equals a loop, for values and for gradients."""
    given = arguments(case, SHAPE, torch.float32)
    tensors = leaves(given)

    def total(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, given)
        return sum(r.double().square().sum() for r in run(case, args, BACKEND))

    expected = torch.autograd.grad(
        total(*[t.requires_grad_() for t in tensors]), tensors, allow_unused=True
    )
    everything = tuple(range(len(tensors)))
    slopes = torch.func.grad(total, everything)(*tensors)
    for t, a, b in zip(tensors, slopes, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(t) if b is None else b)

    stacked = [torch.stack([t.detach(), 0.5 * t.detach()]) for t in tensors]
    mapped = torch.func.vmap(total)(*stacked)
    looped = torch.stack([total(*[s[i] for s in stacked]) for i in range(2)])
    torch.testing.assert_close(mapped, looped)
    mapped = torch.func.vmap(torch.func.grad(total))(*stacked)
    looped = torch.stack([torch.func.grad(total)(*[s[i] for s in stacked]) for i in range(2)])
    torch.testing.assert_close(mapped, looped, rtol=1e-4, atol=1e-4)


def test_autocast():
    """Ops keep the dtype they are given; a float32 latent goes with bfloat16 predictions."""
    c, u = (torch.randn(2, 30, device=DEVICE).bfloat16() for _ in range(2))
    x = torch.randn(2, 30, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert pydiffuse.tcfg(c, u, 3.0).dtype == torch.bfloat16
        assert pydiffuse.guide([c, u], "tcfg", scale=3.0, x=x).dtype == torch.float32


def test_inference_mode():
    with torch.inference_mode():
        c, u = (torch.randn(2, 30, device=DEVICE) for _ in range(2))
        assert pydiffuse.tcfg(c, u, 3.0).isfinite().all()
