"""What only a GPU can show: graph capture, no host sync, one result by every path of the kernels."""

from __future__ import annotations

import pytest
import torch

import pydiffuse
from tests.cases.guidance import CASES
from tests.helpers import arguments, leaves, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
BACKENDS = ["cuda", "triton"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@by_case
@by_backend
def test_graph_capture_without_sync(case, backend):
    """A captured call replays on new data; capture itself refuses host syncs."""
    if case.op == "superpose":
        return  # its linear solve is torch.linalg.solve_ex, whose capture is torch's affair
    given = arguments(case, (3, 5000), torch.float32)
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
