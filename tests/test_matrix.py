"""Every op of the table within every transform of torch: torch.compile with and without gradients, at a second
size; vmap, compiled, too; jacrev at one sample; export with a batch of any size, and the gradients of what it
gives; jit.trace; make_fx; autocast; fake tensors; ids that nobody can look at beforehand.

The calls are the cases of the table: all of them where a transform is quick, of every op the first where it
compiles, one with many tensors where gradients do, too.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import pydiffuse as pd
from tests.helpers import GPU, leaves
from tests.launched import STEMS
from tests.table import Case

pytestmark = pytest.mark.skipif(GPU, reason="the same on every device")

NO_GRADIENT = {
    "selective_state_update", "select_patches", "dual_loop_t", "next_t", "sample_t", "embed_t", "route", "channel_mask"
}  # fmt: skip
DRAWS = {"sample_t", "route"}  # have no tensors


def maker(stem: str, batch: int):
    if stem in ("scan", "conv"):
        from tests.cases.scan import ScanMaker, Size

        return ScanMaker(Size(batch, 6, 20, 4))
    cases = importlib.import_module(f"tests.cases.{stem}")
    size = {
        "guidance": (batch, 3, 5),
        "patch": (batch, 3, 4, 6),
        "adaln": (batch, 9, 8),
        "routing": (batch, 8, 6),
    }
    return cases.Maker(size[stem] if stem in size else cases.Size(batch, 2, 2, 8))


def cases() -> dict[str, list[Case]]:
    """The cases of every op."""
    found: dict[str, list[Case]] = {name: [] for name in pd.OPS}
    for stem in STEMS:
        module = importlib.import_module(f"tests.cases.{stem}")
        for case in [*module.CASES, *getattr(module, "STEPS", [])]:
            found[case.op].append(case)
    return found


class Call:
    """A case's function of its tensors alone, and these."""

    def __init__(self, case: Case, batch: int = 2) -> None:
        self.case = case
        args, kwargs = case.make(maker(pd.OPS[case.op].stem, batch))
        if case.op == "routed_linear":  # a graph needs them; as many in every sample
            M, N = args[1].shape[0], args[2].shape[1]
            args[2][:] = torch.arange(N) % M
            kwargs["sizes"] = [batch * len(range(m, N, M)) for m in range(M)]
        kwargs.pop("generator", None)
        self.given, self.spec = tree_flatten((args, kwargs))
        self.places = [i for i, t in enumerate(self.given) if isinstance(t, torch.Tensor)]
        self.tensors = [self.given[i] for i in self.places]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = list(self.given)
        for i, t in zip(self.places, tensors, strict=True):
            given[i] = t
        args, kwargs = tree_unflatten(given, self.spec)
        return tuple(leaves(getattr(pd, self.case.op)(*args, **kwargs)))

    def learns(self, t: torch.Tensor) -> bool:
        """Whether it takes a gradient."""
        if not t.is_floating_point() or self.case.op in NO_GRADIENT:
            return False
        if pd.OPS[self.case.op].stem == "patch":
            return t.dim() >= 3 or self.case.op == "patch_loss"
        return self.case.name != "per_head" or t.dim() > 1  # attention's scale

    def inputs(self, grads: bool) -> list[torch.Tensor]:
        return [t.detach().clone().requires_grad_(grads and self.learns(t)) for t in self.tensors]


ALL = [case for many in cases().values() for case in many if case.op not in DRAWS]
SLOW = {"tcfg-many"}  # an eigenvector, by operations of torch; tests/test_transforms.py compiles it
MOST = 6  # tensors: more of them take longer and show no more


def rich(many: list[Case]) -> Case:
    counts = {case.id: len(Call(case).tensors) for case in many}
    return max(
        (case for case in many if case.id not in SLOW),
        key=lambda case: counts[case.id] if counts[case.id] <= MOST else 0,
    )


RICH = [rich(many) for name, many in cases().items() if name not in NO_GRADIENT]
FIRST = [many[0] for many in cases().values()]
by_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
by_op = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.op)
by_op_of_tensors = pytest.mark.parametrize(
    "case", [case for case in FIRST if case.op not in DRAWS], ids=lambda case: case.op
)


