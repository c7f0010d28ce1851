"""patch() and unpatch(): whoever holds a function of mamba_ssm or causal_conv1d, whenever it took it."""

from __future__ import annotations

import functools
import importlib
import sys
import types

import pytest
import torch

from pydiffuse.integrations import mamba_ssm as names
from tests.helpers import check_refused

SCAN = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
UPDATE = "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False"
CONV = "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,"
CONV += " final_states_out=None, activation=None"
SOURCES = {  # as in the packages: where functions are defined, who takes them, what is a module by a function's name
    "causal_conv1d.causal_conv1d_interface": f"def causal_conv1d_fn({CONV}): return 'theirs'",
    "causal_conv1d": "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn",
    "mamba_ssm.ops": "",
    "mamba_ssm.ops.selective_scan_interface": f"def selective_scan_fn({SCAN}): return 'theirs'",
    "mamba_ssm": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn",
    "mamba_ssm.ops.triton": "",
    "mamba_ssm.ops.triton.selective_state_update": f"def selective_state_update({UPDATE}): return 'theirs'",
    "mamba_ssm.modules.mamba_simple": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan\n"
    "from mamba_ssm.ops.triton.selective_state_update import selective_state_update\n"
    "from causal_conv1d import causal_conv1d_fn\ncausal_conv1d_update = None",
}
U = torch.ones(1, 2, 3)
GIVEN = (U, U, -torch.ones(2, 4), *torch.ones(2, 1, 4, 3))


def load(monkeypatch, sources):
    """Modules of these sources, run in their order."""
    for name in sources:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, source in sources.items():
        module = sys.modules[name]
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent in sources:
            setattr(sys.modules[parent], child, module)
        exec(compile(source, name, "exec"), vars(module))
    return [sys.modules[name] for name in sources]


@pytest.fixture
def theirs(monkeypatch):
    order = ("conv", "causal_conv1d", "ops", "scan", "package", "triton", "update", "layer")
    yield types.SimpleNamespace(**dict(zip(order, load(monkeypatch, SOURCES), strict=True)))
    names.unpatch()


@pytest.fixture
def user(theirs, monkeypatch):
    """Took a function by another name, and in a closure, as transformers does."""
    (module,) = load(
        monkeypatch, {"user": "from mamba_ssm import selective_scan_fn as fast\nstate = None"}
    )

    def chosen(fallback, implementation):
        @functools.wraps(fallback)
        def wrapped(*args):
            return implementation(*args)

        return wrapped

    module.wrapped = chosen(lambda *_: "fallback", module.fast)
    return module


def serves(function):
    y = function(*GIVEN)
    return isinstance(y, torch.Tensor) and torch.equal(y, names.selective_scan_fn(*GIVEN))


def test_wherever_they_are_held(theirs, user):
    before = {m.__name__: dict(vars(m)) for m in (*vars(theirs).values(), user)}
    places = names.patch()
    assert places == [
        "causal_conv1d.causal_conv1d_fn",
        "causal_conv1d.causal_conv1d_interface.causal_conv1d_fn",
        "mamba_ssm.modules.mamba_simple.causal_conv1d_fn",
        "mamba_ssm.modules.mamba_simple.causal_conv1d_update",
        "mamba_ssm.modules.mamba_simple.scan",
        "mamba_ssm.modules.mamba_simple.selective_state_update",
        "mamba_ssm.ops.selective_scan_interface.selective_scan_fn",
        "mamba_ssm.ops.triton.selective_state_update.selective_state_update",
        "mamba_ssm.selective_scan_fn",
        "user.fast",
        "user.wrapped",
    ]
    for function in (theirs.scan.selective_scan_fn, theirs.layer.scan, user.fast, user.wrapped):
        assert serves(function)
    assert user.state is None and theirs.triton.selective_state_update is theirs.update
    assert theirs.layer.causal_conv1d_update(U[..., 0], torch.zeros(1, 2, 3), torch.ones(2, 4)).shape == (
        1,
        2,
    )
    assert set(places) >= set(names.patch())  # once more changes nothing
    assert names.unpatch() == places and names.unpatch() == []
    for m in (*vars(theirs).values(), user):
        assert vars(m) == before[m.__name__]
    assert user.wrapped(*GIVEN) == theirs.scan.selective_scan_fn(*GIVEN) == "theirs"


