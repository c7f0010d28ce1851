"""Functions on arrays give the bits of the torch functions, whatever the array."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import pydiffuse
import pydiffuse.numpy as pn
from tests.cases import guidance
from tests.helpers import doubled, leaves, relative_error

MAKERS = {
    "guidance": (guidance, lambda dtype, shapes: [guidance.Maker(s, dtype) for s in shapes]),
}
CASES = [
    (stem, case) for stem, (cases, _) in MAKERS.items() for case in cases.CASES if hasattr(pn, case.op)
]
BY_OP = {case.op: (stem, case) for stem, case in CASES}


def makers(stem, dtype):
    """A maker for each shape of the family; of narrow dtypes one is enough."""
    family, make = MAKERS[stem]
    return make(dtype, list(family.SHAPES.values())[: None if dtype is torch.float32 else 1])


OTHER_BITS = {"superpose", "tcfg-many"}
"""A little linear algebra or a few functions of NumPy's own, held to the reference in float64."""


def as_array(t):
    if not isinstance(t, torch.Tensor):
        return t
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def as_tensor(a):
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def call(op, arguments):
    args, kwargs = arguments
    found = getattr(pn, op)(*args, **kwargs)
    return list(found) if isinstance(found, tuple) else [found]


def same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(
            np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("stem", "case"), CASES, ids=lambda v: getattr(v, "id", v))
def test_same_as_torch(stem, case, dtype):
    family = MAKERS[stem][0]
    for maker in makers(stem, dtype):
        given = case.make(maker)
        found = call(case.op, tree_map(as_array, given))
        expected = leaves(getattr(pydiffuse, case.op)(*given[0], **given[1]))
        if OTHER_BITS.isdisjoint((case.op, case.id)):
            same_bits(found, [as_array(t) for t in expected])
            continue
        with pydiffuse.use_backend("reference"):
            right = leaves(getattr(pydiffuse, case.op)(*doubled(given[0]), **doubled(given[1])))
        for a, b, c in zip(found, expected, right, strict=True):
            assert as_tensor(a).dtype == b.dtype
            assert relative_error(as_tensor(a), c) <= family.TOLERANCE[dtype].value


def fortran(a):
    return np.asfortranarray(a)


def backwards(a):
    every = (slice(None, None, -1),) * a.ndim
    return a[every].copy()[every]


def apart(a):
    return np.repeat(a, 2, -1)[..., ::2] if a.ndim else a


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def swapped(a):
    return a.byteswap().view(a.dtype.newbyteorder(">"))


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    memory[:] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    return memory.view(a.dtype).reshape(a.shape)


