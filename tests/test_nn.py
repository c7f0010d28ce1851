"""pydiffuse.nn and mamba_ssm's names: parameters, paths, both directions, against the references."""

from __future__ import annotations

import copy
import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import pydiffuse
from pydiffuse.integrations import mamba_ssm as names
from pydiffuse.nn import ZigzagMamba
from pydiffuse.paths import zigzag, zigzag_layers
from tests.helpers import DEVICE, relative_error


def test_parameters_are_those_of_mamba_ssm():
    layer = ZigzagMamba(32, d_state=8, d_conv=3, expand=3, path=zigzag((3, 4)))
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (192, 32),
        "conv1d.weight": (96, 1, 3),
        "conv1d.bias": (96,),
        "x_proj.weight": (2 + 16, 96),
        "dt_proj.weight": (96, 2),
        "dt_proj.bias": (96,),
        "A_log": (96, 8),
        "D": (96,),
        "out_proj.weight": (32, 96),
    }
    delta = F.softplus(layer.dt_proj.bias)
    assert ((delta > 0.0009) & (delta < 0.11)).all()
    assert torch.allclose(layer.A_log.exp()[5], torch.arange(1.0, 9.0))
    twice = ZigzagMamba(32, bidirectional=True, bias=True)
    for name in (
        "conv1d_b.weight",
        "x_proj_b.weight",
        "dt_proj_b.bias",
        "A_b_log",
        "D_b",
        "in_proj.bias",
    ):
        assert name in twice.state_dict()


def by_hand(layer, x, order, suffix=""):
    """One direction, written with torch's own functions and a loop."""
    conv, x_proj, dt_proj = (getattr(layer, n + suffix) for n in ("conv1d", "x_proj", "dt_proj"))
    A = -torch.exp(getattr(layer, "A_log" if not suffix else "A_b_log"))
    x, z = layer.in_proj(x)[:, order].mT.chunk(2, 1)
    L = x.shape[-1]
    x = F.silu(conv(x)[..., :L])
    dt, B, C = x_proj(x.mT).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    dt = F.softplus(dt_proj(dt))
    h, y = 0.0, []
    for l in range(L):
        h = torch.exp(dt[:, l, :, None] * A) * h + (dt[:, l] * x[..., l])[..., None] * B[:, l, None]
        y.append((h * C[:, l, None]).sum(-1) + getattr(layer, "D" + suffix) * x[..., l])
    y = torch.stack(y, 1) * F.silu(z).mT
    return torch.empty_like(y).index_copy(1, order, y)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_forward_and_gradients(bidirectional):
    torch.manual_seed(0)
    path = zigzag((3, 5), 3)
    layer = ZigzagMamba(12, d_state=4, path=path, bidirectional=bidirectional).to(DEVICE)
    x = torch.randn(2, 15, 12, device=DEVICE, requires_grad=True)
    y = layer(x)
    exact = copy.deepcopy(layer).double()
    wide = x.detach().double().requires_grad_()
    order = path.order.long().to(DEVICE)
    expected = by_hand(exact, wide, order)
    if bidirectional:
        expected = expected + by_hand(exact, wide, order.flip(0), "_b")
    expected = exact.out_proj(expected)
    assert relative_error(y, expected) < 5e-6
    w = torch.randn_like(expected)
    found = torch.autograd.grad((w * y).sum(), [x, *layer.parameters()])
    slopes = torch.autograd.grad((w * expected).sum(), [wide, *exact.parameters()])
    for a, b in zip(found, slopes, strict=True):
        assert relative_error(a, b) < 2e-5


def test_layers_of_a_model():
    """A path per layer, a path per call, sequences, averaging, other dtypes, copies."""
    x = torch.randn(2, 12, 16, device=DEVICE)
    layers = [ZigzagMamba(16, path=p).to(DEVICE) for p in zigzag_layers((3, 4), 2)]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    first, second = (layer(x) for layer in layers)
    assert not torch.equal(first, second)
    assert torch.equal(layers[0](x, path=layers[1].path), second)
    assert torch.equal(copy.deepcopy(layers[0])(x), first)
    halves = ZigzagMamba(16).to(DEVICE)
    cut = halves(x, cu_seqlens=(0, 5, 12))
    torch.testing.assert_close(cut, torch.cat([halves(x[:, :5]), halves(x[:, 5:])], 1))
    both = ZigzagMamba(16, bidirectional=True, average=True).to(DEVICE)
    assert both(x).shape == x.shape
    low = ZigzagMamba(16, dtype=torch.bfloat16, device=DEVICE)
    assert low(x.bfloat16()).dtype == torch.bfloat16 and low.A_log.dtype == torch.float32


def test_what_does_not_fit():
    layer = ZigzagMamba(16, path=zigzag((3, 4)))
    with pytest.raises(ValueError, match=r"ZigzagMamba: path .* 12 tokens.*13"):
        layer(torch.randn(2, 13, 16))
    with pytest.raises(ValueError, match=r"ZigzagMamba: x .* \(B, L, 16\)"):
        layer(torch.randn(2, 12, 8))
    with pytest.raises(ValueError, match="d_state is 300; accepted: 1 to 256"):
        ZigzagMamba(16, d_state=300)
    with pytest.raises(TypeError, match="path is a Tensor"):
        ZigzagMamba(16, path=torch.arange(4))


def test_names_of_mamba_ssm(monkeypatch):
    u, delta = torch.randn(2, 4, 9), torch.rand(2, 4, 9)
    A, B, C = -torch.rand(4, 3), torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    assert torch.equal(
        names.selective_scan_fn(u, delta, A, B, C), pydiffuse.selective_scan(u, delta, A, B, C)
    )
    accepted = list(inspect.signature(names.mamba_inner_fn).parameters)
    assert accepted[:8] == list(inspect.signature(pydiffuse.zigzag_mamba_inner).parameters)[:8]
    with pytest.raises(NotImplementedError, match="dt_rms_weight"):
        names.mamba_inner_fn(*[None] * 8, dt_rms_weight=u)
    with pytest.raises(ImportError, match="not loaded"):
        names.patch()
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = module.mamba_inner_fn = module.selective_state_update = None
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", module)
    assert len(names.patch()) == 2
    assert module.selective_scan_fn is names.selective_scan_fn
    assert module.selective_state_update is None
