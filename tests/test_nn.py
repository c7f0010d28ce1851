"""pydiffuse.nn and mamba_ssm's names: parameters, paths, plans, rotations, against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import pydiffuse
from pydiffuse import plans
from pydiffuse.nn import TileAttention, ZigzagMamba
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


def attention_by_hand(layer, x, plan, angles=None):
    """One head at a time, one batch of dense masks, rotations as complex numbers."""
    H, Hk, D = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v = layer.qkv(x).split([H * D, Hk * D, Hk * D], -1)

    def turned(t, norm):
        if norm is not None:
            t = t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        if angles is None:
            return t
        if layer.rotary_interleaved:
            z = torch.complex(t[..., 0::2], t[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
            return torch.stack([z.real, z.imag], -1).flatten(-2)
        z = torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    norms = (layer.q_norm, layer.k_norm) if hasattr(layer.q_norm, "weight") else (None, None)
    scale = layer.scale or D**-0.5
    seen = plan.to_dense().to(x.device)
    heads = []
    for h in range(H):
        g = h * Hk // H
        qh = turned(q[..., h * D : (h + 1) * D], norms[0])
        kh = turned(k[..., g * D : (g + 1) * D], norms[1])
        scores = (qh @ kh.mT * scale).masked_fill(~seen[h % len(seen)], -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., g * D : (g + 1) * D])
    return layer.proj(torch.cat(heads, -1))


ATTENTIONS = [
    {},
    {"qk_norm": True, "bias": False, "out_bias": False, "scale": 0.3},
    {"kv_heads": 2, "head_dim": 16, "qk_norm": True, "angles": "both"},
    {"kv_heads": 1, "angles": "half", "rotary_interleaved": False},
    {"angles": "batch"},
]


@pytest.mark.parametrize("options", ATTENTIONS, ids=lambda o: "-".join(o) or "plain")
def test_tile_attention(options):
    torch.manual_seed(0)
    options = dict(options)
    kind = options.pop("angles", None)
    plan = plans.frames(3, 5, 1, text=2)
    layer = TileAttention(32, 4, plan, **options).to(DEVICE)
    for norm in (layer.q_norm, layer.k_norm):
        for weight in norm.parameters():
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    x = torch.randn(2, 17, 32, device=DEVICE, requires_grad=True)
    D, rotary, angles = layer.head_dim, None, None
    if kind is not None:
        angles = torch.randn(*((2, 17) if kind == "batch" else (17,)), D // 2, device=DEVICE).double()
        wide = angles
        if kind != "half":
            wide = angles.repeat_interleave(2, -1)
        rotary = (wide.cos().float(), wide.sin().float())
    exact = copy.deepcopy(layer).double()
    broad = x.detach().double().requires_grad_()
    expected = attention_by_hand(exact, broad, plan, angles)
    w = torch.randn_like(expected)
    slopes = torch.autograd.grad((w * expected).sum(), [broad, *exact.parameters()])
    y = layer(x, rotary=rotary)
    assert relative_error(y, expected) < 5e-6
    found = torch.autograd.grad((w * y).sum(), [x, *layer.parameters()])
    for (name, _), a, b in zip([("x", x), *layer.named_parameters()], found, slopes, strict=True):
        # Without a rotation a key's bias shifts all scores of a query alike: its gradient is 0.
        least = 1e-2 * slopes[0].norm().item()
        assert relative_error(a, b, least) < 2e-5, name


def test_tile_attention_of_a_model():
    """Names and sizes, a plan per call, copies, pickles, other dtypes, timm's parameters."""
    plan, other = plans.frames(3, 4, 1), plans.frames(2, 5, 1)
    layer = TileAttention(24, 3, plan, kv_heads=1, head_dim=16, qk_norm=True).to(DEVICE)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "qkv.weight": (80, 24),
        "qkv.bias": (80,),
        "q_norm.weight": (16,),
        "k_norm.weight": (16,),
        "proj.weight": (24, 48),
        "proj.bias": (24,),
    }
    for text in ("24, heads=3, kv_heads=1, head_dim=16", "'frames', num_frames=3"):
        assert text in repr(layer)
    x = torch.randn(2, 12, 24, device=DEVICE)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert layer(x[:, :10], plan=other).shape == (2, 10, 24)
    assert not torch.equal(layer(x, plan=plans.frames(3, 4, 2)), y)
    low = TileAttention(16, 2, plan, qk_norm=True, dtype=torch.bfloat16, device=DEVICE)
    angles = torch.randn(12, 4, device=DEVICE)
    out = low(x[..., :16].bfloat16(), rotary=(angles.cos(), angles.sin()))
    assert out.dtype == torch.bfloat16 and low.q_norm.weight.dtype == torch.bfloat16
    before = layer.qkv.weight.clone()
    torch.nn.init.zeros_(layer.q_norm.weight)
    layer.reset_parameters()
    assert not torch.equal(layer.qkv.weight, before) and (layer.qkv.bias == 0).all()
    assert (layer.q_norm.weight == 1).all()
    q, k, v = layer.qkv.weight.detach().split([48, 16, 16])
    for weight in (q, k, v):  # each by its own fan-out
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("made", [plans.frames(3, 4, 1), plans.sliding_tile((3, 4), (1, 2), (1, 2))])
def test_tile_attention_compiled(made):
    """One graph, with the layer's plan and with one that is given."""
    layer = TileAttention(32, 4, made, qk_norm=True).to(DEVICE)
    x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
    angles = torch.randn(12, 4, device=DEVICE)
    rotary = (angles.cos(), angles.sin())
    y = layer(x, rotary=rotary)
    slope = torch.autograd.grad(y.square().sum(), x)[0]
    for compiled, more in (
        (layer, {}),
        (TileAttention.forward, {"plan": plans.frames(3, 4, 1).transpose()}),
    ):
        torch._dynamo.reset()
        given = (x,) if compiled is layer else (layer, x)
        call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        out = call(*given, rotary=rotary, **more)
        torch.testing.assert_close(out, layer(x, rotary=rotary, **more))
        if not more:
            torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], slope)