def test_who_comes_later(theirs, monkeypatch):
    names.patch()
    (late,) = load(
        monkeypatch, {"late": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn"}
    )
    assert serves(late.selective_scan_fn)
    names.unpatch()
    assert late.selective_scan_fn(*GIVEN) == "theirs"
    monkeypatch.setattr(late, "selective_scan_fn", names.selective_scan_fn)
    names.unpatch()
    assert late.selective_scan_fn is names.selective_scan_fn  # asked for by its name: it stays


def test_a_copy(theirs, user, monkeypatch):
    inner = SCAN.replace(
        "u, delta", "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight"
    ).split(", C")[0]
    copies = load(
        monkeypatch,
        {
            "dis_mamba": "",
            "dis_mamba.ops": f"def selective_scan_fn({SCAN}): return 'copy'\n"
            f"def mamba_inner_fn_no_out_proj({inner}=None, C=None): return 'copy'",
            "dis_mamba.layer": "from causal_conv1d import causal_conv1d_fn",
        },
    )
    (other,) = load(monkeypatch, {"other": "from dis_mamba.ops import selective_scan_fn"})
    places = names.patch(copies[0])
    assert places == [
        "dis_mamba.layer.causal_conv1d_fn",
        "dis_mamba.ops.mamba_inner_fn_no_out_proj",
        "dis_mamba.ops.selective_scan_fn",
        "other.selective_scan_fn",
    ]
    assert serves(other.selective_scan_fn) and user.fast(*GIVEN) == "theirs"
    assert theirs.conv.causal_conv1d_fn(U, U) == "theirs"
    assert names.unpatch() == places and other.selective_scan_fn(*GIVEN) == "copy"


def test_once_more_for_what_was_missed(theirs, monkeypatch):
    original = theirs.scan.selective_scan_fn
    names.patch()
    (late,) = load(monkeypatch, {"late": ""})
    late.kept = original
    assert "late.kept" in names.patch() and serves(late.kept)
    names.unpatch()
    assert late.kept is original


def test_another_order_of_arguments(monkeypatch):
    """causal_conv1d's before it took states."""
    (old,) = load(
        monkeypatch,
        {"old": "def causal_conv1d_fn(x, weight, bias=None, activation=None): return 'theirs'"},
    )
    names.patch(old)
    x, weight, bias = torch.randn(1, 2, 5), torch.randn(2, 4), torch.randn(2)
    expected = names.causal_conv1d_fn(x, weight, bias, activation="silu")
    assert torch.equal(old.causal_conv1d_fn(x, weight, bias, "silu"), expected)
    assert torch.equal(old.causal_conv1d_fn(x, weight, activation="silu", bias=bias), expected)
    names.unpatch()


def test_refused(theirs, monkeypatch):
    check_refused(lambda: names.patch("mamba_ssm"), TypeError, ["mamba_ssm.patch", "module is a str"])
    empty, odd = load(
        monkeypatch,
        {"empty": "", "odd": "def selective_scan_fn(u, dt): pass\ndef causal_conv1d_update(x): pass"},
    )
    check_refused(
        lambda: names.patch(empty), ValueError, ["mamba_ssm.patch", "empty", "selective_scan_fn"]
    )
    before = dict(vars(odd))
    check_refused(lambda: names.patch(odd), ValueError, ["odd.selective_scan_fn", "u, dt", "u, delta, A"])
    assert vars(odd) == before


def test_nothing_to_patch(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for name in list(sys.modules):
        if name.split(".")[0] in ("mamba_ssm", "causal_conv1d"):
            monkeypatch.delitem(sys.modules, name)
    check_refused(names.patch, ImportError, ["mamba_ssm.patch", "can be imported", "patch(module)"])
