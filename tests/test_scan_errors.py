"""Bad input to the scans: an error that names the op, the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

import pydiffuse as pd
from pydiffuse.paths import zigzag
from tests.helpers import (
    DEVICE,
    check_refused,
)

u, delta, z = (torch.rand(2, 6, 12, device=DEVICE) for _ in range(3))
A, B, C = -torch.rand(6, 4, device=DEVICE), *(torch.rand(2, 4, 12, device=DEVICE) for _ in range(2))
D, w = torch.rand(6, device=DEVICE), torch.rand(6, 4, device=DEVICE)
state, x, rows = torch.zeros(2, 6, 4, device=DEVICE), u[..., 0], B[..., 0]


def scan(*args, **kwargs):
    given = [u, delta, A, B, C]
    given[: len(args)] = [g if a is None else a for a, g in zip(args, given)]
    return pd.selective_scan(*given, **kwargs)


def x_proj(rows):
    return torch.rand(rows, 6, device=DEVICE)


def groups(n):
    return torch.rand(2, n, 4, 12, device=DEVICE)


TWICE = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10])
BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "u": (lambda: scan(u[0]), ValueError, ["selective_scan", "u", "(6, 12)", "(B, D, L)"]),
    "u is no tensor": (lambda: scan([1.0]), TypeError, ["u", "list"]),
    "integers": (lambda: scan(u.int()), TypeError, ["u", "int32", "bfloat16"]),
    "float64": (lambda: scan(u.double()), TypeError, ["u", "float64", "use_backend"]),
    "delta": (lambda: scan(None, delta[:, :5]), ValueError, ["delta", "(2, 5, 12)", "6"]),
    "layout": (lambda: scan(layout="blc"), ValueError, ["layout", "'blc'", "'bld'"]),
    "layout of u": (lambda: scan(layout="bld"), ValueError, ["selective_scan", "(6, 4)", "(12, any)"]),
    "A": (lambda: scan(None, None, A[0]), ValueError, ["A", "(4,)", "(D, N)"]),
    "A half": (lambda: scan(None, None, A.half()), TypeError, ["A", "float16", "float32"]),
    "states": (
        lambda: scan(None, None, torch.rand(6, 257, device=DEVICE)),
        ValueError,
        ["A", "257", "256"],
    ),
    "B": (lambda: scan(None, None, None, B[..., :5]), ValueError, ["B", "(2, 4, 5)", "(B, N, L)"]),
    "C": (lambda: scan(None, None, None, None, C.int()), TypeError, ["C", "int32"]),
    "groups": (
        lambda: scan(None, None, None, groups(4), groups(4)),
        ValueError,
        ["4 groups", "6 channels"],
    ),
    "groups differ": (
        lambda: scan(None, None, None, groups(3), groups(2)),
        ValueError,
        ["3 groups", "2"],
    ),
    "D": (lambda: scan(D=D[:5]), ValueError, ["D", "(5,)"]),
    "D half": (lambda: scan(D=D.half()), TypeError, ["D", "float16", "float32"]),
    "z": (lambda: scan(z=z[..., :3]), ValueError, ["z", "(2, 6, 3)"]),
    "delta_bias": (lambda: scan(delta_bias=A), ValueError, ["delta_bias", "(6, 4)"]),
    "softplus": (lambda: scan(delta_softplus=1), TypeError, ["delta_softplus", "True or False"]),
    "reverse": (lambda: scan(reverse="yes"), TypeError, ["reverse", "'yes'"]),
    "path length": (lambda: scan(path=zigzag((3, 5))), ValueError, ["path", "15", "12"]),
    "no permutation": (lambda: scan(path=TWICE), ValueError, ["selective_scan", "path", "permutation"]),
    "path type": (lambda: scan(path=3.5), TypeError, ["path", "float", "ScanPath"]),
    "no paths": (lambda: scan(path=[]), ValueError, ["path", "empty"]),
    "paths length": (
        lambda: scan(path=[zigzag((3, 4)), zigzag((3, 5))]),
        ValueError,
        ["path[1]", "15", "12"],
    ),
    "initial_state": (lambda: scan(initial_state=state[:1]), ValueError, ["initial_state", "(1, 6, 4)"]),
    "initial half": (lambda: scan(initial_state=state.half()), TypeError, ["initial_state", "float32"]),
    "offsets end": (lambda: scan(cu_seqlens=[0, 5]), ValueError, ["cu_seqlens", "[0, 5]", "12"]),
    "offsets fall": (lambda: scan(cu_seqlens=(0, 7, 5, 12)), ValueError, ["cu_seqlens", "falling"]),
    "offsets type": (
        lambda: scan(cu_seqlens=torch.tensor([0.0, 12.0])),
        TypeError,
        ["cu_seqlens", "float32", "int32"],
    ),
    "complex": (lambda: scan(None, None, A.to(torch.complex64)), TypeError, ["complex64", "reference"]),
    "device": (lambda: scan(None, delta.to("meta")), ValueError, ["delta", "meta"]),
    "conv x": (lambda: pd.causal_conv1d(u[0], w), ValueError, ["causal_conv1d", "x", "(6, 12)"]),
    "conv weight": (lambda: pd.causal_conv1d(u, w[:5]), ValueError, ["weight", "(5, 4)", "6"]),
    "conv width": (
        lambda: pd.causal_conv1d(u, torch.rand(6, 9, device=DEVICE)),
        ValueError,
        ["width 9", "1 to 8"],
    ),
    "conv bias": (lambda: pd.causal_conv1d(u, w, D[:2]), ValueError, ["bias", "(2,)"]),
    "activation": (lambda: pd.causal_conv1d(u, w, activation="gelu"), ValueError, ["'gelu'", "'silu'"]),
    "conv path": (lambda: pd.causal_conv1d(u, w, path=TWICE), ValueError, ["causal_conv1d", "path"]),
    "conv paths": (lambda: pd.causal_conv1d(u, w, path=[zigzag((3, 4))]), TypeError, ["one path"]),
    "state": (
        lambda: pd.selective_state_update(state[:, :5], x, x, A, rows, rows),
        ValueError,
        ["selective_state_update", "state", "(2, 5, 4)"],
    ),
    "state heads": (
        lambda: pd.selective_state_update(state[:, :, None], x, x, A, rows, rows),
        ValueError,
        ["selective_state_update", "state", "(B, D, N)"],
    ),
    "groups of heads": (
        lambda: pd.selective_state_update(
            state.unflatten(1, (3, 2)),
            *[x.unflatten(1, (3, 2))] * 2,
            A.unflatten(0, (3, 2)),
            *[rows[:, None].expand(-1, 2, -1)] * 2,
        ),
        ValueError,
        ["B has 2 groups", "3 heads"],
    ),
    "state gradient": (
        lambda: pd.selective_state_update(state, x.clone().requires_grad_(), x, A, rows, rows),
        ValueError,
        ["selective_state_update", "gradient", "no_grad"],
    ),
    "xz": (
        lambda: pd.zigzag_mamba_inner(u[:, :5], w, None, w, w, None, None, A),
        ValueError,
        ["zigzag_mamba_inner", "xz", "5 channels", "even"],
    ),
    "bias of the convolution": (
        lambda: pd.zigzag_mamba_inner(torch.cat([u, u], 1), w, D[:5], x_proj(12), w, None, None, A),
        ValueError,
        ["zigzag_mamba_inner", "conv1d_bias", "(5,)"],
    ),
    "bias and B": (
        lambda: pd.zigzag_mamba_inner(
            torch.cat([u, u], 1), w, None, x_proj(8), w, None, None, A, B=B, B_proj_bias=D[:4]
        ),
        ValueError,
        ["B_proj_bias and B"],
    ),
    "bias alone": (
        lambda: pd.zigzag_mamba_inner(torch.cat([u, u], 1), w, None, x_proj(12), w, None, D, A),
        ValueError,
        ["out_proj_bias", "without out_proj_weight"],
    ),
    "x_proj": (
        lambda: pd.zigzag_mamba_inner(torch.cat([u, u], 1), w, None, w, w, None, None, A),
        ValueError,
        ["x_proj_weight", "(6, 4)", "(R + 2 N, D)"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    check_refused(*BAD[what])


@pytest.mark.skipif(DEVICE != "cpu", reason="this run is for a GPU, whose values are not looked at")
def test_ops_refuse_what_would_read_out_of_bounds():
    """The ops themselves, for those who call them without the public functions."""
    op = torch.ops.pydiffuse.selective_scan
    t = [u.mT, delta.mT[:, None], A[None], B.mT[:, None, None], C.mT[:, None, None]]
    rest = (None, None, None, None)
    outside = torch.tensor([[*range(11), 12]], dtype=torch.int32)
    offsets = torch.tensor([0, 13], dtype=torch.int32)
    out = torch.empty(2, 12, 6)
    with pytest.raises(RuntimeError, match="order"):
        op(out, None, None, *t, *rest, outside, None, False)
    with pytest.raises(RuntimeError, match="offsets"):
        op(out, None, None, *t, *rest, None, offsets, False)
    with pytest.raises(RuntimeError, match="delta has shape"):
        op(out, None, None, t[0], t[1][..., :5], *t[2:], *rest, None, None, False)
