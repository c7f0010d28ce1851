"""The NumPy binding gives the bits of the torch binding, whatever the array."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import pydiffuse
import pydiffuse.numpy as pn
from tests.cases.guidance import CASES, SHAPES, Maker
from tests.helpers import leaves

DOOR = [c for c in CASES if hasattr(pn, c.op) and c.name != "many"]


def as_array(t):
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def as_arrays(value):
    if isinstance(value, torch.Tensor):
        return as_array(value)
    if isinstance(value, list | tuple):
        return type(value)(map(as_arrays, value))
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DOOR, ids=lambda case: case.id)
def test_same_bits_as_torch(case, dtype):
    for shape in SHAPES.values():
        args, kwargs = case.make(Maker(shape, dtype))
        expected = leaves(getattr(pydiffuse, case.op)(*args, **kwargs))
        found = getattr(pn, case.op)(
            *map(as_arrays, args), **{name: as_arrays(value) for name, value in kwargs.items()}
        )
        found = list(found) if isinstance(found, tuple) else [found]
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a.view(np.uint8), as_array(b).view(np.uint8))


def test_any_memory_layout_and_threads():
    c, u = (np.random.default_rng(i).standard_normal((3, 200, 70), np.float32) for i in range(2))
    expected = pn.tcfg(c, u, 7.5)
    assert np.array_equal(pn.tcfg(np.asfortranarray(c), u, 7.5), expected)
    assert np.array_equal(pn.tcfg(np.repeat(c, 2, 2)[..., ::2], u, np.full(3, 7.5)), expected)
    before = pn.num_threads()
    try:
        for threads in (1, 3):
            pn.set_num_threads(threads)
            assert pn.num_threads() == threads and np.array_equal(pn.tcfg(c, u, 7.5), expected)
    finally:
        pn.set_num_threads(before)
    assert pn.cpu_capability() in ("default", "avx2", "avx512")


def test_bad_arrays():
    c = np.ones((2, 5), np.float32)
    for call, error, word in (
        (lambda: pn.cfg(c, c[:, :4], 2.0), ValueError, "(2, 4)"),
        (lambda: pn.cfg(c, c.astype(np.int32), 2.0), TypeError, "int32"),
        (lambda: pn.cfg(c, c.astype(np.float16), 2.0), ValueError, "dtype"),
        (lambda: pn.tcfg(c, c, np.ones(3)), ValueError, "scale"),
        (lambda: pn.compose([c], c, [1.0, 2.0]), ValueError, "weights"),
        (lambda: pn.guide([c, c], "best", x=c), ValueError, "best"),
        (lambda: pn.guide([c], "tcfg", scale=1.0, x=c), ValueError, "uncond"),
        (lambda: pn.combine([c, c], np.ones((2, 3))), ValueError, "coefficients"),
        (lambda: pn.gram([]), ValueError, "0 arrays"),
        (lambda: pn.set_num_threads(0), ValueError, "1 to"),
    ):
        with pytest.raises(error, match=word.replace("(", r"\(").replace(")", r"\)")):
            call()
