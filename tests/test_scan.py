"""The selective scan and the causal convolution on every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

import pydiffuse
from pydiffuse.paths import zigzag
from tests.cases.conv import CASES as CONV_CASES
from tests.cases.scan import CASES, SIZES, STEPS, TOLERANCE, ScanMaker, Size
from tests.helpers import (
    BACKENDS,
    DEVICE,
    assert_close,
    check,
    doubled,
    leaves,
    relative_error,
    run,
    values_and_gradients,
)

ALL = [*CASES, *CONV_CASES]
KERNELS = [c for c in ALL if c.op != "zigzag_mamba_inner"]  # torch's matrix products depend on the batch
by_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
by_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.id)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_layout = pytest.mark.parametrize("layout", ["bdl", "bld"])


def arguments(case, size, dtype=torch.float32, layout="bdl"):
    return case.make(ScanMaker(size, dtype, DEVICE, layout))


# There is no ScanPath of no tokens.
SIZED = [(case, size) for case in ALL for size in SIZES if (case.name, size) != ("paths", "hollow")]


@pytest.mark.parametrize("case, size", SIZED, ids=lambda p: p if isinstance(p, str) else p.id)
@by_backend
@by_layout
def test_values_and_gradients(case, size, backend, layout):
    if backend == "triton" and DEVICE == "cpu" and size in ("chunks", "one_state"):
        pytest.skip("this machine has no GPU: in the interpreter a step takes milliseconds")
    check(case, arguments(case, SIZES[size], layout=layout), backend, TOLERANCE)


def test_triton_across_chunks():
    """In the interpreter, too, at the size of the smallest that has three chunks."""
    case = next(c for c in CASES if c.name == "sequences")
    check(case, arguments(case, Size(1, 6, 131, 4)), "triton", TOLERANCE)


@pytest.mark.skipif(DEVICE != "cpu", reason="this run is for a GPU; it is about the CPU's blocks")
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.id)
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_convolutions(case, layout, dtype):
    """Three blocks of channels, nine chunks of steps, and outputs that go past the caches if float32."""
    check(case, arguments(case, Size(2, 1040, 520, 1), dtype, layout), "cpu", TOLERANCE, dtype)


@by_case
@by_backend
@by_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(case, backend, layout, dtype):
    # Mamba's block rounds between its matrix products.
    factor = 5.0 if case.op == "zigzag_mamba_inner" else 1.0
    check(case, arguments(case, SIZES["odd"], dtype, layout), backend, TOLERANCE, dtype, factor)


def test_mixed_dtypes_and_layouts():
    """u, delta, z, B and C each in a dtype and an order of memory of their own."""
    t = ScanMaker(Size(2, 36, 70, 16), device=DEVICE)
    case = next(c for c in CASES if c.id == "selective_scan-mamba")
    (u, delta, A, B, C, D, z, bias, softplus), kwargs = case.make(t)
    given = (
        (
            u.transpose(1, 2).contiguous().transpose(1, 2),
            delta.bfloat16(),
            A,
            torch.cat([B, B], 1)[:, :16],
            C.half(),
            D,
            torch.stack([z, z], -1)[..., 0],
            bias,
            softplus,
        ),
        kwargs,
    )
    results, gradients = values_and_gradients(case, given, BACKENDS[0])
    expected, slopes = values_and_gradients(case, doubled(given), "reference")
    assert_close(results, expected, TOLERANCE, torch.float32)
    for gradient, slope in zip(gradients, slopes, strict=True):
        narrow = gradient.dtype if gradient.dtype in TOLERANCE else torch.float32
        assert relative_error(gradient, slope) <= TOLERANCE[narrow].grad
    assert results[0].stride() == given[0][0].stride()


@by_kernel
@by_backend
def test_same_bits_twice_and_alone(case, backend):
    size = Size(3, 21, 19, 5) if backend == "triton" and DEVICE == "cpu" else Size(3, 84, 150, 16)
    given = arguments(case, size)
    first, second = (values_and_gradients(case, given, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)
    alone = tree_map(
        lambda t: t[1:2] if isinstance(t, torch.Tensor) and t.shape[:1] == (3,) and t.dim() > 2 else t,
        given,
    )
    for a, b in zip(run(case, alone, backend), run(case, given, backend), strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="this run is for a GPU; it is about the CPU's threads")
@by_kernel
def test_threads_change_nothing(case):
    given = arguments(case, Size(3, 150, 100, 16), layout="bld")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([t for ts in values_and_gradients(case, given, "cpu") for t in ts])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("there, back", [BACKENDS, BACKENDS[::-1]], ids=str)
def test_forward_here_and_backward_there(there, back):
    """What one backend saves, every other can read."""
    case = next(c for c in CASES if c.name == "sequences")
    given = arguments(case, Size(1, 6, 70, 4))
    copies = tree_map(lambda t: t.requires_grad_() if isinstance(t, torch.Tensor) else t, given)
    results = run(case, copies, there)
    weights = [torch.randn_like(r) for r in results]
    with pydiffuse.use_backend(back):
        found = torch.autograd.grad(results, leaves(copies), weights)
    wide = tree_map(lambda t: t.requires_grad_() if isinstance(t, torch.Tensor) else t, doubled(given))
    expected = torch.autograd.grad(
        run(case, wide, "reference"), leaves(wide), [w.double() for w in weights]
    )
    assert_close(found, expected, TOLERANCE, torch.float32, "grad")


def test_layouts_give_the_same_bits():
    t = ScanMaker(Size(2, 70, 100, 16), device=DEVICE)
    (u, delta, A, B, C, D, z, bias, softplus), kwargs = next(c for c in CASES if c.name == "mamba").make(
        t
    )
    y = pydiffuse.selective_scan(u, delta, A, B, C, D, z, bias, softplus, **kwargs)
    turned = [x.transpose(1, 2).contiguous() for x in (u, delta, z, B, C)]
    u, delta, z, B, C = turned
    last = pydiffuse.selective_scan(
        u, delta, A, B, C, D, z, bias, softplus, **{**kwargs, "layout": "bld"}
    )
    assert torch.equal(last.transpose(1, 2), y)


@by_backend
def test_a_path_is_a_gather_and_a_scatter(backend):
    """Bit for bit: permuting the tokens by hand gives the same."""
    t = ScanMaker(Size(2, 9, 30, 4), device=DEVICE, layout="bld")
    path = zigzag((5, 6), 3)
    args, kwargs = next(c for c in CASES if c.id == "selective_scan-mamba").make(t)
    with pydiffuse.use_backend(backend):
        y = pydiffuse.selective_scan(*args, **{**kwargs, "path": path})
        token = [i for i in (0, 1, 3, 4, 6)]
        gathered = [x[:, path.order.to(DEVICE)] if i in token else x for i, x in enumerate(args)]
        by_hand = pydiffuse.selective_scan(*gathered, **{**kwargs, "path": None})
    assert torch.equal(by_hand[:, path.inverse.to(DEVICE)], y)


def test_reference_is_the_sum_over_the_past():
    """y_l = sum_(j <= l) <C_l, exp(A sum_(j < i <= l) delta_i) delta_j B_j u_j>, written as one big sum."""
    t = ScanMaker(Size(2, 4, 7, 3), torch.float64)
    u, delta, A, B, C = (x.double() for x in (t.tokens(), t.delta(), t.A(), t.weights(), t.weights()))
    with pydiffuse.use_backend("reference"):
        y = pydiffuse.selective_scan(u, delta, A, B, C)
    time = delta.cumsum(-1)
    decay = torch.exp(A[None, :, :, None, None] * (time[:, :, None, :, None] - time[:, :, None, None, :]))
    decay = decay.tril()  # [B, D, N, L, J]
    expected = torch.einsum("bnl,bdnlj,bdj,bnj,bdj->bdl", C, decay, delta, B, u)
    torch.testing.assert_close(y, expected)


def test_a_scan_goes_on_where_it_stopped():
    t = ScanMaker(Size(2, 20, 100, 16), device=DEVICE)
    u, delta, A, B, C = t.tokens(), t.delta(), t.A(), t.weights(), t.weights()
    y, last = pydiffuse.selective_scan(u, delta, A, B, C, return_last_state=True)
    cut = [[x[..., :41], x[..., 41:]] for x in (u, delta, B, C)]
    first, state = pydiffuse.selective_scan(
        cut[0][0], cut[1][0], A, cut[2][0], cut[3][0], return_last_state=True
    )
    second, end = pydiffuse.selective_scan(
        cut[0][1], cut[1][1], A, cut[2][1], cut[3][1], return_last_state=True, initial_state=state
    )
    assert torch.equal(torch.cat([first, second], -1), y) and torch.equal(end, last)


@by_backend
def test_nan_goes_with_the_state_and_no_further(backend):
    t = ScanMaker(Size(2, 6, 12, 4), device=DEVICE)
    args, kwargs = scan_args = next(c for c in CASES if c.id == "selective_scan-mamba").make(t)
    path = kwargs["path"]
    with pydiffuse.use_backend(backend):
        good = pydiffuse.selective_scan(*args, **kwargs)
        u = args[0].clone()
        u[1, 2, int(path.order[5])] = float("nan")
        y = pydiffuse.selective_scan(u, *scan_args[0][1:], **kwargs)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 2, path.order[5:].long().to(DEVICE)] = True
    assert torch.equal(y.isnan(), bad) and torch.equal(y[~bad], good[~bad])


@by_backend
def test_extreme_steps(backend):
    """Decays of exactly 0 and 1, a softplus far on both sides, a growing state."""
    L, N = 6, 2
    u = torch.ones(1, 1, L, device=DEVICE)
    B = C = torch.ones(1, N, L, device=DEVICE)
    A = torch.tensor([[-1.0, 0.1]], device=DEVICE)
    delta = torch.tensor([[[0.0, 1e-30, 200.0, 25.0, 1e-4, 60.0]]], device=DEVICE)
    with pydiffuse.use_backend("reference"):
        expected = pydiffuse.selective_scan(*(t.double() for t in (u, delta, A, B, C)))
    with pydiffuse.use_backend(backend):
        y = pydiffuse.selective_scan(u, delta, A, B, C)
        far = torch.tensor([-200.0, -90.0, -15.0, 0.0, 19.0, 300.0], device=DEVICE).expand(1, 1, L)
        soft = pydiffuse.selective_scan(
            u, far, torch.zeros_like(A), B, C, delta_softplus=True, return_last_state=True
        )[1]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-6)  # errors grow, too
    total = torch.nn.functional.softplus(far.double()).sum()
    torch.testing.assert_close(soft.double(), total.expand(1, 1, N))


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
@by_backend
@pytest.mark.parametrize("size", ["odd", "states", "empty"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_step(case, backend, size, dtype):
    """selective_state_update: the output, and the state that it leaves behind."""
    given = arguments(case, SIZES[size], dtype)
    expected = doubled(given)
    ours = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, given)
    y = run(case, ours, backend)[0]
    y_ref = run(case, expected, "reference")[0]
    assert_close([y, ours[0][0]], [y_ref, expected[0][0]], TOLERANCE, dtype)


def test_steps_make_a_scan():
    t = ScanMaker(Size(2, 20, 9, 16), device=DEVICE)
    (u, delta, A, B, C, D, z, bias, softplus), _ = next(c for c in CASES if c.name == "mamba").make(t)
    y, last = pydiffuse.selective_scan(u, delta, A, B, C, D, z, bias, softplus, True)
    state = torch.zeros(2, 20, 16, device=DEVICE)
    steps = [
        pydiffuse.selective_state_update(
            state, u[..., l], delta[..., l], A, B[..., l], C[..., l], D, z[..., l], bias, softplus
        )
        for l in range(9)
    ]
    assert torch.equal(torch.stack(steps, -1), y) and torch.equal(state, last)


def test_what_is_saved_for_the_backward():
    """The inputs, and a state of N float32 per channel and 64 steps."""
    B, D, L, N = size = Size(2, 30, 200, 16)
    args, kwargs = next(c for c in CASES if c.id == "selective_scan-mamba").make(
        ScanMaker(size, device=DEVICE)
    )
    inputs = [t.requires_grad_() for t in leaves(args)]
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pydiffuse.selective_scan(*args, **kwargs)
    chunks, order = 4 * B * -(-L // 64) * D * N, 4 * L
    assert sum(saved.values()) <= sum(t.untyped_storage().nbytes() for t in inputs) + chunks + order


def test_complex_decay_runs_in_the_reference():
    """mamba_ssm's complex A, with B and C as real and imaginary parts in turn; nowhere else, and said so."""
    u, delta = torch.randn(1, 2, 5), torch.rand(1, 2, 5)
    A = torch.complex(-torch.rand(2, 3), torch.randn(2, 3))
    B, C = torch.randn(1, 3, 10), torch.randn(1, 3, 10)
    with pydiffuse.use_backend("reference"):
        y = pydiffuse.selective_scan(u, delta, A, B, C)
    h, rows = torch.zeros(1, 2, 3, dtype=torch.complex64), []
    b, c = (torch.view_as_complex(t.unflatten(-1, (5, 2)).contiguous()) for t in (B, C))
    for l in range(5):
        dt = delta[..., l, None]
        h = torch.exp(dt * A) * h + dt * b[:, None, :, l] * u[..., l, None]
        rows.append(2 * (h * c[:, None, :, l]).sum(-1).real)
    torch.testing.assert_close(y, torch.stack(rows, -1))
    with pytest.raises(TypeError, match=r"complex64.*float32.*reference"):
        pydiffuse.selective_scan(u, delta, A, B, C)


