"""What torch does to tile attention: compile, export, opcheck, gradcheck, func transforms, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import pydiffuse as pd
from pydiffuse import plans
from pydiffuse._core import dispatch
from tests.cases.attention import CASES, Maker, Size, ragged
from tests.helpers import DEVICE, GPU, check_compiled, leaves, run

BACKEND = "triton" if GPU else "cpu"
SIZE = Size(2, 4, 2, 16)
SMALL = [case for case in CASES if case.name != "blocks"]
by_case = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
PLAN = plans.frames(3, 5, 1)


def arguments(case, dtype=torch.float32, size=SIZE):
    return case.make(Maker(size, dtype, DEVICE))


def heads(batch=2, H=4):
    return tuple(torch.randn(batch, n, PLAN.q_length, 16, device=DEVICE) for n in (H, 2, 2))


@by_case
def test_compile_fullgraph(case):
    """Values and gradients of the compiled function, in one graph; the plan is a constant of it."""
    (q, k, v, plan), kwargs = arguments(case)
    scale = kwargs.pop("scale", None)
    if isinstance(scale, torch.Tensor):  # it takes no gradient, which the helper would ask for
        scale = 0.2
    check_compiled(case, ((q, k, v), {**kwargs, "plan": plan, "scale": scale}), BACKEND)


def test_compile_with_inductor():
    """Between other work, for batches that change."""
    torch._dynamo.reset()
    scale = torch.rand(4, device=DEVICE)

    def layer(q, k, v):
        return pd.tile_attention(q.sin(), k, v, PLAN, scale=scale) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        given = heads(batch)
        torch.testing.assert_close(compiled(*given), layer(*given))


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return pd.tile_attention(q, k, v, PLAN, return_lse=True)

    dim = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Layer(), heads(), dynamic_shapes=({0: dim},) * 3, strict=False)
    given = heads(5)
    for a, b in zip(program.module()(*given), Layer()(*given), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    ops = torch.ops.pydiffuse_triton if GPU else torch.ops.pydiffuse
    (q, k, v), lse = heads(), torch.randn(2, 4, PLAN.q_length, device=DEVICE)
    rest = (torch.rand(4, device=DEVICE), 1.0, *PLAN.to(DEVICE).tensors)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    calls = {
        ops.tile_attention.default: (q.clone(), lse.clone(), q, k, v, *rest),
        ops.tile_attention_backward.default: (*grads, q, lse.clone(), q.clone(), lse, q, k, v, *rest),
    }
    mine = {name for name, stem in dispatch.STEMS.items() if stem == "attention"}
    assert {op.name().split("::")[1] for op in calls} == mine
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils=checks)


@by_case
def test_gradcheck_of_the_reference(case):
    """The oracle's own gradients, by finite differences in float64; where nothing is seen lse has none."""
    (q, k, v, plan), kwargs = arguments(case, torch.float64, Size(1, 2, 1, 8))
    if plan.heads > 1:
        plan, kwargs["scale"] = ragged(2), kwargs["scale"][:2]
    seen = plan.to_dense().any(-1).to(DEVICE)

    def function(*tensors):
        out, *lse = run(case, ((*tensors, plan), kwargs), "reference")
        return out, *(t.where(seen, 0.0) for t in lse)

    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    assert gradcheck(function, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


@by_case
def test_func_grad_and_vmap(case):
    """torch.func.grad equals autograd; vmap equals a loop, over all tensors or over one."""
    (q, k, v, plan), kwargs = arguments(case)

    def total(*tensors):
        results = run(case, ((*tensors, plan), kwargs), BACKEND)
        return sum(r.masked_fill(r.isneginf(), 0).double().square().sum() for r in results)

    every = (0, 1, 2)
    expected = torch.autograd.grad(total(*(t.requires_grad_() for t in (q, k, v))), (q, k, v))
    q, k, v = (t.detach() for t in (q, k, v))
    for a, b in zip(torch.func.grad(total, every)(q, k, v), expected, strict=True):
        torch.testing.assert_close(a, b)
    pairs = [torch.stack([t, 0.5 * t]) for t in (q, k, v)]
    for given, dims in ((pairs, 0), ([pairs[0], k, v], (0, None, None))):
        one = [[t[i] if t.dim() == 5 else t for t in given] for i in range(2)]
        mapped = torch.func.vmap(total, dims)(*given)
        torch.testing.assert_close(mapped, torch.stack([total(*x) for x in one]))
        slopes = torch.func.vmap(torch.func.grad(total, every), dims)(*given)
        for i in range(2):
            for a, b in zip(slopes, torch.func.grad(total, every)(*one[i]), strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)


def test_vmap_over_scale():
    """Call by call."""
    q, k, v = heads()
    scales = torch.rand(2, 4, device=DEVICE)
    mapped = torch.func.vmap(lambda s: pd.tile_attention(q, k, v, PLAN, scale=s))(scales)
    looped = torch.stack([pd.tile_attention(q, k, v, PLAN, scale=s) for s in scales])
    torch.testing.assert_close(mapped, looped)


def test_autocast_and_inference_mode():
    """The dtype is autocast's, as scaled_dot_product_attention has it; gradients have the arguments'."""
    q, k, v = heads()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.inference_mode():
        out, lse = pd.tile_attention(q, k, v.bfloat16(), PLAN, return_lse=True)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    q.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (dq,) = torch.autograd.grad(pd.tile_attention(q, k, v, PLAN).sum(), q)
    assert dq.dtype == torch.float32 and dq.isfinite().all()


def test_a_plan_moves_once():
    """The tensors of a plan on a device are made once, and belong to one plan."""
    assert PLAN.to(DEVICE) is PLAN.to(DEVICE) and PLAN.to(DEVICE) == PLAN
    assert all(t.device.type == DEVICE for t in leaves([*PLAN.to(DEVICE).tensors]))
