"""What the C++ kernels of tile attention promise beyond the formula: rows that one key saturates, odd ends of
bfloat16 pairs, bits that do not depend on the batch, and plans that no constructor makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pydiffuse as pd
from pydiffuse import plans
from tests.cases.attention import ragged
from tests.helpers import GPU, relative_error

pytestmark = pytest.mark.skipif(GPU, reason="this run is for a GPU; it is about the CPU kernels")


def heads(*shape, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_saturated_rows(size):
    """Scores of thousands: probabilities are 0 and 1, and dv is dout's rows to the last bits."""
    q, k, v, dout = heads(1, 2, 64, 32, count=4)
    given = [(size * q).requires_grad_(), (size * k).requires_grad_(), v.requires_grad_()]
    out = pd.tile_attention(*given, plans.dense(64))
    (dv,) = torch.autograd.grad(out, given[2], dout)
    wide = [t.detach().double().requires_grad_() for t in given]
    exact = F.scaled_dot_product_attention(*wide)
    (slope,) = torch.autograd.grad(exact, wide[2], dout.double())
    assert relative_error(out, exact) < 1e-5 and relative_error(dv, slope) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_stays_in_its_tiles(where, dtype):
    """Frames of 37: the last key of a frame and the first of the next share a pair of bfloat16."""
    q, k, v = heads(1, 2, 148, 16, dtype=dtype)
    (k if where == "k" else v)[:, :, 36] = float("nan")
    given = [t.requires_grad_() for t in (q, k, v)]
    out = pd.tile_attention(*given, plans.frames(4, 37, 0))
    found = [out, *torch.autograd.grad(out[:, :, 37:].float().sum(), given)]
    assert all(t[:, :, 37:].isfinite().all() for t in found)
    assert out[:, :, :37].isnan().all()


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_gradients_do_not_depend_on_the_batch(kv_heads):
    plan = plans.frames(5, 37, 2)
    q, k, v = heads(6, 3, 185, 24)
    k, v = k[:, :kv_heads], v[:, :kv_heads]

    def gradients(batch):
        given = [t[:batch].clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(pd.tile_attention(*given, plan).sin().sum(), given)

    for a, b in zip(gradients(6), gradients(1), strict=True):
        assert torch.equal(a[:1], b)


def test_one_tensor_in_two_places():
    """Keys that are the values, also in a compiled graph."""
    plan = plans.frames(3, 13, 1)
    (q, k) = (t.requires_grad_() for t in heads(1, 2, 39, 16, count=2))

    def call(q, k):
        return pd.tile_attention(q, k, k, plan)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dout = torch.ones(1, 2, 39, 16)
    found, expected = (torch.autograd.grad(f(q, k), (q, k), dout) for f in (compiled, call))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


BAD = {  # the tensor that is spoilt, how, and what the error says
    "bounds": (lambda t: t.bounds[1].fill_(99), "bounds"),
    "starts": (lambda t: t.starts[0, 1].fill_(-1), "starts"),
    "spans' end": (lambda t: t.spans[0, 1].fill_(72), "spans"),
    "spans' mask": (lambda t: t.spans[0, 2].fill_(999), "spans"),
    "keys' spans": (lambda t: t.k_spans[0, 1].fill_(48), "spans"),
    "blocks' tile": (lambda t: t.blocks[0, 0, 0].fill_(7), "blocks"),
    "blocks' rows": (lambda t: t.blocks[0, 0, 2].sub_(1), "cover each row once"),
    "blocks twice": (lambda t: t.blocks[0, 0].copy_(t.blocks[0, 1]), "cover each row once"),
    "masks": (lambda t: t.mask_at[0].fill_(t.words.numel()), "words"),
    "masks far away": (lambda t: t.mask_at[0].fill_(2**63 - 8), "words"),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_plans_that_no_constructor_makes(row):
    spoil, words = row
    tensors = ragged(1).tensors
    tensors = tensors._replace(**{n: t.clone() for n, t in tensors._asdict().items() if t is not None})
    spoil(tensors)
    q, k = heads(1, 2, 47, 16, count=1)[0], heads(1, 2, 71, 16, count=1)[0]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pydiffuse.tile_attention(torch.empty_like(q), None, q, k, k, None, 0.25, *tensors)


@pytest.mark.parametrize("order", [[0] * 39, [*range(38), 39]], ids=["repeated", "out of range"])
def test_orders_that_are_no_permutation(order):
    tensors = plans.frames(3, 13, 1).tensors._replace(order=torch.tensor(order, dtype=torch.int32))
    q = heads(1, 1, 39, 8, count=1)[0]
    with pytest.raises(RuntimeError, match="permutation"):
        torch.ops.pydiffuse.tile_attention(torch.empty_like(q), None, q, q, q, None, 0.25, *tensors)
