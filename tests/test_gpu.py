"""What only a GPU can show: graph capture, no host sync, one result by every path of the kernels."""

from __future__ import annotations

import pytest
import torch

import pydiffuse
from pydiffuse import plans
from tests.cases import attention, conv, scan
from tests.cases.guidance import CASES
from tests.cases.scan import ScanMaker, Size
from tests.helpers import arguments, leaves, run, values_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
BACKENDS = ["cuda", "triton"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def check_replay(case, given, backend):
    """A call captured in a graph gives, on new data, what the call gives."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(case, given, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case, given, backend)
    for t in leaves(given):
        t.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(results, run(case, given, backend), strict=True):
        assert torch.equal(a, b)


@by_case
@by_backend
def test_graph_capture_without_sync(case, backend):
    """A captured call replays on new data; capture itself refuses host syncs."""
    given = arguments(case, (3, 5000), torch.float32)
    check_replay(case, given, backend)


def test_every_path_gives_the_same_bits():
    """One block per sample, one cooperative launch, two launches: the batch decides, the bits do not."""
    one = [torch.randn(1, 300_000, device="cuda") for _ in range(2)]
    expected = pydiffuse.tcfg(*one, 7.5, rescale=0.3)
    for batch in (2, 40, 400):
        out = pydiffuse.tcfg(*(t.expand(batch, -1) for t in one), 7.5, rescale=0.3)
        assert all(torch.equal(row, expected[0]) for row in out)


@by_backend
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (2, 4099), (2, 20011), (1, 300_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sanitize(backend, shape, dtype):
    """Small cases of every kernel, for compute-sanitizer."""
    c, u, x = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    with pydiffuse.use_backend(backend):
        y = pydiffuse.guide([c, u], "tcfg", scale=7.5, x=x, b=0.1, rescale=0.4)
        torch.autograd.grad(y.float().sum(), (c, u, x))
        pydiffuse.combine([c, u, x], torch.rand(3, device="cuda"))
        pydiffuse.gram([c, u, x, c, u], sums=True)
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", [*scan.CASES, *conv.CASES], ids=lambda case: case.id)
@by_backend
def test_scans_in_a_graph(case, backend):
    """Forward and, on new data, a replay; L of several chunks."""
    given = case.make(ScanMaker(Size(2, 96, 200, 16), device="cuda"))
    check_replay(case, given, backend)


def test_chunks_apart_and_one_walk_give_the_same_bits():
    """The batch decides how time is cut, the bits do not change."""
    t = ScanMaker(Size(1, 128, 500, 16), device="cuda")
    (u, delta, A, B, C, D, z, bias, softplus), kwargs = scan.scan(t, path=t.path())
    expected = pydiffuse.selective_scan(u, delta, A, B, C, D, z, bias, softplus, **kwargs)
    many = [x.expand(300, -1, -1) for x in (u, delta, B, C, z)]
    y = pydiffuse.selective_scan(
        many[0], many[1], A, many[2], many[3], D, many[4], bias, softplus, **kwargs
    )
    assert all(torch.equal(row, expected[0]) for row in y)


def test_decays_stay_accurate_over_long_rows():
    """2^x by the special function unit, 4,096 steps of a decay close to 1."""
    B, D, L, N = 1, 32, 4096, 16
    t = ScanMaker(Size(B, D, L, N), device="cuda")
    args = t.tokens(), torch.full((B, D, L), 1e-3, device="cuda"), -torch.rand(D, N, device="cuda") * 16
    args = (*args, t.weights(), t.weights())
    with pydiffuse.use_backend("reference"):
        expected = pydiffuse.selective_scan(*(a.double() for a in args))
    for backend in BACKENDS:
        with pydiffuse.use_backend(backend):
            y = pydiffuse.selective_scan(*args)
        assert ((y - expected).norm() / expected.norm()).item() <= 1e-5


@by_backend
@pytest.mark.parametrize("case", [*scan.CASES, *conv.CASES], ids=lambda case: case.id)
def test_sanitize_scans(backend, case):
    """Small cases of every kernel, forward and backward, for compute-sanitizer."""
    for layout in ("bdl", "bld"):
        for size in (Size(2, 21, 70, 5), Size(1, 66, 9, 40)):
            values_and_gradients(case, case.make(ScanMaker(size, device="cuda", layout=layout)), backend)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", attention.CASES, ids=lambda case: case.name)
def test_attention_in_a_graph(case, dtype):
    (q, k, v, plan), kwargs = case.make(attention.Maker(attention.Size(2, 4, 2, 96), dtype, "cuda"))
    plan.to("cuda")  # its tensors are copied once, before the capture
    check_replay(case, ((q, k, v, plan), kwargs), "triton")


@pytest.mark.parametrize("case", attention.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("D", [40, 128])
def test_sanitize_attention(case, D):
    """Small cases of every kernel, forward and backward, for compute-sanitizer."""
    given = case.make(attention.Maker(attention.Size(1, 4, 2, D), torch.bfloat16, "cuda"))
    values_and_gradients(case, given, "triton", wants=lambda t: t.dim() == 4)
    torch.cuda.synchronize()


@pytest.mark.parametrize("references", [4, 1])
def test_attention_over_eight_frames(references):
    """Efficient-vDiT's shape, 8 frames of 3,600 tokens, 24 heads of 96, against float64, a frame at a time."""
    N, F, H, D = 8, 3600, 24, 96
    plan = plans.frames(N, F, references)
    q, k, v, dout = (torch.randn(1, H, N * F, D, device="cuda").bfloat16() for _ in range(4))
    with pydiffuse.use_backend("triton"):
        inputs = [t.requires_grad_() for t in (q, k, v)]
        out, lse = pydiffuse.tile_attention(*inputs, plan, return_lse=True)
        gradients = torch.autograd.grad(out, inputs, dout)
    seen = {i * N // references for i in range(references)}
    tokens = [slice(f * F, (f + 1) * F) for f in range(N)]
    slopes = [torch.zeros(1, 2, N * F, D, dtype=torch.float64, device="cuda") for _ in range(3)]
    heads = [0, H - 1]
    q, k, v, dout = (t.detach()[:, heads].double() for t in (q, k, v, dout))
    for f in range(N):
        others = [g for g in range(N) if f == g or f in seen or g in seen]
        keys = torch.cat([torch.arange(N * F, device="cuda")[tokens[g]] for g in others])
        given = [t.requires_grad_() for t in (q[:, :, tokens[f]].clone(), k[:, :, keys], v[:, :, keys])]
        scores = given[0] @ given[1].mT / D**0.5
        expected = scores.softmax(-1) @ given[2]
        error = (out[:, heads, tokens[f]].double() - expected).norm() / expected.norm()
        assert error.item() <= attention.TOLERANCE[torch.bfloat16].value
        assert (lse[:, heads, tokens[f]] - scores.logsumexp(-1)).abs().max().item() <= 1e-3
        dq, dk, dv = torch.autograd.grad(expected, given, dout[:, :, tokens[f]])
        slopes[0][:, :, tokens[f]] += dq
        slopes[1][:, :, keys] += dk
        slopes[2][:, :, keys] += dv
    for ours, theirs in zip(gradients, slopes, strict=True):
        error = (ours[:, heads].double() - theirs).norm() / theirs.norm()
        assert error.item() <= attention.TOLERANCE[torch.bfloat16].grad