def test_tile_attention_with_what_does_not_fit():
    plan = plans.frames(3, 4, 1)
    for arguments, options, words in (
        ((32, 3), {}, "heads is 3; accepted: a divisor of dim, which is 32"),
        ((32, 4), {"kv_heads": 3}, "kv_heads is 3; accepted: a divisor of heads"),
        ((32, 4), {"head_dim": 12}, "head_dim is 12; accepted: a multiple of 8"),
        ((24, 8), {}, "head_dim is 3; accepted: a multiple of 8"),
        ((0, 4), {}, "dim is 0"),
        ((32, True), {}, "heads is True"),
        ((32, 4), {"scale": float("nan")}, "scale is nan; accepted: a finite number"),
    ):
        with pytest.raises(ValueError, match="TileAttention: " + words):
            TileAttention(*arguments, **options)
    with pytest.raises(TypeError, match=r"plan is a torch.* tensor \(3,\).*; accepted: a TilePlan"):
        TileAttention(32, 4, torch.ones(3))
    with pytest.raises(TypeError, match="qk_norm is 'rms'; accepted: True or False"):
        TileAttention(32, 4, qk_norm="rms")
    layer, x = TileAttention(32, 4, plan), torch.randn(2, 12, 32)
    with pytest.raises(ValueError, match=r"TileAttention: x .* \(B, S, 32\)"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="plan is None"):
        TileAttention(32, 4)(x)
    with pytest.raises(TypeError, match="plan is a str"):
        layer(x, plan="frames")
    with pytest.raises(ValueError, match="q has 11 tokens"):
        layer(x[:, :11])
    with pytest.raises(TypeError, match=r"rotary is .*accepted: a pair \(cos, sin\)"):
        layer(x, rotary=x)
    good = torch.randn(12, 8)
    for bad in (
        torch.randn(11, 8),
        torch.randn(12, 6),
        torch.randn(3, 12, 8),
        torch.ones(12, 8).int(),
        1.0,
    ):
        with pytest.raises(ValueError, match=r"rotary's sin is .*accepted: \(12, 8\)"):
            layer(x, rotary=(good, bad))


@pytest.mark.parametrize("side", [5, 6, 7])
def test_paths_made_within_a_mode_serve_later_calls(side):
    """A path's reverse and its copies are made in the first call, which may be a trace: later ones find
    tensors with values."""
    path = zigzag((4, side), 3)
    layer = ZigzagMamba(16, path=path, bidirectional=True, device=DEVICE)
    x = torch.randn(2, 4 * side, 16, device=DEVICE)
    if side == 5:
        torch.export.export(layer, (x,), strict=False)
    elif side == 6:
        with torch.inference_mode():
            layer(x)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            ZigzagMamba(16, path=path, bidirectional=True)(torch.randn(2, 4 * side, 16))
    torch.autograd.grad(layer(x).sum(), layer.A_log)
    with pydiffuse.use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    orders = [p.order for p in path._kin.values()]
    assert len(orders) > 1 and all(type(order) is torch.Tensor for order in orders)
