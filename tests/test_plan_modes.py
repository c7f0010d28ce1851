"""Plans outlive the call that first makes them: its modes and transforms leave no trace in them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import pydiffuse
from pydiffuse import plans
from pydiffuse.plans.masks import from_mask
from tests.cases.plans import check_sense
from tests.helpers import DEVICE, check_refused

GRID = {"tile": (2, 3), "window": (2, 3)}


@contextmanager
def default_device():
    with torch.device("meta"):
        yield


@contextmanager
def inference():
    with torch.inference_mode():
        yield


MODES = {"default device": default_device, "inference": inference, "fake": FakeTensorMode}
# Every plan here is of lengths that no other test has: it is made within the mode.
SIZES = {name: 41 + 6 * i for i, name in enumerate([*MODES, "grad", "vmap"])}


def made(n):
    """Plans with masks, with an order and both; their transposes; copies of them on another device."""
    tiled = plans.sliding_tile((4, n), **GRID)
    some = [
        tiled, plans.local(n, 5, tile=8), from_mask(MASKS[n], 8), plans.per_head([tiled, plans.dense(4 * n)]),
        plans.joint({"image": tiled, "text": 3}),
    ]  # fmt: skip
    some += [plan.transpose() for plan in some]
    return some, [plan.to("meta") for plan in some]


MASKS = {n: torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < 0.9 for n in SIZES.values()}


def check_real(given, moved):
    for plan, other in zip(given, moved, strict=True):
        for t, u in zip(plan.tensors, other.tensors, strict=True):
            if t is not None:
                assert t.device.type == "cpu" and u.device.type == "meta"
                for x in (t, u):
                    assert not x.is_inference() and not isinstance(x, FakeTensor)
                    assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
        check_sense(plan, plan.to_dense())
        assert other.transpose().to("cpu") is plan.transpose()


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_made_within_a_mode(mode):
    with MODES[mode]():
        given, moved = made(SIZES[mode])
    check_real(given, moved)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_plan_made_within_a_transform(transform):
    found = []

    def call(x):
        found.extend(made(SIZES[transform]))
        return x.sum()

    getattr(torch.func, transform)(call)(torch.ones(3))
    check_real(*found)


def test_training_after_inference():
    q = torch.randn(1, 1, 44, 8, device=DEVICE)
    with torch.inference_mode():
        plan = plans.local(44, 7, tile=11)
        pydiffuse.tile_attention(q, q, q, plan)
    q.requires_grad_()
    pydiffuse.tile_attention(q, q, q, plan).sum().backward()
    assert q.grad.isfinite().all()


def test_default_device_does_not_move_masks():
    with torch.device("meta"):
        plan = plans.local(45, 7, tile=11)
        dense = plan.to_dense()
    assert dense.device.type == "cpu"
    i = torch.arange(45)
    check_sense(plan, (i[:, None] - i).abs() <= 7)


def test_within_a_compiled_function():
    def call(x):
        return x + plans.frames(4, 5, 1).q_length

    torch._dynamo.reset()
    x = torch.ones(2)
    check_refused(
        lambda: torch.compile(call, fullgraph=True, backend="eager")(x),
        torch._dynamo.exc.Unsupported,
        ["frames: make the plan outside of the compiled function"],
    )
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager")(x), x + 20), "a break of the graph"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_moved_within_a_compiled_function(mode):
    plan = plans.local(46, 7, tile=8 + (mode is torch.no_grad))
    torch._dynamo.reset()
    seen = []

    def call(x):
        moved = plan.to(x.device)
        return moved.tensors.spans + x, moved

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.ones(1, device="meta")
    with mode():
        seen += [compiled(x)[1] for _ in range(2)]
    assert seen[0] is seen[1], "copied once"
    seen.append(compiled(x)[1])
    for t in (*plan.to("meta").tensors, *seen[2].tensors):
        assert t is None or (t.device.type == "meta" and not t.is_inference())
