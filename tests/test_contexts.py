"""Every op within what torch wraps around it: out= in a graph, forward mode, threads, meta tensors
(tests/test_matrix.py has compile, export and the transforms). The cases come from the table of ops, so that a
new op is in here by itself."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

import pydiffuse as pd
from pydiffuse._core import dispatch
from tests.helpers import GPU, leaves
from tests.launched import STEMS, made

pytestmark = pytest.mark.skipif(GPU, reason="the same on every device")
F32 = torch.float32


def firsts() -> dict[str, tuple]:
    """The first float32 case of every op that has kernels: (case, arguments)."""
    found: dict[str, tuple] = {}
    for stem in STEMS:
        for _, case, given, _ in made(stem, False):
            unsized = case.op == "routed_linear" and "sizes" not in given[1]  # a graph needs them
            if pd.OPS[case.op].kernels and case.op not in found and not unsized:
                found[case.op] = case, tree_map(_float, given)
    return found


def _float(t):
    return t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


FIRST = firsts()
NO_GRADIENT = ("select_patches", "dual_loop_t", "selective_state_update")


def call(op: str):
    case, given = FIRST[op]
    return lambda given=given: getattr(pd, case.op)(*given[0], **given[1])


OUT = {  # what each op with out= writes to, as (arguments with out, what is written)
    "cfg": lambda h, o: pd.cfg(h, h, 3.0, out=o),
    "tcfg": lambda h, o: pd.tcfg(h, h + 1, 3.0, out=o),
    "apg": lambda h, o: pd.apg(h, h + 1, 3.0, out=o),
    "combine": lambda h, o: pd.combine([h, h], torch.ones(2), out=o),
    "guide": lambda h, o: pd.guide([h, h], "cfg", x=h, scale=2.0, out=o),
    "slerp": lambda h, o: pd.slerp(h, h + 1, 0.5, out=o),
    "modulate": lambda h, o: pd.modulate(h, torch.ones(1, 2, 8), torch.zeros(1, 1, dtype=torch.int32), out=o),
    "gate_residual_modulate": lambda h, o: pd.gate_residual_modulate(
        h, h, torch.ones(1, 3, 8), torch.zeros(1, 1, dtype=torch.int32), out=(torch.empty_like(h), o)
    )[1],
    "scatter_tokens": lambda h, o: pd.scatter_tokens(h, h[:, :1] + 1, torch.zeros(2, 1, dtype=torch.int32), out=o),
    "noise_patches": lambda h, o: pd.noise_patches(
        h[:, None], 0.5, 1, noise=h[:, None], out=(o[:, None], torch.empty_like(h[:, None]))
    )[0],
    "patch_step": lambda h, o: pd.patch_step(h[:, None], h[:, None], 0.25, 0.5, 1, out=o[:, None])[0],
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("op", OUT)
def test_out_is_an_operation_in_place(op, backend):
    """What a backward saved and out= overwrites is an error there, as of h.mul_(3)."""
    x = torch.randn(2, 4, 8, requires_grad=True)
    with pd.use_backend(backend):
        h = x.exp()
        with torch.no_grad():
            OUT[op](h, h)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()
        with pytest.raises((ValueError, RuntimeError), match="grad"):
            OUT[op](x.detach(), torch.nn.Parameter(torch.randn(2, 4, 8)))


@pytest.mark.parametrize("op", [op for op in FIRST if op not in NO_GRADIENT])
def test_forward_mode_is_no_silent_zero(op):
    """A tangent comes out, or an error; never a result that has lost it."""
    case, given = FIRST[op]

    def dual(t):
        floats = isinstance(t, torch.Tensor) and t.dtype is F32 and t.dim() > 1
        return forward_ad.make_dual(t, torch.ones_like(t)) if floats else t

    with forward_ad.dual_level():
        try:
            found = leaves(getattr(pd, case.op)(*tree_map(dual, given[0]), **tree_map(dual, given[1])))
        except (NotImplementedError, RuntimeError):
            return
        assert any(forward_ad.unpack_dual(t).tangent is not None for t in found)


def test_a_backend_belongs_to_its_thread_and_task():
    seen, inside = {}, threading.Event()
    go = threading.Event()

    def other():
        with pd.use_backend("reference"):
            inside.set()
            go.wait(10)
            seen["other"] = dispatch.forced()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen["main"] = dispatch.forced()
    with pd.use_backend("cpu"):
        go.set()
        thread.join()
        seen["within"] = dispatch.forced()
    seen["after"] = dispatch.forced()
    assert seen == {"other": "reference", "main": None, "within": "cpu", "after": None}
    assert dispatch._traced is None  # what compiled graphs go by

    async def task(backend):
        with pd.use_backend(backend):
            await asyncio.sleep(0)
            return dispatch.forced()

    async def both():
        return await asyncio.gather(task("reference"), task("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"] and dispatch.forced() is None


@pytest.mark.parametrize("op", [op for op in FIRST if op != "selective_state_update"])
def test_meta_tensors_have_shapes(op):
    case, given = FIRST[op]
    expected = leaves(call(op)())
    on_meta = tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, given)
    found = leaves(getattr(pd, case.op)(*on_meta[0], **on_meta[1]))
    assert [(t.shape, t.dtype, t.device.type) for t in found] == [
        (t.shape, t.dtype, "meta") for t in expected
    ]
