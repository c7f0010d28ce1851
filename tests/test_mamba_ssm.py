"""The functions of mamba_ssm and causal_conv1d by their signatures: values and gradients against float64."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import pydiffuse
from pydiffuse.integrations import mamba_ssm as names
from tests.helpers import GPU, check_refused

pytestmark = pytest.mark.skipif(GPU, reason="the same on every device")
SIGNATURES = {  # of mamba_ssm 2.3.2 and causal_conv1d 1.6.1, "=": optional
    "selective_scan_fn": "u delta A B C D= z= delta_bias= delta_softplus= return_last_state=",
    "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A"
    " B= C= D= delta_bias= B_proj_bias= C_proj_bias= delta_softplus= checkpoint_lvl= b_rms_weight= c_rms_weight="
    " dt_rms_weight= b_c_dt_rms_eps=",
    "selective_state_update": "state x dt A B C D= z= dt_bias= dt_softplus= state_batch_indices=",
    "causal_conv1d_fn": "x weight bias= seq_idx= initial_states= return_final_states= final_states_out= activation=",
    "causal_conv1d_update": "x conv_state weight bias= activation= cache_seqlens= conv_state_indices=",
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(names, name)).parameters.values()
    found = [p.name + "=" * (p.default is not p.empty) for p in parameters]
    assert " ".join(found) == SIGNATURES[name]


def inputs(L=11, D=6, W=4, B=2, last=False, dtype=torch.float32):
    """x [B, D, L], weight, bias, states [B, D, W - 1]; last: channels next to each other."""
    torch.manual_seed(L)
    x = torch.randn(B, L, D).transpose(1, 2) if last else torch.randn(B, D, L)
    rest = torch.randn(D, W), torch.randn(D), torch.randn(B, D, W - 1)
    return [t.to(dtype).requires_grad_(dtype is torch.float32) for t in (x, *rest)]


def by_hand(x, weight, bias, states):
    """In float64: the outputs, and the last inputs."""
    x, weight, bias, states = (t.double() for t in (x, weight, bias, states))
    seen = torch.cat([states, x], 2)
    windows = seen.unfold(2, weight.shape[1], 1)  # [B, D, L, W]
    return (windows * weight[:, None]).sum(-1) + bias[:, None], seen[
        ..., seen.shape[2] - states.shape[2] :
    ]


def assert_gradients(found, expected, tensors):
    """Of outputs with weights, in all tensors."""
    weights = [torch.randn_like(t) for t in found]
    loss = [
        sum((a * w.to(a.dtype)).sum() for a, w in zip(out, weights, strict=True))
        for out in (found, expected)
    ]
    grads = [torch.autograd.grad(each, tensors) for each in loss]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("L", [1, 2, 3, 11, 70])
def test_convolution_with_states(L, W, last):
    tensors = x, weight, bias, states = inputs(L, W=W, last=last)
    y, final = names.causal_conv1d_fn(x, weight, bias, None, states, True)
    expected = by_hand(*tensors)
    torch.testing.assert_close(y.double(), expected[0], **CLOSE)
    torch.testing.assert_close(final.double(), expected[1], rtol=0, atol=0)
    assert final.stride(1) == 1 or W == 1
    assert_gradients((y, final), expected, tensors)
    gated = names.causal_conv1d_fn(x, weight, bias, initial_states=states, activation="swish")
    torch.testing.assert_close(gated, F.silu(expected[0]).float(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_make_the_whole(dtype):
    """Through the last states of each, written where they are asked for."""
    x, weight, bias, _ = (t.detach() for t in inputs(30, dtype=dtype))
    whole, final = names.causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    assert torch.equal(whole, pydiffuse.causal_conv1d(x, weight, bias, activation="silu"))
    held, pieces = torch.empty(2, 6, 3, dtype=dtype), []
    states = None
    for begin, end in ((0, 1), (1, 3), (3, 20), (20, 30)):
        piece, states = names.causal_conv1d_fn(
            x[..., begin:end], weight, bias, None, states, True, held, activation="silu"
        )
        assert states is held
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(held, final)


@pytest.mark.parametrize("last", [False, True])
def test_packed_sequences(last):
    """Each sequence by itself, with the gradients; padding gives zeros."""
    x, weight, bias, _ = inputs(12, last=last)
    seq_idx = torch.tensor([[0] * 5 + [1] * 2 + [4] * 5, [3] * 9 + [-1] * 3], dtype=torch.int32)
    y = names.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    rows: list[list[torch.Tensor]] = [[], []]
    for row, begin, end in ((0, 0, 5), (0, 5, 7), (0, 7, 12), (1, 0, 9)):
        piece = x[row : row + 1, :, begin:end]
        rows[row].append(F.silu(by_hand(piece, weight, bias, torch.zeros(1, 6, 3))[0]))
    rows[1].append(torch.zeros(1, 6, 3, dtype=torch.float64))
    expected = torch.cat([torch.cat(row, 2) for row in rows])
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    assert_gradients([y], [expected], (x, weight, bias))


def test_convolution_refuses():
    x, weight, bias, states = (t.detach() for t in inputs())
    seq_idx = torch.zeros(2, 11, dtype=torch.int32)
    back = seq_idx.clone()
    back[:, 5] = 1
    fn, update = names.causal_conv1d_fn, names.causal_conv1d_update
    for call, words in (
        (lambda: fn(x, weight, bias, seq_idx, states), ["seq_idx", "initial_states"]),
        (lambda: fn(x, weight, bias, seq_idx, None, True), ["seq_idx", "return_final_states"]),
        (lambda: fn(x, weight, bias, seq_idx[:, :3]), ["seq_idx", "(2, 3)", "(B, L)"]),
        (lambda: fn(x, weight, bias, back), ["seq_idx", "one piece"]),
        (
            lambda: fn(x, weight, bias, None, states[..., :2]),
            ["initial_states", "(2, 6, 2)", "(B, D, W - 1)"],
        ),
        (lambda: fn(x, weight, bias, None, None, True, states[..., :2]), ["final_states_out"]),
        (lambda: fn(x, weight, bias, activation="gelu"), ["activation", "'gelu'"]),
        (lambda: update(x[..., 0], states[..., 1:], weight), ["conv_state", "2 inputs", "3 or more"]),
        (lambda: update(x[..., 0], states[:1], weight), ["conv_state", "(1, 6, 3)"]),
    ):
        check_refused(call, ValueError, words)
    check_refused(
        lambda: fn(x, weight, bias, seq_idx.float()), TypeError, ["seq_idx", "float32", "int32"]
    )


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("length", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_make_a_convolution(dtype, length, indexed, ring):
    """One step and several at a time, more than the state holds too; rows of other sequences stay."""
    x, weight, bias, _ = (t.detach() for t in inputs(21, dtype=dtype))
    whole = pydiffuse.causal_conv1d(x, weight, bias, activation="silu")
    state = torch.full((5 if indexed else 2, 6, length), 9.0, dtype=dtype)
    rows = torch.tensor([3, 1], dtype=torch.int32) if indexed else None
    state[rows if indexed else slice(None)] = 0
    begin = 0
    for count in (1, 1, 2, 1, 9, 5, 2):
        piece = x[..., begin : begin + count]
        seen = torch.full((2,), begin, dtype=torch.int32) if ring else None
        y = names.causal_conv1d_update(
            piece[..., 0] if count == 1 else piece, state, weight, bias, "silu", seen, rows
        )
        assert torch.equal(y.reshape(2, 6, count), whole[..., begin : begin + count])
        begin += count
    held = state[rows] if indexed else state
    order = torch.arange(21 - length, 21)
    at = order % length if ring else torch.arange(length)
    assert torch.equal(held[..., at], x[..., order])
    assert not indexed or bool((state[[0, 2, 4]] == 9).all())


@pytest.mark.parametrize("rows", [[2, -1, 0], [-1, -1, -1], [-1, 3, 1]])
def test_padding_in_a_batch(rows):
    """Its result is zero and its state nobody's."""
    torch.manual_seed(0)
    rows = torch.tensor(rows, dtype=torch.int32)
    states, conv = torch.randn(4, 6, 5), torch.randn(4, 6, 3)
    x, dt, A = torch.randn(3, 6), torch.rand(3, 6), -torch.rand(6, 5)
    B, C = torch.randn(2, 3, 5)
    weight = torch.randn(6, 4)
    new, new_conv = states.clone(), conv.clone()
    y = names.selective_state_update(new, x, dt, A, B, C, state_batch_indices=rows)
    v = names.causal_conv1d_update(x, new_conv, weight, conv_state_indices=rows)
    for b, row in enumerate(rows.tolist()):
        if row < 0:
            assert not y[b].any() and not v[b].any()
            continue
        one, last = states[row : row + 1].clone(), conv[row : row + 1].clone()
        pick = slice(b, b + 1)
        assert torch.equal(
            pydiffuse.selective_state_update(one, x[pick], dt[pick], A, B[pick], C[pick]), y[pick]
        )
        assert torch.equal(names.causal_conv1d_update(x[pick], last, weight), v[pick])
        assert torch.equal(new[row], one[0]) and torch.equal(new_conv[row], last[0])
    others = [i for i in range(4) if i not in rows.tolist()]
    assert torch.equal(new[others], states[others]) and torch.equal(new_conv[others], conv[others])


