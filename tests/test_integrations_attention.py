"""diffusers' transformers on tile attention: the plan from a context, per layer, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

import pydiffuse as pd
from pydiffuse import plans
from tests.helpers import check_refused

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
FRAMES, TOKENS = 3, 16


@pytest.fixture(scope="module")
def video():
    """A tiny Wan transformer and the arguments of its call: 3 frames of 16 tokens, 2 layers."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    latent, prompt = torch.randn(1, 4, FRAMES, 8, 8), torch.randn(1, 7, 16)
    return model.eval(), (latent, torch.tensor([10]), prompt)


def run(video, plan=None):
    from pydiffuse.integrations.diffusers import attention_plan

    model, args = video
    with torch.no_grad():
        if plan is None:
            return model(*args).sample
        with attention_plan(plan):
            return model(*args).sample


def test_a_plan_that_keeps_all_changes_nothing(video):
    before = run(video)
    torch.testing.assert_close(run(video, plans.dense(FRAMES * TOKENS)), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(video), before)  # and nothing stays behind


def test_frames(video):
    plan = plans.frames(FRAMES, TOKENS, 1)
    found = run(video, plan)
    with pd.use_backend("reference"):
        torch.testing.assert_close(found, run(video, plan), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, run(video), atol=1e-3)


def test_a_plan_for_each_layer(video):
    dense, sparse = plans.dense(FRAMES * TOKENS), plans.frames(FRAMES, TOKENS, 0)
    results = [run(video, each) for each in ([dense, sparse], [sparse, dense], sparse)]
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.pairwise(results))
    assert torch.equal(run(video, [sparse, sparse]), results[2])


def test_refused(video):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    from pydiffuse.integrations.diffusers import attention_plan

    check_refused(lambda: run(video, plans.dense(47)), ValueError, ["attention_plan", "48 tokens", "47"])
    check_refused(lambda: run(video, []), TypeError, ["attention_plan", "plan", "TilePlan"])
    q = torch.randn(1, 8, 2, 8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    with attention_plan(plans.dense(8)):
        for name, value in (("attn_mask", mask), ("dropout_p", 0.1), ("is_causal", True)):
            check_refused(
                lambda options={name: value}: dispatch_attention_fn(q, q, q, **options),
                ValueError,
                [name],
            )