def total(results) -> torch.Tensor:
    return sum(r.double().square().sum() for r in results if r.is_floating_point())


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def gradients(results, inputs) -> list[torch.Tensor]:
    """Zero where there is none."""
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(total(results), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def run_sizes(case: Case, dynamic: bool | None, grads: bool) -> None:
    """One compiled function at two sizes, against the call itself. Sizes come as arguments, as tensors do."""
    calls = [Call(case), Call(case, 3)]
    op, objects = getattr(pd, case.op), {"path", "cu_seqlens"}

    def function(args, kwargs, constant):
        return leaves(op(*args, **kwargs, **constant))

    constant = {k: v for k, v in case.make(maker(pd.OPS[case.op].stem, 2))[1].items() if k in objects}
    fast = compiled(lambda args, kwargs: function(args, kwargs, constant), dynamic=dynamic)
    for call in calls:
        both = []
        for run in (lambda *given: function(*given, constant), fast):
            tensors = call.inputs(grads)
            given = list(call.given)
            for i, t in zip(call.places, tensors, strict=True):
                given[i] = t
            args, kwargs = tree_unflatten(given, call.spec)
            torch.manual_seed(1)
            results = run(args, {k: v for k, v in kwargs.items() if k not in objects})
            both.append([*results, *(gradients(results, tensors) if grads else [])])
        assert_same(both[1], both[0])


@by_op
def test_compile(case):
    """Without a gradient: at one size, then at another, for which the graph becomes dynamic."""
    run_sizes(case, None, False)


@pytest.mark.parametrize("case", RICH, ids=lambda case: case.id)
def test_compile_dynamic_with_gradients(case):
    run_sizes(case, True, True)


def stacked(call: Call) -> list[torch.Tensor]:
    return [torch.stack([t, 0.5 * t if t.is_floating_point() else t]) for t in call.tensors]


def check_vmap(call: Call, mapped) -> None:
    many = stacked(call)
    expected = [call(*(t[i].clone() for t in many)) for i in range(2)]
    found = mapped(*(t.clone() for t in many))
    assert_same(found, [torch.stack(each) for each in zip(*expected, strict=True)])


@by_case
def test_vmap_of_one_sample(case):
    call = Call(case, 1)
    check_vmap(call, torch.func.vmap(call))


@by_op_of_tensors
def test_compiled_vmap(case):
    call = Call(case)
    check_vmap(call, compiled(torch.func.vmap(call)))


@pytest.mark.parametrize(
    "case", [case for case in ALL if case.op not in NO_GRADIENT], ids=lambda case: case.id
)
def test_jacrev_of_one_sample(case):
    """A row of the Jacobian is a backward: here of three of the outputs."""
    call = Call(case, 1)
    which = next(i for i, t in enumerate(call.tensors) if call.learns(t))

    def first(x):
        return call(*(x if i == which else t for i, t in enumerate(call.tensors)))[0].flatten()[:3]

    x = call.tensors[which].clone().requires_grad_()
    y = first(x)
    (expected,) = torch.autograd.grad(y[-1], x)
    assert_same([torch.func.jacrev(first)(x.detach())[-1]], [expected])


@pytest.mark.parametrize(
    "case", [case for case in FIRST if case.op not in NO_GRADIENT], ids=lambda case: case.op
)
def test_func_grad_under_compile(case):
    """The gradients of eager func.grad."""
    call = Call(case)
    which = tuple(i for i, t in enumerate(call.tensors) if call.learns(t))
    slopes = torch.func.grad(lambda *tensors: total(call(*tensors)), which)
    assert_same(compiled(slopes)(*call.tensors), slopes(*call.tensors))


class Module(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


def exported(call: Call, other: Call):
    """With whatever differs between two calls as a dynamic size."""
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = tuple(
        {i: batch for i, (m, n) in enumerate(zip(t.shape, o.shape, strict=True)) if m != n}
        for t, o in zip(call.tensors, other.tensors, strict=True)
    )
    return torch.export.export(Module(call), tuple(call.inputs(False)), dynamic_shapes=(sizes,))


@by_op_of_tensors
def test_export_with_any_batch(case):
    call, other = (
        Call(case),
        Call(case, 2 if case.op == "routed_linear" else 3),
    )  # its sizes are constants
    program = exported(call, other)
    for graph in (program.module(), program.run_decompositions().module()):
        tensors = other.inputs(True)
        found, mine = graph(*tensors), other.inputs(True)
        expected = other(*mine)
        assert_same(found, expected)
        if case.op not in NO_GRADIENT:
            assert_same(gradients(found, tensors), gradients(expected, mine))


def test_parameters_learn_through_an_exported_module():
    torch.manual_seed(0)
    layer = pd.nn.ZigzagMamba(8, path=pd.paths.zigzag((3, 4)))
    x = torch.randn(2, 12, 8)
    graph = torch.export.export(layer, (x,)).module()
    graph(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in graph.named_parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


@by_op_of_tensors
def test_vmap_of_each_tensor_alone(case):
    """Mapped over its last dimension, the others shared."""
    call = Call(case)
    if case.op == "selective_state_update":
        return  # a state that is shared cannot be written for each
    for i, t in enumerate(call.tensors):
        many = torch.stack([t, 0.5 * t if t.is_floating_point() else t], -1)
        dims = tuple(-1 if j == i else None for j in range(len(call.tensors)))
        given = [[many[..., k] if j == i else u for j, u in enumerate(call.tensors)] for k in range(2)]
        expected = [torch.stack(each) for each in zip(*(call(*one) for one in given), strict=True)]
        found = torch.func.vmap(call, dims)(*(many if j == i else u for j, u in enumerate(call.tensors)))
        assert_same(found, expected)


@by_op_of_tensors
def test_make_fx(case):
    call = Call(case)
    graph = make_fx(lambda *tensors: call(*tensors))(*call.inputs(False))
    assert_same(graph(*call.inputs(False)), call(*call.inputs(False)))


@by_case
def test_jit_trace(case):
    """At another batch than that of the trace, too, but for those whose sizes are constants."""
    call, other = Call(case), Call(case, 2 if case.op in ("routed_linear", *NO_GRADIENT) else 3)
    traced = torch.jit.trace(
        lambda *tensors: call(*tensors), tuple(call.inputs(False)), check_trace=False
    )
    for each in (call, other):
        found = traced(*each.inputs(False))
        assert_same(found if isinstance(found, tuple) else [found], each(*each.inputs(False)))


def test_jit_trace_of_a_layer(tmp_path):
    layer = pd.nn.ZigzagMamba(8, path=pd.paths.zigzag((3, 4)), bidirectional=True)
    traced = torch.jit.trace(layer, torch.randn(2, 12, 8))
    torch.jit.save(traced, tmp_path / "layer.pt")
    loaded, x = torch.jit.load(tmp_path / "layer.pt"), torch.randn(3, 12, 8)
    torch.testing.assert_close(loaded(x), layer(x))
    loaded(x).square().sum().backward()
    layer(x).square().sum().backward()
    for a, b in zip(loaded.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("low", [False, True])
@by_case
def test_autocast_takes_any_mix(case, low):
    """One tensor in bfloat16 and the others in float32, or the other way round."""
    call = Call(case)
    wide = [i for i, t in enumerate(call.tensors) if t.dtype is torch.float32]
    expected = call(*call.inputs(False))
    for one in wide:
        tensors = [
            t.bfloat16() if i in wide and (i == one) is not low else t
            for i, t in enumerate(call.inputs(False))
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(*tensors)
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert all(not t.is_floating_point() or t.isfinite().all() or t.isneginf().any() for t in found)


def test_a_block_written_the_usual_way_runs_under_autocast():
    """What a linear layer makes is bfloat16, the residual float32; and so is what comes of both."""
    torch.manual_seed(0)
    x, table = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 3, 8)
    rows, ids = torch.tensor([[0], [1]]), pd.route(2, 6, 0.5)
    layer = torch.nn.Linear(8, 8)

    def block():
        r, y = pd.gate_residual_modulate(x, layer(x), table, rows)
        return pd.scatter_tokens(r, layer(pd.gather_tokens(y, ids)), ids)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block()
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, block(), rtol=3e-2, atol=3e-2)
    out.sum().backward()
    assert layer.weight.grad.dtype is torch.float32 and x.grad.isfinite().all()
    with pytest.raises(TypeError, match="branch"):
        pd.gate_residual_modulate(x, x.bfloat16(), table, rows)
    with pytest.raises(TypeError, match="as base is"):
        pd.scatter_tokens(x, x[:, :3].bfloat16(), ids)


def test_the_op_of_traced_graphs():
    """opcheck; and forward mode through an exported graph, which no kernel has, is an error."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    arguments = ("routing.Gather s:gather_tokens t t none", [x, ids], [], [])
    torch.library.opcheck(torch.ops.pydiffuse.call.default, arguments)
    call = Call(cases()["gather_tokens"][0])
    graph = torch.export.export(Module(call), tuple(call.inputs(False))).module()
    x, ids = call.inputs(False)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: graph(x, ids), (x,), (torch.ones_like(x),))


@by_case
def test_fake_tensors_have_shapes_and_strides(case):
    call = Call(case)
    expected = call(*call.inputs(False))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = call(*(mode.from_tensor(t) for t in call.tensors))
    assert [(t.shape, t.dtype, t.stride()) for t in found] == [
        (t.shape, t.dtype, t.stride()) for t in expected
    ]


OUTSIDE = (3, -1, 2**32, 2**32 + 1, -(2**32), 2**33 + 1)
ID_CALLS = {  # calls with integers: (function, its tensors); 3 is the first that is outside
    "modulate": (pd.modulate, lambda: (torch.randn(3, 5), torch.randn(3, 2, 5), torch.zeros(3, dtype=torch.int64))),
    "gate_residual_modulate": (
        pd.gate_residual_modulate,
        lambda: (torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 3, 5), torch.zeros(3, dtype=torch.int64)),
    ),
    "gather_tokens": (pd.gather_tokens, lambda: (torch.randn(1, 3, 2), torch.tensor([[1, 0]]))),
    "scatter_tokens": (
        pd.scatter_tokens,
        lambda: (torch.randn(1, 3, 2), torch.randn(1, 2, 2), torch.tensor([[1, 0]])),
    ),
    "routed_linear": (
        lambda x, w, m: pd.routed_linear(x, w, m, sizes=[4, 0, 0]),
        lambda: (torch.randn(1, 4, 2), torch.randn(3, 2, 2), torch.zeros(1, 4, dtype=torch.int64)),
    ),
    "causal_conv1d": (
        lambda x, w, o: pd.causal_conv1d(x, w, cu_seqlens=o),
        lambda: (torch.randn(1, 2, 2), torch.randn(2, 2), torch.tensor([0, 1, 2])),
    ),
    "selective_scan": (
        lambda u, A, o: pd.selective_scan(u, u, A, u, u, cu_seqlens=o),
        lambda: (torch.randn(1, 2, 2), -torch.rand(2, 2), torch.tensor([0, 1, 2])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", ID_CALLS)
def test_ids_outside_are_an_error_everywhere(op):
    """Also where their values are hidden, and as int64 whose low half is inside."""
    function, make = ID_CALLS[op]
    mapped, fast, fast_mapped = (
        torch.func.vmap(function), compiled(function), compiled(torch.func.vmap(function))
    )  # fmt: skip
    twice = lambda given: tuple(torch.stack([t, t]) for t in given)  # noqa: E731
    for call, given in ((mapped, twice(make())), (fast, make()), (fast_mapped, twice(make()))):
        call(*given)
    for value in OUTSIDE:
        given = make()
        given[-1].view(-1)[-1 if "mod" in op else 1] = value
        good = twice(make())
        both = (*good[:-1], torch.stack([good[-1][0], given[-1]]))
        for call, args in ((function, given), (mapped, both), (fast, given), (fast_mapped, both)):
            with pytest.raises((ValueError, RuntimeError)):
                call(*args)


SIZED = {  # draws, and sizes that come from shapes
    **{kind: lambda x, kind=kind: pd.sample_t(*x.shape[:2], kind) for kind in ("mode", "ltg", "nondecreasing")},
    "noise_patches": lambda x: pd.noise_patches(x[:, None], 0.5, 2)[0],
    "ancestral": lambda x: pd.patch_step(x[:, None], x[:, None] + 1, 0.2, 0.4, 2, method="ancestral")[0],
    "route": lambda x: pd.route(*x.shape[:2], 0.5),
    "route some": lambda x: pd.route(*x.shape[:2], x.shape[1] // 2),
    "select_patches": lambda x: pd.select_patches(x[..., 0], x.shape[1] // 2)[0],
    "dual_loop_t": lambda x: pd.dual_loop_t(x[..., 0], x.shape[1] // 2, 0.2, dt=0.1, steps=3),
    "embed_t": lambda x: pd.embed_t(x[..., 0], 6, max_distinct=x.shape[0] * x.shape[1])[0],
    "channel_mask": lambda x: pd.channel_mask(x[:, 0, 0].sigmoid(), x.shape[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_sizes_are_of_any_kind(name):
    """Compiled at two sizes, and exported: SymInt is an int."""
    function = SIZED[name]
    fast = compiled(function)
    given = [torch.randn(b, n, 4) for b, n in ((2, 8), (3, 10))]
    sizes = {0: torch.export.Dim.DYNAMIC, 1: 2 * torch.export.Dim("half", min=2, max=64)}
    module = torch.nn.Module()
    module.forward = function
    graph = torch.export.export(module, (given[0],), dynamic_shapes=(sizes,)).module()
    for x in given:
        torch.manual_seed(0)
        expected = function(x)
        for call in (fast, graph):
            torch.manual_seed(0)
            torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize("size", [(2, 2), (4, 8)])
def test_modulate_where_sizes_are_equal_to_others(size):
    """B or N as the columns of the table, its rows or the features: no size stands for another."""
    fast = compiled(pd.modulate, dynamic=True)
    for B, N in (size, (size[0] + 1, size[1]), (size[0], size[1] + 2)):
        given = torch.randn(B, N, 8, requires_grad=True), torch.randn(4, 2, 8, requires_grad=True)
        rows = torch.randint(4, (B, N))
        found, expected = fast(*given, rows), pd.modulate(*given, rows)
        assert_same([found, *gradients([found], given)], [expected, *gradients([expected], given)])
