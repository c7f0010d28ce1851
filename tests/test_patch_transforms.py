"""What torch does to a patch op: compile, export, opcheck, gradcheck, func transforms."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_map

import pydiffuse as pd
from pydiffuse._core import dispatch
from pydiffuse._core.grids import RESIDUAL
from tests.cases.patch import CASES, DIFFERENTIABLE, MIXES, Maker, takes_gradient, with_gradients
from tests.helpers import DEVICE, GPU, leaves, relative_error, run
from tests.test_patch import values_and_gradients

BACKEND = "triton" if GPU else "cpu"
SHAPE = (2, 3, 4, 6)
by_case = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)
COMPILED = [
    case
    for case in CASES
    if case.id
    in {
        "noise_patches-vp", "patch_step-guided", "patch_step-scale_per_sample", "patch_step-ancestral",
        "patch_step-multistep", "convert-v_to_flow", "patch_loss-difficulty",
    }
]  # fmt: skip


def arguments(case, dtype=torch.float32):
    return case.make(Maker(SHAPE, 2, dtype, DEVICE))


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)
def test_compile_fullgraph(case):
    """Values and gradients of the compiled function, in one graph."""
    given = arguments(case)
    expected, slopes = values_and_gradients(case, given, BACKEND)
    torch._dynamo.reset()
    op = getattr(pd, case.op)
    compiled = torch.compile(
        lambda args, kwargs: op(*args, **kwargs), fullgraph=True, backend="aot_eager"
    )
    copies = with_gradients(case, given)
    results = leaves(compiled(*copies))
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) * r.double()).sum()
        for r in results
    )
    inputs = [t for t in leaves(copies) if t.requires_grad]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    for t, a, b in zip(inputs, found, slopes, strict=True):
        torch.testing.assert_close(torch.zeros_like(t) if a is None else a, b)


def test_compile_with_inductor():
    """A sampler's step around other work, in inference, with shapes that change."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, v, t, to):
        y, t = pd.patch_step(x, v.sin(), t, to, 2, method="ddim", path="vp")
        return y * 2, pd.next_t(t, dt=0.1)

    for h in (4, 6):
        m = Maker((2, 3, h, 8), 2, device=DEVICE)
        x, v, t, to = m.image(), m.image(), m.level(), m.level()
        expected = pd.patch_step(x, v.sin(), t, to, 2, method="ddim", path="vp")
        y, after = step(x, v, t, to)
        torch.testing.assert_close(y, 2 * expected[0])
        torch.testing.assert_close(after, (expected[1] + 0.1).clamp(max=1))


def test_compiled_selection():
    torch._dynamo.reset()
    score = torch.rand(3, 20, device=DEVICE)

    def selections(s):
        levels = pd.dual_loop_t(s, 5, 0.5 * s, dt=0.2, steps=3)
        return *pd.select_patches(s * 1, 5), pd.select_patches(s, 5, as_mask=True), levels

    found = torch.compile(selections, fullgraph=True)(score)
    for a, b in zip(found, selections(score), strict=True):
        assert torch.equal(a, b)