class Producer:
    """What has its memory to show, and nothing of NumPy's."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


LAYOUTS = [fortran, backwards, apart, read_only, swapped, unaligned, Producer]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", BY_OP)
def test_any_array(op, layout):
    stem, case = BY_OP[op]
    # NumPy's DLPack has no bfloat16.
    given = tree_map(
        as_array, case.make(makers(stem, torch.float16 if layout is Producer else torch.bfloat16)[0])
    )
    changed = tree_map(lambda a: layout(a) if isinstance(a, np.ndarray) else a, given)
    same_bits(call(op, changed), call(op, given))


@pytest.mark.parametrize("op", [op for op in BY_OP if op not in ("gram", "superpose")])
def test_out(op):
    stem, case = BY_OP[op]
    given = tree_map(as_array, case.make(makers(stem, torch.float32)[0]))
    expected = call(op, given)
    firsts = [
        a for a in np_leaves(given) if a.shape == expected[0].shape and a.dtype == expected[0].dtype
    ]
    for make in (
        np.empty_like,
        lambda a: backwards(np.empty_like(a)),
        lambda a: np.empty((*a.shape, 2), a.dtype)[..., 1],
        lambda a: np.empty_like(a).astype(a.dtype.newbyteorder(">")),
    ):
        outs = [make(a) for a in expected]
        found = call(op, (given[0], given[1] | {"out": outs[0] if len(outs) == 1 else tuple(outs)}))
        assert all(a is b for a, b in zip(found, outs, strict=True))
        same_bits([np.asarray(a, a.dtype.newbyteorder("=")) for a in found], expected)
    # An input as its own output, itself and shifted: as if it had been another array.
    for i in range(len(firsts)):
        for shift in (0, 1):
            copies = tree_map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, given)
            same = [
                a
                for a in np_leaves(copies)
                if a.shape == expected[0].shape and a.dtype == expected[0].dtype
            ]
            memory = np.zeros(same[i].size + 1, same[i].dtype)
            mine = memory[shift : shift + same[i].size].reshape(same[i].shape)
            mine[...] = same[i]
            copies = tree_map(lambda a, old=same[i], new=mine: new if a is old else a, copies)
            outs = [memory[: mine.size].reshape(mine.shape), *map(np.empty_like, expected[1:])]
            found = call(op, (copies[0], copies[1] | {"out": outs[0] if len(outs) == 1 else tuple(outs)}))
            same_bits(found, expected)
    for wrong, words in (
        (read_only(expected[0]), "read-only"),
        (expected[0].astype(np.float64), "accepted: a float32 array"),
        (np.zeros((*expected[0].shape, 2), np.float32), "accepted: a float32 array"),
        ([1.0], "accepted: a"),
    ):
        rest = expected[1:]
        with pytest.raises((ValueError, TypeError), match=f"{op}: .*{words}"):
            call(op, (given[0], given[1] | {"out": (wrong, *rest) if rest else wrong}))
    if len(expected) > 1:
        with pytest.raises(ValueError, match="another output"):
            call(op, (given[0], given[1] | {"out": (expected[0],) * len(expected)}))


def np_leaves(given):
    found = []
    tree_map(lambda a: found.append(a) if isinstance(a, np.ndarray) else None, given)
    return found


def test_threads_change_no_bit():
    c, u = (np.random.default_rng(i).standard_normal((3, 200, 700), np.float32) for i in range(2))
    expected, before = pn.tcfg(c, u, 7.5), pn.num_threads()
    try:
        for threads in (1, 3):
            pn.set_num_threads(threads)
            assert pn.num_threads() == threads and np.array_equal(pn.tcfg(c, u, 7.5), expected)
    finally:
        pn.set_num_threads(before)
    assert pn.cpu_capability() in ("default", "avx2", "avx512")


def test_no_torch():
    code = "import pydiffuse.numpy, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bad_arrays():
    c = np.ones((2, 5), np.float32)
    for bad, error, word in (
        (lambda: pn.cfg(c, c[:, :4], 2.0), ValueError, "(2, 4)"),
        (lambda: pn.cfg(c, c.astype(np.int32), 2.0), TypeError, "int32"),
        (lambda: pn.cfg(c, c.astype(np.float16), 2.0), ValueError, "dtype"),
        (lambda: pn.cfg(c.astype(np.float64), c, 2.0), TypeError, "float64"),
        (lambda: pn.cfg(np.float32(1), np.float32(2), 2.0), ValueError, "no batch dimension"),
        (lambda: pn.cfg(np.ma.masked_less(c, 0), c, 2.0), TypeError, "mask"),
        (lambda: pn.cfg("c", c, 2.0), TypeError, "cfg: the first prediction"),
        (lambda: pn.cfg(c, c, None), TypeError, "scale is None"),
        (lambda: pn.cfg(c, c, "3"), TypeError, "scale is '3'"),
        (lambda: pn.cfg(c, c, 1j), TypeError, "scale"),
        (lambda: pn.tcfg(c, c, np.ones(3)), ValueError, "scale"),
        (lambda: pn.tcfg([c, c], c, [1.0]), ValueError, "2"),
        (lambda: pn.compose([c], c, [1.0, 2.0]), ValueError, "weights"),
        (lambda: pn.compose(c, c, [1.0, 2.0]), TypeError, "conds"),
        (lambda: pn.guide([c, c], "best", x=c), ValueError, "best"),
        (lambda: pn.guide([c], "tcfg", scale=1.0, x=c), ValueError, "uncond"),
        (lambda: pn.guide([c, c], "cfg", scale=1.0, x=c, h=0.5), ValueError, "history"),
        (lambda: pn.guide([c, c], "cfg", scale=1.0, x=c, s=np.ones(2)), ValueError, "noise"),
        (lambda: pn.guide([c, c, c], "apg", scale=1.0, x=c), ValueError, "momentum"),
        (lambda: pn.combine([c, c], np.ones((2, 3))), ValueError, "coefficients"),
        (lambda: pn.gram([]), TypeError, "preds"),
        (lambda: pn.superpose([c], np.zeros(1), 0.0), ValueError, "step"),
        (lambda: pn.superpose([c], np.zeros(2), 0.1), ValueError, "log_density"),
        (lambda: pn.set_num_threads(0), ValueError, "1 to"),
    ):
        with pytest.raises(error, match=word.replace("(", r"\(").replace(")", r"\)")):
            bad()
