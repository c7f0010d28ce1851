"""Orders over tokens: each a bijection, with neighbouring steps where it promises them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import time

import numpy as np
import pytest
import torch

from pydiffuse import paths
from pydiffuse.paths import ScanPath, from_order, hilbert, sweep, zigzag, zigzag_layers, zigzag_video

PLANES = [
    (1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (2, 2), (2, 3), (3, 2), (3, 3), (2, 9), (9, 2), (4, 4),
    (5, 5), (6, 6), (6, 10), (10, 6), (5, 8), (8, 5), (4, 31), (31, 4), (7, 7), (16, 16), (13, 40),
    (12, 29), (29, 12), (45, 33), (64, 64), (60, 104),
]  # fmt: skip
BOXES = [
    (1, 1, 1), (1, 1, 5), (5, 1, 1), (1, 5, 1), (1, 4, 6), (2, 2, 2), (3, 3, 3), (4, 1, 6), (3, 4, 5),
    (2, 3, 3), (3, 2, 3), (3, 3, 2), (4, 4, 4), (16, 2, 2), (2, 16, 3), (5, 8, 8), (9, 11, 13),
    (33, 2, 33), (16, 16, 16), (21, 30, 52),
]  # fmt: skip
SHAPES = PLANES + BOXES
EVERY = {
    "sweep": lambda shape: [sweep(shape), sweep(shape, transpose=True)],
    "zigzag": lambda shape: [zigzag(shape, i) for i in range(8)],
    "hilbert": lambda shape: [hilbert(shape)],
    "zigzag_video": lambda shape: [p for i in range(8) for p in zigzag_video(shape, i)],
    "from_order": lambda shape: [from_order(torch.randperm(math.prod(shape)), shape)],
}


def places(path: ScanPath) -> np.ndarray:
    """[L, dims]: where on the grid each step is."""
    return np.stack(np.unravel_index(path.order.numpy(), path.shape), axis=1)


def jumps(path: ScanPath) -> int:
    """How many steps do not lead to a neighbour."""
    return int((np.abs(np.diff(places(path), axis=0)).sum(1) != 1).sum())


@pytest.mark.parametrize("kind", EVERY)
def test_bijections(kind):
    for shape in SHAPES:
        if kind == "zigzag_video" and len(shape) == 2:
            continue
        for path in EVERY[kind](shape):
            for one in (path, path.reversed()):
                tokens = torch.arange(math.prod(shape), dtype=torch.int32)
                assert one.shape == shape and len(one) == one.length == len(tokens), one
                assert one.order.dtype == one.inverse.dtype == torch.int32, one
                assert one.order.is_contiguous() and one.inverse.is_contiguous(), one
                assert torch.equal(one.order.sort().values, tokens), one
                assert torch.equal(one.order[one.inverse], tokens), one
                assert torch.equal(one.inverse[one.order], tokens), one
            assert torch.equal(path.reversed().order, path.order.flip(0)), path


def test_neighbours():
    for shape in SHAPES:
        for path in [hilbert(shape), *(zigzag(shape, i) for i in range(8))]:
            assert jumps(path) == 0, path


def test_hilbert_on_all_small_grids():
    for shape in [*itertools.product(range(1, 25), repeat=2), *itertools.product(range(1, 8), repeat=3)]:
        path = hilbert(shape)
        assert jumps(path) == 0, path
        assert torch.equal(path.order[path.inverse], torch.arange(len(path), dtype=torch.int32)), path


def test_sweep():
    assert sweep((2, 3)).order.tolist() == [0, 1, 2, 3, 4, 5]
    assert sweep((2, 3), transpose=True).order.tolist() == [0, 3, 1, 4, 2, 5]
    assert sweep((2, 2, 2), transpose=True).order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # bottom?, right?


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (4, 4), (6, 3), (3, 4, 5), (2, 3, 3)])
def test_zigzag_schemes(shape):
    *_, H, W = shape
    found = [zigzag(shape, i) for i in range(8)]
    assert len({tuple(p.order.tolist()) for p in found}) == 8
    for i, path in enumerate(found):
        bottom, right = CORNERS[i // 2]
        first, second = places(path)[:2]
        assert first[-2:].tolist() == [bottom * (H - 1), right * (W - 1)]
        along_row = first[-2] == second[-2]
        assert along_row == (i % 2 == 0)
        # The first row or column is walked to its end before the next one begins.
        ahead = places(path)[: W if along_row else H]
        assert (ahead[:, -2 if along_row else -1] == ahead[0, -2 if along_row else -1]).all()


def test_zigzag_by_hand():
    assert zigzag((3, 3), 0).order.tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert zigzag((2, 3), 1).order.tolist() == [0, 3, 4, 1, 2, 5]
    assert zigzag((2, 3), 2).order.tolist() == [2, 1, 0, 3, 4, 5]
    assert zigzag((2, 3), 7).order.tolist() == [5, 2, 1, 4, 3, 0]
    assert zigzag((2, 2, 2), 0).order.tolist() == [0, 1, 3, 2, 6, 7, 5, 4]
    assert zigzag((3, 4)) is zigzag((3, 4), 0)


def test_zigzag_frames_alternate():
    frame, video = zigzag((3, 4), 5).order, zigzag((3, 3, 4), 5).order.reshape(3, 12)
    assert torch.equal(video, torch.stack([frame, 12 + frame.flip(0), 24 + frame]))


def test_zigzag_layers():
    assert zigzag_layers((4, 4), 0) == []
    layers = zigzag_layers((4, 6), 19)
    assert len(layers) == 19 and all(p is zigzag((4, 6), i % 8) for i, p in enumerate(layers))


@pytest.mark.parametrize("scheme", range(8))
def test_zigzag_video(scheme):
    T, H, W = shape = (3, 4, 5)
    spatial, temporal = zigzag_video(shape, scheme)
    frame = zigzag((H, W), scheme).order
    x = torch.randn(2, T * H * W)
    pieces = x[:, spatial.order].reshape(2, T, H * W)
    assert torch.equal(pieces, x.reshape(2, T, H * W)[:, :, frame])
    pieces = x[:, temporal.order].reshape(2, H * W, T)
    assert torch.equal(pieces, x.reshape(2, T, H * W)[:, :, frame].transpose(1, 2))
    assert jumps(spatial) == (T - 1 if H * W > 1 else 0)


def check_bisected(cells: np.ndarray, size: int) -> None:
    """cells [size^d, d], one run of a path through a cube: so is each of its 2^d halves, recursively."""
    if size == 1:
        return
    parts = 2 ** cells.shape[1]
    for run in np.split(cells, parts):
        low = run.min(0)
        assert (run.max(0) - low == size // 2 - 1).all()
        check_bisected(run - low, size // 2)


@pytest.mark.parametrize("k", range(1, 6))
def test_hilbert_quadrants(k):
    n = 2**k
    path = hilbert((n, n))
    assert path.order[0] == 0 and path.order[-1] == n - 1
    check_bisected(places(path), n)


@pytest.mark.parametrize("k", range(1, 5))
def test_hilbert_octants(k):
    n = 2**k
    path = hilbert((n, n, n))
    assert path.order[0] == 0 and path.order[-1] == n - 1
    check_bisected(places(path), n)


@pytest.mark.parametrize("k", range(1, 7))
def test_hilbert_is_the_hilbert_curve(k):
    """From the substitution A = B-up A right A down C, on complex numbers: row + i column."""
    curve = np.zeros(1, complex)
    for n in 2 ** np.arange(k):  # curve: from 0 to i (n-1), columns across
        turned = curve.imag + 1j * curve.real
        down = (n - 1 - curve.imag) + 1j * (n - 1 - curve.real)
        curve = np.concatenate([turned, n + curve, n + 1j * n + curve, 1j * n + down])
    order = curve.real * 2**k + curve.imag
    assert np.array_equal(hilbert((2**k, 2**k)).order.numpy(), order)


@pytest.mark.parametrize(
    "shape, end",
    [
        ((6, 10), (0, 9)),  # the longest side is even
        ((10, 6), (9, 0)),
        ((7, 9), (0, 8)),  # all are odd
        ((6, 6), (0, 5)),
        ((6, 7), (5, 0)),  # the longest is odd, the other one even and nearly as long
        ((7, 6), (0, 5)),
        ((4, 31), (3, 28)),  # ... and much shorter: the last three columns downwards
        ((31, 4), (28, 3)),
        ((1, 5), (0, 4)),
        ((3, 4, 6), (0, 0, 5)),
    ],
)
def test_hilbert_ends(shape, end):
    path = hilbert(shape)
    assert path.order[0] == 0
    assert tuple(places(path)[-1].tolist()) == end


@pytest.mark.parametrize("shape", [(64, 64), (60, 104), (63, 65), (45, 80), (50, 75)])
def test_hilbert_is_local(shape):
    """32 steps cover a patch of about 32 tokens, where a snake covers a strip."""

    def spread(path: ScanPath) -> float:
        cells = places(path)[: len(path) // 32 * 32].reshape(-1, 32, 2)
        return float(np.linalg.norm(cells.max(1) - cells.min(1), axis=1).mean())

    assert spread(hilbert(shape)) < 0.4 * spread(zigzag(shape, 0))


def test_cached():
    assert zigzag((4, 4), 0) is zigzag((4, 4), 0)
    assert zigzag([4, 4], 0) is zigzag(torch.Size([4, 4]), np.int64(0))
    assert sweep((4, 4)) is sweep((4, 4), transpose=False) and sweep((4, 4)) is not sweep((4, 4), True)
    assert hilbert((4, 4)) is hilbert([4, 4])
    assert zigzag_video((2, 4, 4), 3)[1] is zigzag_video((2, 4, 4), 3)[1]
    custom = from_order([1, 0, 2])
    assert custom is from_order(torch.tensor([1, 0, 2])) is from_order(np.array([1, 0, 2], np.uint8))
    assert custom is not from_order([1, 0, 2], name="mine")
    assert custom is not from_order([1, 0, 2], (1, 3))


def test_equality():
    every = [p for kind in EVERY for shape in ((2, 2, 2), (2, 2, 3)) for p in EVERY[kind](shape)]
    every += [p.reversed() for p in every]
    assert len(set(every)) == len(every)
    assert all((p == q) == (p is q) for p in every for q in every)
    assert zigzag((4, 4), 0) == zigzag((4, 4), 0).to("meta")
    assert hash(zigzag((4, 4), 0)) == hash(zigzag((4, 4), 0).to("meta"))
    with pytest.raises(AttributeError):
        zigzag((4, 4), 0).name = "other"


def test_devices_and_directions():
    path = hilbert((3, 4))
    there = path.to("meta")
    assert there.order.device.type == there.inverse.device.type == "meta"
    assert path.to("cpu") is path and path.to(torch.device("meta")) is there and there.to("cpu") is path
    assert path.reversed().reversed() is path
    assert there.reversed() is path.reversed().to("meta")
    assert torch.equal(path.reversed().order, path.order.flip(0))
    assert path.reversed() != path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_cuda():
    path = hilbert((3, 4)).to("cuda")
    assert path is hilbert((3, 4)).to(torch.device("cuda", torch.cuda.current_device()))
    assert torch.equal(path.order.cpu(), hilbert((3, 4)).order)
    assert path.reversed().order.is_cuda and path.to("cpu") is hilbert((3, 4))


def test_copies_are_the_path():
    custom = from_order([2, 0, 1])
    for path in (
        zigzag((4, 5), 3),
        *zigzag_video((2, 3, 4), 1),
        sweep((4, 5), True),
        hilbert((4, 5)),
        custom,
    ):
        for one in (path, path.reversed(), path.to("meta"), path.to("meta").reversed()):
            assert copy.deepcopy(one) is one and copy.copy(one) is one
            assert pickle.loads(pickle.dumps(one)) is one


def test_repr():
    assert repr(zigzag((8, 6), 3)) == "<ScanPath zigzag((8, 6), scheme=3), 48 tokens on cpu>"
    assert repr(hilbert((4, 4)).to("meta")) == "<ScanPath hilbert((4, 4)), 16 tokens on meta>"


def test_compiles():
    path = zigzag((4, 6), 3)

    def there_and_back(x, path):
        path = path.to(x.device)
        return x[:, path.order][:, path.inverse] + len(path) + x[:, path.reversed().order]

    x = torch.randn(2, 24, 3)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, path), there_and_back(x, path))


@pytest.mark.parametrize("shape", [(1024, 1024), (999, 1001), (997, 1024), (21, 180, 270)])
def test_speed(shape):
    """A second of CPU time for about 10^6 tokens; it takes about a tenth."""
    for build in (
        lambda: hilbert(shape),
        lambda: zigzag(shape, 7),
        lambda: sweep(shape, True),
        lambda: from_order(zigzag(shape, 7).order),
    ):
        paths._hilbert.cache_clear()
        paths._zigzag.cache_clear()
        paths._sweep.cache_clear()
        start = time.process_time()
        build()
        assert time.process_time() - start < 1


BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "zero": (lambda: zigzag((0, 4), 0), ValueError, ["zigzag", "shape", "(0, 4)", "(H, W)", "1"]),
    "negative": (lambda: hilbert((4, -4)), ValueError, ["hilbert", "shape", "(4, -4)"]),
    "one side": (lambda: sweep((4,)), ValueError, ["sweep", "(4,)", "1 dim", "(H, W)", "(T, H, W)"]),
    "four sides": (lambda: hilbert((1, 2, 3, 4)), ValueError, ["hilbert", "4 dim", "(T, H, W)"]),
    "number": (lambda: zigzag(4, 0), TypeError, ["zigzag", "shape", "4", "int", "(H, W)"]),
    "text": (lambda: zigzag("44", 0), TypeError, ["zigzag", "shape", "str"]),
    "fraction": (lambda: hilbert((4.0, 4)), TypeError, ["hilbert", "shape", "4.0", "float"]),
    "bool": (lambda: hilbert((True, 4)), TypeError, ["hilbert", "shape", "True", "bool"]),
    "huge": (lambda: sweep((2**16, 2**15)), ValueError, ["sweep", "2147483648", "2^31"]),
    "scheme 8": (lambda: zigzag((4, 4), 8), ValueError, ["zigzag", "scheme", "8", "0 to 7", "i % 8"]),
    "scheme -1": (lambda: zigzag_video((2, 4, 4), -1), ValueError, ["zigzag_video", "-1", "0 to 7"]),
    "scheme type": (lambda: zigzag((4, 4), 1.0), TypeError, ["zigzag", "scheme", "1.0", "0 to 7"]),
    "scheme name": (lambda: zigzag((4, 4), "rows"), TypeError, ["scheme", "'rows'", "0 to 7"]),
    "transpose": (lambda: sweep((4, 4), "yes"), TypeError, ["sweep", "transpose", "'yes'", "True"]),
    "depth": (lambda: zigzag_layers((4, 4), -1), ValueError, ["zigzag_layers", "depth", "-1"]),
    "depth type": (lambda: zigzag_layers((4, 4), None), TypeError, ["zigzag_layers", "depth", "None"]),
    "no video": (lambda: zigzag_video((4, 4), 0), ValueError, ["zigzag_video", "2 dim", "(T, H, W)"]),
    "twice": (
        lambda: from_order([0, 2, 2]),
        ValueError,
        ["from_order", "2 2 times", "1 never", "0 to 2"],
    ),
    "too big": (lambda: from_order([0, 3, 1]), ValueError, ["from_order", "order", "3 steps", "0 to 2"]),
    "below 0": (lambda: from_order([0, -1]), ValueError, ["from_order", "order", "-1", "0 to 1"]),
    "two axes": (lambda: from_order([[0, 1]]), ValueError, ["from_order", "order", "(1, 2)", "[L]"]),
    "empty": (lambda: from_order([]), ValueError, ["from_order", "order", "(0,)", "1 <= L"]),
    "floats": (lambda: from_order([0.0, 1.0]), TypeError, ["from_order", "float64", "integers"]),
    "bfloat16": (
        lambda: from_order(torch.zeros(1, dtype=torch.bfloat16)),
        TypeError,
        ["from_order", "bfloat16", "integers"],
    ),
    "meta": (
        lambda: from_order(torch.zeros(1, dtype=torch.int32, device="meta")),
        ValueError,
        ["from_order", "order", "meta"],
    ),
    "ragged": (lambda: from_order([[0], [1, 2]]), TypeError, ["from_order", "order", "integers"]),
    "name": (lambda: from_order([0], name=3), TypeError, ["from_order", "name", "int", "str"]),
    "other shape": (
        lambda: from_order([0, 1, 2], (2, 2)),
        ValueError,
        ["from_order", "(2, 2)", "4 tokens", "order has 3"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value), raised.value