def test_no_channels():
    """Nothing to scan: the gradients of B and C are zeros, not what memory held."""
    t = ScanMaker(Size(2, 0, 300, 3), device=DEVICE)
    B, C = t.weights().requires_grad_(), t.weights().requires_grad_()
    y = pydiffuse.selective_scan(t.tokens(), t.delta(), t.A(), B, C)
    for gradient in torch.autograd.grad(y.sum(), [B, C]):
        assert not gradient.any()


@pytest.mark.parametrize("N", [3, 4, 17])
def test_infinity_stays_one(N):
    """An infinite u makes an infinite state, whatever the number of states is padded to."""
    u = torch.ones(1, 1, 3, device=DEVICE)
    u[..., 0] = float("inf")
    ones, A = torch.ones(1, N, 3, device=DEVICE), -torch.ones(1, N, device=DEVICE)
    y = pydiffuse.selective_scan(u, torch.ones_like(u), A, ones, ones)
    assert (y == float("inf")).all()


def test_offsets_of_any_kind():
    """Strided tensors; tuples seen first in inference mode or by fake tensors."""
    t = ScanMaker(Size(1, 6, 9, 4), device=DEVICE)
    args = t.tokens(), t.delta(), t.A(), t.weights(), t.weights()
    expected = pydiffuse.selective_scan(*args, cu_seqlens=[0, 4, 9])
    strided = torch.tensor([0, 7, 4, 7, 9, 7], dtype=torch.int32)[::2]
    assert torch.equal(pydiffuse.selective_scan(*args, cu_seqlens=strided), expected)
    offsets = (0, 2, 9)
    with torch.inference_mode():
        pydiffuse.selective_scan(*args, cu_seqlens=offsets)
    with torch._subclasses.FakeTensorMode() as mode:
        pydiffuse.selective_scan(*(mode.from_tensor(a) for a in args), cu_seqlens=offsets)
    u = args[0].requires_grad_()
    pydiffuse.selective_scan(u, *args[1:], cu_seqlens=offsets).sum().backward()
    assert u.grad is not None and u.grad.isfinite().all()


def test_vmap_over_states_that_lie_apart():
    t = ScanMaker(Size(3, 2, 8, 3), device=DEVICE)
    u, delta, A, B, C = (x for x in (t.tokens(), t.delta(), t.A(), t.weights(), t.weights()))
    states = torch.randn(3, 2, 2, 3, device=DEVICE)[:, 1:]  # [V, 1, D, N]

    def one(u, delta, B, C, h):
        return pydiffuse.selective_scan(
            u[None], delta[None], A, B[None], C[None], initial_state=h, return_last_state=True
        )[0][0]

    mapped = torch.func.vmap(one)(u, delta, B, C, states)
    assert torch.equal(mapped, torch.stack([one(*x) for x in zip(u, delta, B, C, states)]))