def test_compiled_with_out():
    """Memory that is given is written by the one graph."""
    torch._dynamo.reset()
    m = Maker(SHAPE, 2, device=DEVICE)
    x1, noise, t = m.image(), m.image(), m.level()
    pair = (torch.empty_like(x1), torch.empty_like(x1))
    noisy = torch.compile(
        lambda *given: pd.noise_patches(*given[:2], 2, noise=given[2], out=given[3:]), fullgraph=True
    )
    found = noisy(x1, t, noise, *pair)
    for a, b, c in zip(found, pair, pd.noise_patches(x1, t, 2, noise=noise), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, x, v, t, to):
            return pd.patch_step(x, v, t, to, 2)

    def given(batch):
        m = Maker((batch, 3, 4, 6), 2, device=DEVICE)
        return m.image(), m.image(), m.level(), m.level()

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Step(), given(2), dynamic_shapes=({0: batch},) * 4, strict=False)
    for a, b in zip(program.module()(*given(5)), Step()(*given(5)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    ops = torch.ops.pydiffuse_triton if GPU else torch.ops.pydiffuse
    m = Maker(SHAPE, 2, device=DEVICE)
    images, tables = [m.image() for _ in range(5)], [m.level() for _ in range(4)]
    grid = [3, 1, 4, 6, 1, 2, 2]
    sums, errors = torch.zeros(2, dtype=torch.float64, device=DEVICE), m.table().double()
    ids, rest = (torch.zeros(2, n, dtype=torch.int64, device=DEVICE) for n in (2, 4))
    rule = [3, 0, 0, 0, 3, 15]
    step = (*tables[:3], m.mask(), m.per_sample(1, 2), grid)
    mix, loss = ops.mix_patches.default, ops.patch_loss.default
    calls = [
        (mix, (images[:2], tables[3], [m.image() for _ in range(4)], *step, rule, 1.0, 1.0, False)),
        (mix, (images[:4], None, [m.image() for _ in range(2)], *step, [3, 0, 0, 0, 15, 3], 1.0, 1.0, True)),
        (mix, ([m.image()], None, images[:2], *tables[:2], None, None, None, grid,
               [RESIDUAL, 0, 0, 0, 1, 17], 1.0, 1.0, False)),
        (loss, (sums, errors, *images[:2], *tables[:2], 0.01, grid)),
        (ops.select_patches.default, (ids, rest, m.mask(), None, m.table(), 2, None, None, 0.0)),
        (ops.select_patches.default, (None, None, None, m.table().expand(3, -1, -1).contiguous(),
                                     m.table(), 2, *tables[:2], 0.0)),
    ]  # fmt: skip
    assert {op.name().split("::")[1] for op, _ in calls} == {
        name for name, stem in dispatch.STEMS.items() if stem == "patch"
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=checks)


@by_case
def test_gradcheck_of_the_reference(case):
    """The oracle's own gradients, by finite differences in float64."""
    given = arguments(case, torch.float64)
    if case.name == "difficulty":  # the stopped gradient is no derivative
        given = (given[0], {**given[1], "nll": 0.0})
    given = with_gradients(case, tree_map(lambda t: t.double() if _floats(t) else t, given))
    inputs = [t for t in leaves(given) if t.requires_grad]

    def function(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if _floats(t) and t.requires_grad else t, given)
        return tuple(run(case, args, "reference"))

    assert gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


def _floats(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


@pytest.mark.parametrize("case", MIXES, ids=lambda case: case.id)
def test_second_derivatives(case):
    """Linear ops differentiate to any order: the gradient's gradient is the op."""
    given = with_gradients(case, arguments(case))
    inputs = [t for t in leaves(given) if t.requires_grad]
    results = [r for r in run(case, given, BACKEND) if r.requires_grad]
    ys = [torch.randn_like(r, requires_grad=True) for r in results]
    firsts = torch.autograd.grad(results, inputs, ys, create_graph=True)
    again = torch.autograd.grad(sum((g * t.detach()).sum() for g, t in zip(firsts, inputs)), ys)
    for a, b in zip(again, results, strict=True):
        assert relative_error(a, b) < 1e-6


def test_the_loss_differentiates_once():
    p, u = (torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    (dp,) = torch.autograd.grad(pd.patch_loss(p, u, None, None, 2), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="use_backend"):
        torch.autograd.grad(dp.sum(), p)


@by_case
def test_func_grad_and_vmap(case):
    """torch.func.grad equals autograd; vmap equals a loop, for values and for gradients."""
    given = arguments(case)
    tensors = leaves(given)
    wanted = tuple(i for i, t in enumerate(tensors) if takes_gradient(case, t))

    def total(*tensors):
        rest = iter(tensors)
        args = tree_map(lambda t: next(rest) if isinstance(t, torch.Tensor) else t, given)
        return sum(r.double().square().sum() for r in run(case, args, BACKEND))

    copies = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    expected = torch.autograd.grad(total(*copies), [copies[i] for i in wanted])
    for a, b in zip(torch.func.grad(total, wanted)(*tensors), expected, strict=True):
        torch.testing.assert_close(a, b)

    stacked = [torch.stack([t, 0.5 * t if t.is_floating_point() else ~t]) for t in tensors]
    mapped = torch.func.vmap(total)(*stacked)
    looped = torch.stack([total(*[s[i] for s in stacked]) for i in range(2)])
    torch.testing.assert_close(mapped, looped)
    mapped = torch.func.vmap(torch.func.grad(total, wanted))(*stacked)
    for i in range(2):
        found = torch.func.grad(total, wanted)(*[s[i] for s in stacked])
        for a, b in zip(mapped, found, strict=True):
            torch.testing.assert_close(a[i], b)


def test_autocast_and_inference_mode():
    """Ops keep the dtype they are given; a float32 state goes with bfloat16 predictions."""
    x, v = torch.randn(2, 3, 4, 4, device=DEVICE), torch.randn(2, 3, 4, 4, device=DEVICE).bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.inference_mode():
        assert pd.patch_step(x, v, 0.2, 0.3, 2)[0].dtype == torch.float32
        assert pd.convert(x, v, 0.2, "v", "flow").dtype == torch.bfloat16
        assert pd.patch_loss(v, x).dtype == torch.float32