def test_a_step_takes_no_part_in_autograd():
    state, x, A = torch.zeros(2, 6, 5), torch.randn(2, 6, requires_grad=True), -torch.rand(6, 5)
    y = names.selective_state_update(state, x, x.abs(), A, torch.randn(2, 5), torch.randn(2, 5))
    assert not y.requires_grad and not state.requires_grad and state.any()


@pytest.mark.parametrize("given", ["b", "c", "dt", "b c dt", "b B"])
def test_norms_of_falcon(given):
    """mamba_inner_fn with RMS norms of B, C and delta: values and gradients against float64."""
    torch.manual_seed(1)
    B, D, L, N, R, M = 2, 6, 9, 3, 2, 5
    kinds = given.split()
    shapes = [
        (B, 2 * D, L),
        (D, 1, 4),
        (D,),
        (R + N * (2 - ("B" in kinds)), D),
        (D, R),
        (M, D),
        (M,),
        (D, N),
        (D,),
        (D,),
    ]
    values = [torch.randn(shape) for shape in shapes]
    values[7] = -values[7].exp()
    norms = {f"{k}_rms_weight": torch.rand(D if k == "dt" else N) for k in kinds if k != "B"}
    b = {"B": torch.randn(B, 1, N, L)} if "B" in kinds else {}
    tensors = [t.requires_grad_() for t in (*values, *norms.values(), *b.values())]
    y = names.mamba_inner_fn(
        *values[:8],
        D=values[8],
        delta_bias=values[9],
        b_c_dt_rms_eps=1e-3,
        checkpoint_lvl=0,
        **norms,
        **b,
    )
    xz, conv, conv_bias, x_proj, dt_proj, out, out_bias, A, skip, bias = (t.double() for t in values)
    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(x, conv, conv_bias, padding=3, groups=D)[..., :L])
    projected = torch.einsum("rd,bdl->brl", x_proj, x)

    def norm(t, name):  # [B, channels, L]
        weight = norms.get(f"{name}_rms_weight")
        return (
            t
            if weight is None
            else t / (t.square().mean(1, True) + 1e-3).sqrt() * weight.double()[:, None]
        )

    dt = F.softplus(norm(torch.einsum("dr,brl->bdl", dt_proj, projected[:, :R]), "dt") + bias[:, None])
    Bs = norm(b["B"][:, 0].double() if b else projected[:, R : R + N], "b")
    Cs = norm(projected[:, -N:], "c")
    h, rows = torch.zeros(B, D, N, dtype=torch.float64), []
    for l in range(L):
        h = torch.exp(dt[..., l, None] * A) * h + (dt * x)[..., l, None] * Bs[:, None, :, l]
        rows.append((h * Cs[:, None, :, l]).sum(-1) + skip * x[..., l])
    expected = (torch.stack(rows, 1) * F.silu(z).mT) @ out.T + out_bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(y)
    grads = [torch.autograd.grad((o * weights).sum(), tensors) for o in (y, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_norms_refuse():
    arguments = [torch.randn(2, 12, 9), torch.randn(6, 4), None, torch.randn(8, 6), torch.randn(6, 2)]
    arguments += [None, None, -torch.rand(6, 3)]
    inner = pydiffuse.zigzag_mamba_inner
    check_refused(
        lambda: inner(*arguments, b_rms_weight=torch.ones(4)),
        ValueError,
        ["b_rms_weight", "(4,)", "(N,)"],
    )
    arguments[3] = arguments[3][:5]
    check_refused(
        lambda: inner(*arguments, torch.rand(6, 3), b_rms_weight=torch.ones(3)),
        ValueError,
        ["b_rms_weight", "constant B"],
    )


def test_without_the_output_projection():
    torch.manual_seed(0)
    arguments = [
        torch.randn(2, 12, 9),
        torch.randn(6, 1, 4),
        torch.randn(6),
        torch.randn(8, 6),
        torch.randn(6, 2),
    ]
    A, weight = -torch.rand(6, 3), torch.randn(5, 6)
    y = names.mamba_inner_fn_no_out_proj(*arguments, A, D=torch.ones(6))
    whole = names.mamba_inner_fn(*arguments, weight, torch.ones(5).double().float(), A, D=torch.ones(6))
    torch.testing.assert_close(F.linear(y.transpose(1, 2), weight, torch.ones(5)), whole)
