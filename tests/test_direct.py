"""Direct calls: the usual call of an op is one op of the extension, with the general way's bits."""

from __future__ import annotations

import functools

import pytest
import torch

import pydiffuse as pd
from pydiffuse import plans
from pydiffuse._core import dispatch
from pydiffuse.paths import zigzag
from tests.helpers import GPU, leaves, run
from tests.launched import STEMS, made

pytestmark = pytest.mark.skipif(GPU, reason="of the CPU's kernels")


class Count:
    """Stands where direct calls are asked for, and counts those that gave a result."""

    def __init__(self, monkeypatch):
        self.served: list[str] = []
        for name in dispatch.DIRECT:
            packet = getattr(torch.ops.pydiffuse, name.split(".")[0])
            overload = name.split(".")[1]
            real = getattr(packet, overload)
            monkeypatch.setattr(packet, overload, functools.partial(self.call, name, real))

    def call(self, name, real, *args):
        out = real(*args)
        if out is not None and out is not False and not (isinstance(out, tuple) and out[0] is None):
            self.served.append(name)
        return out


@pytest.mark.parametrize("stem", STEMS)
def test_every_case_has_the_bits_of_the_general_way(stem, monkeypatch):
    count, cases = Count(monkeypatch), 0
    for label, case, given, _ in made(stem, True):
        if case.op == "selective_state_update" or not pd.OPS[case.op].kernels:
            continue  # writes its state; is composed, and may draw
        cases += 1
        torch.manual_seed(5)
        found = run(case, given, None)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "direct", lambda op, *tensors: None)
            torch.manual_seed(5)
            expected = run(case, given, None)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride(), label
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), label
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), label
    assert count.served, f"none of {cases} cases of {stem} was served directly"


