"""Mamba models of transformers, from small random configurations: on our kernels as on their own slow path."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import pydiffuse
from tests.helpers import GPU, check_refused, relative_error

transformers = pytest.importorskip(
    "transformers", "5.24", reason="transformers 5.24 is not installed (extra: test)"
)

from pydiffuse.integrations import mamba_ssm  # noqa: E402
from pydiffuse.integrations import transformers as ours  # noqa: E402

pytestmark = pytest.mark.skipif(GPU, reason="the same on every device")
SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
JAMBA = {
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3,
}  # fmt: skip
ZAMBA = {
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3, "n_mamba_heads": 2, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "hybrid", "hybrid"], "initializer_range": 0.2,
}  # fmt: skip
MAMBA2 = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
MODELS = {  # name -> its configuration
    "Mamba": {"state_size": 4, "use_bias": True},
    "FalconMamba": {"state_size": 4, "mixer_rms_eps": 1e-3},
    "Jamba": JAMBA,
    "Zamba": ZAMBA,
    "Mamba2": MAMBA2,  # the convolution and the step; its scan in chunks is their own
}
LAYERS = {"Mamba": 2, "FalconMamba": 2, "Jamba": 1, "Zamba": 3, "Mamba2": 2}
SCANS = {"Mamba": 2, "FalconMamba": 2, "Jamba": 1, "Zamba": 6}  # Zamba scans by head
IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def made(name, **changed):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS[name] | changed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    ours.unpatch()


@pytest.fixture
def calls(monkeypatch):
    """How often our functions were called."""
    counts: dict[str, int] = {}

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(pydiffuse.scan, "selective_scan")
    count(pydiffuse.scan, "selective_state_update")
    count(mamba_ssm.conv, "causal_conv1d")
    return counts


def before_and_after(model, call):
    before = call(model)
    ours.patch(model)
    after = call(model)
    ours.unpatch()
    return before, after


def logits_and_gradients(model, **given):
    model.zero_grad()
    logits = model(IDS, **given).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, calls):
    model = made(name)
    before, after = before_and_after(model, logits_and_gradients)
    scans = {"selective_scan": SCANS[name]} if name in SCANS else {}
    assert calls == {"causal_conv1d": LAYERS[name]} | scans
    assert len(before) == len(after) > 8
    for a, b in zip(before, after, strict=True):
        assert relative_error(b, a) < 1e-5


@pytest.mark.parametrize("name", SCANS)
def test_padding_and_training(name):
    """A mask of the left padding, in training mode, where mamba_ssm's fused function would not mask all."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    model = made(name).train()
    before, after = before_and_after(model, lambda m: logits_and_gradients(m, attention_mask=mask))
    for a, b in zip(before, after, strict=True):
        assert relative_error(b, a) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name, calls):
    def generate(model):
        out = model.generate(
            IDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits)

    model = made(name)
    before, after = before_and_after(model, generate)
    assert calls["selective_state_update"] == 5 * SCANS.get(name, 2)
    assert calls["causal_conv1d"] == 6 * LAYERS[name]
    assert torch.equal(before[0], after[0]) and relative_error(after[1], before[1]) < 1e-5
    whole = model(after[0], use_cache=False).logits[:, 8:-1].transpose(0, 1)
    assert relative_error(after[1], whole) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    """model.bfloat16().generate(), and its logits as near to float32's as those of the slow path."""
    model = made(name)
    exact = model(IDS).logits
    model = model.bfloat16()

    def run(model):
        with torch.no_grad():
            return model(IDS).logits, model.generate(IDS, max_new_tokens=4, do_sample=False)

    before, after = before_and_after(model, run)
    errors = [relative_error(each[0].float(), exact) for each in (before, after)]
    assert errors[1] < 1.2 * errors[0] < 0.2
    assert after[1].shape == (2, 13)


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_other_activations(act, calls):
    model = made("Mamba", hidden_act=act)
    before, after = before_and_after(model, lambda m: m(IDS).logits)
    assert calls["causal_conv1d"] == 2 and relative_error(after, before) < 1e-5


def test_a_step_outside_no_grad(calls):
    """It is theirs, which keeps a graph; ours takes no part in autograd."""

    def step(model):
        cache = model(IDS[:, :8], use_cache=True).cache
        return model(IDS[:, 8:], cache=cache, use_cache=True).logits

    before, after = before_and_after(made("Mamba"), step)
    assert "selective_state_update" not in calls and after.requires_grad
    assert relative_error(after, before) < 1e-5


def test_the_example(capsys):
    script = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "transformers_mamba.py"))
    script["main"](
        ["--model", "FalconMamba", "--hidden", "16", "--layers", "1", "--tokens", "8", "--runs", "1"]
    )
    found = capsys.readouterr().out
    assert found.count(" ms before ") == 3 and float(found.split("apart by ")[1].split()[0]) < 1e-4


def test_patch_and_unpatch():
    model, other = made("Mamba"), made("FalconMamba")
    module = transformers.models.mamba.modeling_mamba
    before = dict(vars(module))
    places = ours.patch(model)
    names = (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba_selective_scan",
        "mamba_selective_state_update",
    )
    assert places == [f"{module.__name__}.{name}" for name in names]
    assert ours.patch(model) == places and set(ours.patch(other)).isdisjoint(places)
    assert all(vars(module)[name] is not before[name] for name in names)
    assert mamba_ssm.unpatch() == [] and len(ours.unpatch()) == 8 and ours.unpatch() == []
    assert vars(module) == before


def test_refused():
    check_refused(lambda: ours.patch("mamba"), TypeError, ["transformers.patch", "model is a str"])
    check_refused(
        lambda: ours.patch(torch.nn.Linear(2, 2)), ValueError, ["Linear", "mamba_selective_scan", "5.24"]
    )
    ours.patch(made("Mamba"))
    conv, x = transformers.models.mamba.modeling_mamba.causal_conv1d_fn, torch.randn(2, 3, 9)
    check_refused(
        lambda: conv(x, torch.randn(3, 4), seq_idx=IDS.int()), ValueError, ["causal_conv1d_fn", "seq_idx"]
    )
