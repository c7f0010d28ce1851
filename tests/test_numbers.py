"""Scalars and arrays of NumPy in the place of Python's numbers; outputs beside what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import pydiffuse
from tests.cases import CASES
from tests.helpers import leaves
from tests.test_numpy import MAKERS, makers

STEMS = {case.op: stem for stem, (family, _) in reversed(MAKERS.items()) for case in family.CASES}
NUMBERS = [case for case in CASES if case.op in STEMS]


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def rounded(value):
    return float(np.float32(value)) if isinstance(value, float) else value


def scalar_of(value):
    return np.float32(value) if isinstance(value, float) else np.int64(value)


def same(found, expected):
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case.id)
def test_scalars_of_numpy(case, backend):
    """Every number of a case, one of NumPy's in its place."""
    results = []
    for kind in (rounded, scalar_of):
        args, kwargs = case.make(makers(STEMS[case.op], torch.float32)[0])
        if not any(map(is_number, tree_leaves((args, kwargs)))):
            pytest.skip("no numbers")
        args, kwargs = tree_map(lambda v, k=kind: k(v) if is_number(v) else v, (args, kwargs))
        if "generator" not in kwargs:
            torch.manual_seed(0)
        with pydiffuse.use_backend(backend):
            results.append(getattr(pydiffuse, case.op)(*args, **kwargs))
    same(*results)


def test_scalars_of_numpy_in_modules_and_samplers():
    layer = pydiffuse.nn.ZigzagMamba(np.int64(16), d_state=np.int32(4))
    assert layer(torch.randn(1, 8, 16)).shape == (1, 8, 16)
    plan = pydiffuse.plans.frames(np.int64(2), np.int32(8), np.int8(1))
    assert plan is pydiffuse.plans.frames(2, 8, 1)
    assert pydiffuse.nn.TileAttention(np.int64(32), np.int64(2), plan)(torch.randn(1, 16, 32)).shape == (
        1,
        16,
        32,
    )
    assert pydiffuse.entropy_scale(np.int64(64), np.int64(9), 4) == pydiffuse.entropy_scale(64, 9, 4)
    x = torch.randn(2, 3, 8, 8)

    def model(x, t):
        return x, t

    for steps in (2, np.int64(2)):
        torch.manual_seed(0)
        found = pydiffuse.samplers.dual_loop(
            model, x, np.int64(4), steps=steps, certain=np.int64(2), inner=np.int8(2)
        )
    same(found, pydiffuse.samplers.dual_loop(model, x, 4, steps=2, certain=2))


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_offsets_as_arrays(kind):
    x, w = torch.randn(2, 6, 16), torch.randn(6, 3)
    expected = pydiffuse.causal_conv1d(x, w, cu_seqlens=[0, 5, 16])
    for offsets in (np.array([0, 5, 16], kind), list(np.array([0, 5, 16], kind)), (kind(0), 5, kind(16))):
        same(pydiffuse.causal_conv1d(x, w, cu_seqlens=offsets), expected)
    with pytest.raises(TypeError, match="cu_seqlens"):
        pydiffuse.causal_conv1d(x, w, cu_seqlens=np.array([0.0, 16.0]))
    with pytest.raises(ValueError, match="ending at 16"):
        pydiffuse.causal_conv1d(x, w, cu_seqlens=np.array([0, 15], kind))


def beside(*shape):
    """Two views of one storage that lie in each other's stretch of memory and share nothing."""
    both = torch.randn(shape[0], 2, *shape[1:])
    return both[:, 0], both[:, 1]


def woven(*shape):
    both = torch.randn(*shape, 2)
    return both[..., 0], both[..., 1]


@pytest.mark.parametrize("views", [beside, woven])
def test_an_output_beside_its_input(views):
    u = torch.randn(3, 4, 8)
    (x, out), rows, ids = views(3, 4, 8), torch.zeros(3, 4, dtype=torch.int64), torch.tensor([[1, 2]] * 3)
    table, other = torch.randn(1, 2, 8), torch.randn(3, 2, 8)
    for call in (
        lambda **kw: pydiffuse.cfg(x, u, 3.0, **kw),
        lambda **kw: pydiffuse.tcfg(u, x, 3.0, rescale=0.5, **kw),
        lambda **kw: pydiffuse.guide([u, u], "cfg", x=x, scale=2.0, **kw),
        lambda **kw: pydiffuse.combine([x, u], torch.ones(2), **kw),
        lambda **kw: pydiffuse.modulate(x, table, rows, **kw),
        lambda **kw: pydiffuse.scatter_tokens(x, other, ids, **kw),
        lambda **kw: pydiffuse.scatter_tokens(u, x[:, :2], ids, **kw),
        lambda **kw: pydiffuse.patch_step(x, u, 0.2, 0.4, (2,), **kw)[0],
    ):
        before = x.clone()
        expected = call()
        assert call(out=out) is out
        same(out, expected)
        assert torch.equal(x, before)
    memory = torch.randn(3 * 4 * 8 + 1)
    x, out = memory[:-1].view(3, 4, 8), memory[1:].view(3, 4, 8)
    with pytest.raises(ValueError, match="overlaps"):
        pydiffuse.cfg(x, u, 3.0, out=out)