X = torch.randn(2, 6, 8)
IMAGE, LEVELS = torch.randn(2, 4, 8, 8), torch.rand(2, 16)
WEIGHT, PARAMETERS = torch.randn(6, 4), -torch.rand(6, 4)
TIME = torch.randn(2, 4, 8)
Q = torch.randn(1, 2, 16, 8)
PLAN = plans.frames(4, 4, 1)
TABLE, ROWS = torch.randn(3, 3, 8), torch.tensor([[0], [2]])
IDS = torch.tensor([[3, 1], [0, 5]])
PATH = zigzag((2, 4))
OUT = torch.empty_like(IMAGE)
USUAL = {
    "guide.rule": [
        lambda: pd.cfg(IMAGE, X.new_ones(IMAGE.shape), 7.5),
        lambda: pd.tcfg(IMAGE.bfloat16(), IMAGE.bfloat16() + 1, 2, rescale=0.7, original=True),
        lambda: pd.compose([IMAGE, IMAGE + 1], IMAGE - 1, [1.0, -0.5]),
    ],
    "guide.new": [
        lambda: pd.guide([IMAGE, IMAGE + 1], "tcfg", x=IMAGE, a=1.0, b=0.1, scale=7.5),
        lambda: pd.apg(IMAGE, IMAGE + 1, 7.5, momentum=-0.5),
    ],
    "guide.into": [lambda: pd.tcfg(IMAGE, IMAGE + 1, 7.5, out=OUT)],
    "selective_scan.new": [
        lambda: pd.selective_scan(X, X.abs(), PARAMETERS, TIME, TIME),
        lambda: pd.selective_scan(X, X.abs(), PARAMETERS, TIME, TIME, path=PATH, reverse=True),
        lambda: pd.selective_scan(
            X.mT, X.mT.abs(), PARAMETERS, TIME.mT, TIME.mT, z=X.mT, return_last_state=True, layout="bld"
        ),
    ],
    "causal_conv1d.new": [
        lambda: pd.causal_conv1d(X, WEIGHT),
        lambda: pd.causal_conv1d(X.bfloat16(), WEIGHT.bfloat16(), path=PATH),
    ],
    "tile_attention.new": [
        lambda: pd.tile_attention(Q, Q, Q, PLAN),
        lambda: pd.tile_attention(*(Q.half().transpose(1, 2).contiguous().transpose(1, 2),) * 3, PLAN, scale=1),
    ],
    "modulate.new": [
        lambda: pd.modulate(X, TABLE[:, :2], ROWS),
        lambda: pd.gate_residual_modulate(X, X, TABLE, ROWS, norm=None),
    ],
    "gather_tokens.new": [lambda: pd.gather_tokens(X, IDS)],
    "scatter_tokens.new": [lambda: pd.scatter_tokens(X, X[:, :2].contiguous(), IDS)],
    "mix_patches.new": [
        lambda: pd.noise_patches(IMAGE, LEVELS, 2, noise=IMAGE + 1),
        lambda: pd.patch_step(IMAGE, IMAGE + 1, 0.25, LEVELS * 0 + 1, 2, mask=LEVELS > 0.5),
        lambda: pd.convert(IMAGE, IMAGE + 1, LEVELS[:, 0], "flow", "eps"),
    ],
    "select_patches.new": [
        lambda: pd.select_patches(LEVELS, 3),
        lambda: pd.select_patches(LEVELS, 3, as_mask=True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", dispatch.DIRECT)
def test_usual_calls_are_served(name, monkeypatch):
    count = Count(monkeypatch)
    for call in USUAL[name]:
        count.served.clear()
        found = leaves(call())
        assert count.served == [name]
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "direct", lambda op, *tensors: None)
            expected = leaves(call())
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("name", dispatch.DIRECT)
def test_gradients_modes_and_transforms_go_the_general_way(name, monkeypatch):
    """Nothing that looks on is passed by."""
    count = Count(monkeypatch)

    class Sub(torch.Tensor):
        pass

    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        USUAL[name][0]()
    assert not count.served and seen
    with torch.device("cpu"):
        USUAL[name][0]()
    assert not count.served
    with pd.use_backend("reference"):
        USUAL[name][0]()
    assert not count.served
    if name == "guide.rule":
        pd.cfg(IMAGE.clone().requires_grad_(), IMAGE, 2.0)
        pd.cfg(IMAGE.as_subclass(Sub), IMAGE, 2.0)
        torch.vmap(lambda c: pd.cfg(c, c, 2.0))(IMAGE[None])
        assert not count.served
        with torch.no_grad():
            pd.cfg(IMAGE.clone().requires_grad_(), IMAGE, 2.0)
        assert count.served


def test_memory_of_out_is_looked_at(monkeypatch):
    """out may be an input, not a part of one; what does not fit goes the general way, which refuses."""
    count = Count(monkeypatch)
    c, u = torch.randn(2, 3, 50)
    expected = pd.cfg(c, u, 3.0)
    count.served.clear()
    assert torch.equal(pd.cfg(c.clone(), u, 3.0, out=(d := u.clone())), expected) and d is not u
    e = c.clone()
    assert torch.equal(pd.cfg(e, u, 3.0, out=e), expected)
    assert count.served == ["guide.into"] * 2
    both = torch.randn(5, 50)
    with pytest.raises(ValueError, match="out overlaps"):
        pd.cfg(both[:3], u, 3.0, out=both[1:4])


def test_numbers_that_are_none_of_the_usual():
    """Levels out of range, rows and ids that are none: the general way has the words."""
    with pytest.raises(ValueError, match="outside"):
        pd.patch_step(IMAGE, IMAGE, LEVELS + 1, LEVELS, 2)
    with pytest.raises(ValueError, match="t_next"):
        pd.patch_step(IMAGE, IMAGE, LEVELS, 1.5, 2)
    with pytest.raises((TypeError, ValueError), match="t_next"):
        pd.patch_step(IMAGE, IMAGE, LEVELS, None, 2)
    with pytest.raises(ValueError, match="rows holds 7"):
        pd.modulate(X, TABLE[:, :2], torch.tensor([[7], [0]]))
    with pytest.raises(ValueError, match="twice"):
        pd.gather_tokens(X, torch.tensor([[1, 1], [0, 2]]))
