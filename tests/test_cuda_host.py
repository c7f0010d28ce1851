"""The CUDA kernels, compiled for the host and run without a GPU (tests/cuda_host)."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

import pydiffuse
import setup as setup_build
from tests.cases import conv, guidance, scan
from tests.cases.scan import ScanMaker, Size
from tests.cuda_host import build, calls, emulator, resources
from tests.cuda_host.devices import DEVICES, RESOURCES
from tests.helpers import GPU, arguments, check, values_and_gradients

pytestmark = pytest.mark.skipif(GPU, reason="this run is for a GPU")
SCANS = [*scan.CASES, *conv.CASES]
SIZED = [
    (case, size) for case in SCANS for size in scan.SIZES if (case.name, size) != ("paths", "hollow")
]
LOW = [torch.bfloat16, torch.float16]
by_arch = pytest.mark.parametrize("arch", DEVICES)


def name(p):
    return p if isinstance(p, str) else p.id


@pytest.fixture(scope="module", autouse=True)
def host(unhidden):
    """All launches of this file, told at its end."""
    with emulator.running() as running:
        yield running
        counts = {k: n for k, n in running.launches().items() if n}
        with unhidden():
            print(f"\nCUDA on the host: {sum(counts.values())} launches of {len(counts)} kernels")


@pytest.fixture(scope="module")
def unhidden(request):
    return request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled


@pytest.fixture
def on(host, request):
    """Another card or another order of threads, for one test."""
    yield lambda seed=0, arch="90a", multiprocessors=None: (
        host.device(arch, multiprocessors),
        host.seed(seed),
    )
    host.device("90a")
    host.seed(0)


@pytest.mark.parametrize("case", guidance.CASES, ids=name)
@pytest.mark.parametrize("shape", guidance.SHAPES.values(), ids=guidance.SHAPES)
def test_guidance(case, shape):
    check(case, arguments(case, shape, torch.float32), "cuda", guidance.TOLERANCE)


@pytest.mark.parametrize("case", guidance.CASES, ids=name)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_guidance_in_low_precision(case, dtype):
    given = arguments(case, guidance.SHAPES["odd"], dtype)
    check(case, given, "cuda", guidance.TOLERANCE, dtype)


@pytest.mark.parametrize("case, size", SIZED, ids=name)
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_scans(case, size, layout):
    check(case, case.make(ScanMaker(scan.SIZES[size], layout=layout)), "cuda", scan.TOLERANCE)


@pytest.mark.parametrize("case", SCANS, ids=name)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_scans_in_low_precision(case, dtype):
    factor = 5.0 if case.op == "zigzag_mamba_inner" else 1.0
    given = case.make(ScanMaker(scan.SIZES["odd"], dtype))
    check(case, given, "cuda", scan.TOLERANCE, dtype, factor)


@pytest.mark.parametrize("case", scan.STEPS, ids=name)
def test_state_update(case):
    t = ScanMaker(scan.SIZES["odd"])
    (state, *rest), kwargs = case.make(t)
    expected = state.clone(), state.double()
    with pydiffuse.use_backend("cuda"):
        out = pydiffuse.selective_state_update(expected[0], *rest, **kwargs)
    with pydiffuse.use_backend("reference"):
        double = [r.double() if isinstance(r, torch.Tensor) else r for r in rest]
        ref = pydiffuse.selective_state_update(expected[1], *double, **kwargs)
    torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected[0].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def expected(host):
    return calls.everything()


@by_arch
def test_every_card_gives_the_same_bits(on, host, expected, arch):
    """Whatever the launches a card chooses, and in whatever order their threads run."""
    on(seed=int(arch.rstrip("a")), arch=arch)
    assert all(torch.equal(a, b) for a, b in zip(calls.everything(), expected, strict=True))


@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
def test_every_size_of_card_gives_the_same_bits(on, host, expected, multiprocessors):
    """Scans walk on small cards; a cooperative launch holds several chunks in a block, or gives way."""
    on(seed=multiprocessors, multiprocessors=multiprocessors)
    assert all(torch.equal(a, b) for a, b in zip(calls.everything(), expected, strict=True))


def test_every_kernel_is_launched(on, host):
    before = host.launches()
    for multiprocessors in (1, 132):
        on(multiprocessors=multiprocessors)
        calls.everything()
    with pydiffuse.use_backend("cuda"):
        case = next(c for c in scan.CASES if c.name == "states")
        values_and_gradients(case, case.make(ScanMaker(Size(1, 6, 0, 4))), "cuda")
    never = [k for k, n in host.launches().items() if n == before[k] and k not in build.PLANTED]
    assert not never


def seen(host, call):
    """The kernels that a call launches."""
    before = host.launches()
    call()
    return {k.split("<")[0] for k, n in host.launches().items() if n > before[k]}


ONE, TWO = {"guide_kernel"}, {"gram_kernel", "solve_kernel", "mix_kernel"}


@pytest.mark.skipif(not build.calculator(), reason="this Triton has no cuda_occupancy.h")
@pytest.mark.parametrize(
    "arch, multiprocessors, dtype, n, kernels",
    [
        ("90a", 132, torch.float32, 1024, ONE),  # a block for each sample
        ("90a", 132, torch.float32, 53248, ONE),  # cooperative: 26 chunks of 33 kB, one in a block
        ("90a", 3, torch.float32, 53248, TWO),  # nine in a block are too many
        ("90a", 3, torch.bfloat16, 53248, ONE),  # chunks of half the size
        ("90a", 1, torch.bfloat16, 53248, TWO),
        ("120", 8, torch.float32, 53248, TWO),
        ("120", 8, torch.bfloat16, 53248, ONE),
    ],
    ids=str,
)
def test_one_launch_where_the_card_holds_the_call(on, host, arch, multiprocessors, dtype, n, kernels):
    on(arch=arch, multiprocessors=multiprocessors)
    c, u = (torch.randn(2, n).to(dtype) for _ in range(2))
    with pydiffuse.use_backend("cuda"):
        assert seen(host, lambda: pydiffuse.tcfg(c, u, 7.5)) == kernels


@by_arch
def test_wide_scans_are_refused_where_a_block_lacks_shared_memory(on, arch):
    case = scan.CASES[0]
    given = case.make(ScanMaker(Size(1, 6, 70, 40)))
    on(arch=arch)
    if DEVICES[arch].shared_of_block > 99:
        check(case, given, "cuda", scan.TOLERANCE)
    else:
        with pytest.raises(RuntimeError, match="149760 bytes of shared memory"):
            values_and_gradients(case, given, "cuda")


def test_resources_are_those_of_every_kernel(host):
    known = json.loads(RESOURCES.read_text())
    kernels = {k.name for k in host.kernels} - build.PLANTED
    assert {arch: set(usage) for arch, usage in known.items()} == dict.fromkeys(DEVICES, kernels)


@pytest.mark.parametrize("source", sorted(build.CUDA.glob("*.cu")), ids=lambda p: p.stem)
def test_resources_are_those_of_the_objects(source):
    """resources.json tells of the code as nvcc compiles it."""
    built = setup_build.object_of(source)
    newest = max(p.stat().st_mtime for p in build.CUDA.iterdir())
    if not built.exists() or built.stat().st_mtime < newest:
        pytest.skip("this machine has no nvcc, or has not built the extension from these sources")
    known = json.loads(RESOURCES.read_text())
    for arch, usage in resources.read(built).items():
        if arch in known:
            assert {k: known[arch][k] for k in usage} == usage


# The emulator itself: tests/cuda_host/planted.cu.
FAULTS = {
    1: None,  # a missing barrier
    4: "64 threads .* wait at __syncthreads .*; 192 threads .* have ended",
    5: "224 threads .* wait at __syncthreads .*; 32 threads .* have ended",
    6: "32 threads .* wait at __syncthreads .*; 224 threads .* wait at __syncthreads",
    7: None,  # shared memory that nobody wrote
    9: "128 threads .* wait at __syncthreads .*; 128 threads .* wait for their warp",
    10: None,  # an asynchronous copy that nobody waits for
}
TURNED = torch.arange(255.0, -1.0, -1.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_without_a_fault(host, on, seed):
    on(seed)
    out = torch.full((256,), float("nan"))
    assert host.planted(0, out) == "no error" and torch.equal(out, TURNED)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(host, on, fault, seed):
    """Divergence is told; a missing barrier gives NaN, as unwritten shared memory does."""

    on(seed)
    out = torch.full((256,), 1.0)
    told = host.planted(fault, out)
    if FAULTS[fault]:
        assert re.search(f"^planted_kernel: divergent barrier in block 0: {FAULTS[fault]}", told), told
    else:
        assert told == "no error" and out.isnan().any()


@pytest.mark.parametrize(
    "fault, words",
    [(0, None), (2, "heap-buffer-overflow"), (3, "heap-buffer-overflow"), (8, "misaligned address")],
)
def test_a_planted_access_out_of_bounds_is_found(fault, words):
    """Past a tensor, past shared memory, off a vector's boundary: by AddressSanitizer and UBSan."""
    done = subprocess.run([build.planted(), str(fault)], text=True, capture_output=True)
    assert (done.returncode == 0) == (words is None) and (words or "") in done.stderr, done.stderr


@pytest.mark.skipif(not build.calculator(), reason="this Triton has no cuda_occupancy.h")
def test_a_planted_occupancy_is_found(host, on):
    """243 registers of 256 threads: one block fits on a multiprocessor, and two may not be asked for."""
    on(arch="90a", multiprocessors=2)
    device = host.device("90a", 2)
    kernel = next(k for k in host.kernels if k.name == "occupying_kernel")
    out = torch.zeros(256)
    for registers, blocks, asked, launched in (
        (243, 1, "no error", "no error"),
        (243, 2, "invalid argument", "too many blocks in cooperative launch"),
        (128, 2, "no error", "no error"),
        (128, 3, "invalid argument", "too many blocks in cooperative launch"),
    ):
        host.usage(kernel, device, registers, 0)
        assert host.planted_occupancy(blocks, True, out) == asked
        assert host.planted_occupancy(blocks, False, out) == launched
    assert host.planted_shared(48 << 10, out) == "no error"
    assert host.planted_shared((48 << 10) + 16, out) == "invalid argument"  # not asked for before
