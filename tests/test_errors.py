"""Bad input: an error that names the op, the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

import pydiffuse as pd
from tests.helpers import (
    DEVICE,
    check_refused,
)

C, U, X = (torch.randn(2, 3, 4, device=DEVICE) for _ in range(3))
INT, WIDE = torch.ones(2, 3, 4, dtype=torch.int64), torch.randn(2, 3, 5)
LONG, SCALAR = torch.ones(3), torch.tensor(1.0)

BAD = {  # what is wrong: (the call, the error, the words it must hold)
    "shapes": (lambda: pd.cfg(C, WIDE, 2.0), ValueError, ["cfg", "(2, 3, 4)", "(2, 3, 5)", "alike"]),
    "dtypes": (lambda: pd.tcfg(C, U.half(), 2.0), ValueError, ["tcfg", "float32", "float16"]),
    "devices": (lambda: pd.cfg(C, U.to("meta"), 2.0), ValueError, ["cfg", "meta", "device"]),
    "integers": (lambda: pd.tcfg(INT, INT, 2.0), TypeError, ["tcfg", "int64", "bfloat16"]),
    "complex": (lambda: pd.gram([C.to(torch.complex64)]), TypeError, ["gram", "complex64"]),
    "float64": (lambda: pd.cfg(C.double(), U.double(), 2.0), TypeError, ["float64", "use_backend"]),
    "no tensor": (lambda: pd.cfg(C, 3.0, 2.0), TypeError, ["cfg", "float", "[B, ...]"]),
    "no batch": (lambda: pd.cfg(SCALAR, SCALAR, 2.0), ValueError, ["cfg", "batch"]),
    "scale length": (lambda: pd.tcfg(C, U, LONG), ValueError, ["tcfg", "scale", "(3,)", "(2,)"]),
    "scale dtype": (
        lambda: pd.tcfg(C, U, torch.ones(2, dtype=torch.int32)),
        TypeError,
        ["scale", "int32"],
    ),
    "scale type": (lambda: pd.tcfg(C, U, "7"), TypeError, ["tcfg", "scale", "str", "number"]),
    "scale none": (lambda: pd.cfg(C, U, None), TypeError, ["cfg", "scale", "NoneType"]),
    "rescale length": (lambda: pd.cfg(C, U, 2.0, rescale=LONG), ValueError, ["rescale", "(3,)"]),
    "weights count": (lambda: pd.compose([C], U, [1.0, 2.0]), ValueError, ["compose", "2 values", "1"]),
    "weights shape": (lambda: pd.compose([C], U, torch.ones(2, 3)), ValueError, ["weights", "1"]),
    "conds is one": (lambda: pd.compose(C, U, [1.0]), TypeError, ["compose", "conds", "list"]),
    "no conds": (lambda: pd.compose([], U, []), ValueError, ["compose", "conds", "0 tensors"]),
    "no preds": (lambda: pd.gram([]), ValueError, ["gram", "preds", "0 tensors", "1 to 16"]),
    "too many": (lambda: pd.gram([C] * 17), ValueError, ["gram", "17", "16"]),
    "many with u": (lambda: pd.compose([C] * 16, U, [1.0] * 16), ValueError, ["compose", "17"]),
    "coefficients": (
        lambda: pd.combine([C, U], torch.ones(2, 3)),
        ValueError,
        ["coefficients", "(2, 3)"],
    ),
    "coefficients type": (lambda: pd.combine([C, U], [1.0, 2.0]), TypeError, ["coefficients", "list"]),
    "state alone": (lambda: pd.apg(C, U, 2.0, state=U), ValueError, ["apg", "state", "momentum"]),
    "rule": (lambda: pd.guide([C, U], "best", x=X), ValueError, ["guide", "'best'", "tcfg"]),
    "rule's preds": (
        lambda: pd.guide([C], "cfg", scale=2.0, x=X),
        ValueError,
        ["cond, uncond", "1 tensors"],
    ),
    "rule's missing": (lambda: pd.guide([C, U], "cfg", x=X), TypeError, ["guide", "'cfg'", "scale"]),
    "rule's extra": (
        lambda: pd.guide([C, U], "cfg", scale=1.0, eta=2.0, x=X),
        TypeError,
        ["eta", "scale"],
    ),
    "x": (lambda: pd.guide([C, U], "cfg", scale=1.0, x=WIDE), ValueError, ["guide", "x", "(2, 3, 5)"]),
    "h without history": (
        lambda: pd.guide([C, U], "cfg", scale=1.0, x=X, h=0.1),
        ValueError,
        ["history"],
    ),
    "b length": (
        lambda: pd.guide([C, U], "cfg", scale=1.0, x=X, b=LONG),
        ValueError,
        ["guide", " b ", "(3,)"],
    ),
    "kind": (
        lambda: pd.superpose([C, U], torch.zeros(2), 0.1, kind="xor"),
        ValueError,
        ["'xor'", "'and'"],
    ),
    "log_density": (
        lambda: pd.superpose([C, U], torch.zeros(3), 0.1),
        ValueError,
        ["log_density", "(2, 2)"],
    ),
    "step": (lambda: pd.superpose([C, U], torch.zeros(2), 0.0), ValueError, ["superpose", "step", "> 0"]),
    "out shape": (lambda: pd.cfg(C, U, 2.0, out=WIDE), ValueError, ["cfg", "out", "(2, 3, 5)"]),
    "out dtype": (lambda: pd.cfg(C, U, 2.0, out=C.half()), ValueError, ["cfg", "out", "float16"]),
    "out overlaps": (lambda: overlapping(), ValueError, ["cfg", "out", "overlaps"]),
    "out twice": (
        lambda: pd.guide([C, U], "cfg", scale=2.0, x=X, predict=(1.0, 1.0), out=(X, X)),
        ValueError,
        ["out[1]", "another output"],
    ),
    "out and grad": (lambda: pd.cfg(C.clone().requires_grad_(), U, 2.0, out=X), ValueError, ["no_grad"]),
    "backend": (lambda: pd.use_backend("gpu").__enter__(), ValueError, ["'gpu'", "triton"]),
}


def overlapping():
    memory = torch.randn(3, 12)
    return pd.cfg(memory[:2], torch.randn(2, 12), 2.0, out=memory[1:])


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_bad_input(row):
    check_refused(*row)


@pytest.mark.skipif(DEVICE != "cpu", reason="this run is for a GPU; it calls the CPU kernels")
def test_raw_ops_refuse_too():
    """torch.ops.pydiffuse is not public, but must not read out of bounds."""
    ops, out = torch.ops.pydiffuse, torch.empty(2, 12)
    c = torch.randn(2, 12)
    good = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 7.5]
    for args in (
        ([out], [c, torch.randn(2, 13)], 2, good, False, None, [], 1),
        ([out], [c], 2, good, False, None, [], 1),
        ([out], [c, c], 99, good, False, None, [], 1),
        ([out], [c, c], 2, good[:8], False, None, [], 1),
        ([out], [c, c], 2, good, False, torch.ones(2, 1), [8], 1),
        ([out], [c, c], 2, good, False, torch.ones(2, 1).double(), [40], 1),
        ([out, out], [c, c], 2, good, False, None, [], 1),
        ([out], [c, c, c], 1, good, False, None, [], 1),
        ([out.double()], [c, c], 1, good, False, None, [], 1),
        ([], [c, c], 1, good, False, None, [], 1),
    ):
        outs, preds, *rest = args
        with pytest.raises(RuntimeError):
            ops.guide(outs, preds, None, None, None, *rest)
    with pytest.raises(RuntimeError):
        ops.mix([out], [c], torch.ones(2, 1, 2).double(), None)
    with pytest.raises(RuntimeError):
        ops.gram(torch.empty(2, 2, 2), None, [c, c])
