"""Schedulers of diffusers with a fused step against a float64 run of the originals."""

from __future__ import annotations

import copy
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

import pydiffuse as pd
from tests.helpers import check_refused, relative_error

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: test)")

from pydiffuse.integrations import diffusers as ours  # noqa: E402

FLOW, DDIM, DPM, UNIPC = (
    "FlowMatchEulerDiscreteScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
LATENT = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "beta_schedule": "scaled_linear",
}
WAN = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES = [
    (FLOW, {}, {}),
    (FLOW, {"shift": 3.0}, {}),
    (FLOW, {"use_karras_sigmas": True}, {}),
    (FLOW, {"use_exponential_sigmas": True, "invert_sigmas": True}, {}),
    (FLOW, {"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.7}),
    (FLOW, {"stochastic_sampling": True}, {}),
    (DDIM, LATENT, {}),
    (DDIM, LATENT, {"eta": 0.6}),
    (DDIM, {**LATENT, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing"}, {"eta": 0.9}),
    (DDIM, {**LATENT, "prediction_type": "sample", "timestep_spacing": "linspace"}, {}),
    (DPM, {}, {}),
    (DPM, {"solver_order": 1}, {}),
    (DPM, {"solver_order": 3, "use_karras_sigmas": True}, {}),
    (DPM, {"solver_type": "heun", "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"}, {}),
    (DPM, {"solver_order": 3, "prediction_type": "sample", "euler_at_final": True, "lower_order_final": False}, {}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, {}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun",
           "prediction_type": "v_prediction"}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++"}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_exponential_sigmas": True}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"}, {}),
    (DPM, WAN, {}),
    (DPM, {**WAN, "solver_order": 3, "final_sigmas_type": "sigma_min"}, {}),
    (UNIPC, WAN, {}),
    (UNIPC, {**WAN, "solver_order": 3, "disable_corrector": [0, 1]}, {}),
    (UNIPC, {**WAN, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    (UNIPC, {}, {}),
    (UNIPC, {"solver_order": 3, "use_karras_sigmas": True}, {}),
    (UNIPC, {"solver_order": 1, "use_exponential_sigmas": True, "prediction_type": "sample"}, {}),
    (UNIPC, {"solver_order": 4, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min",
             "lower_order_final": False}, {}),
    (UNIPC, {"predict_x0": False, "solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3}, {}),
    (UNIPC, {"predict_x0": False, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"}, {}),
]  # fmt: skip


def model(x, i):
    """A smooth field in place of a model, of the sample's size."""
    return torch.tanh(x * 0.7 + 0.1 * i) + 0.3 * x.flip(-1)


def run(scheduler, x, steps, double=False, **options):
    """All samples of a run; `double` is the original in float64, from the same float32 levels."""
    scheduler.set_timesteps(steps, **{k: options.pop(k) for k in ("mu",) if k in options})
    module = importlib.import_module(type(scheduler).__module__)
    if double:
        for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
        module.torch = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
        x = x.double()
    takes = inspect.signature(scheduler.step).parameters
    samples = []
    try:
        for i, t in enumerate(scheduler.timesteps):
            x = x.to(torch.float64) if double else x
            if "generator" in takes:
                options["generator"] = Noise(i)
            x = scheduler.step(model(x, i), t, x, **options, return_dict=False)[0]
            samples.append(x)
    finally:
        if double:
            module.torch = torch
    return samples


class Noise(torch.Generator):
    """The generator of a step."""

    def __new__(cls, step):
        return torch.Generator().manual_seed(step)


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """Float32 draws, in the float64 run, too."""
    from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow

    def draw(shape, generator=None, device=None, dtype=None):
        return torch.randn(shape, generator=generator).to(dtype)

    from pydiffuse.integrations.diffusers.schedulers import levels

    for module in (scheduling_ddim, scheduling_dpmsolver_multistep, flow, levels):
        monkeypatch.setattr(module, "randn_tensor", draw)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name, config, options", CASES)
def test_all_steps_of_a_run(name, config, options, steps, monkeypatch):
    original = getattr(diffusers, name)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    exact = run(original(**config), x, steps, double=True, **options)
    usual = run(original(**config), x, steps, **options)

    def not_fused(*_, **__):
        raise AssertionError("a step that is fused went to diffusers")

    monkeypatch.setattr(original, "step", not_fused)
    found = run(getattr(ours, name)(**config), x, steps, **options)
    for step, (a, b, c) in enumerate(zip(found, exact, usual, strict=True)):
        assert a.dtype == torch.float32 and b.isfinite().all()
        bound = max(2e-6, 4 * relative_error(c, b))
        assert relative_error(a, b) < bound, (step, relative_error(a, b), relative_error(c, b))


def test_unipc_ends_in_finite_samples():
    """Of bh1 the last step of diffusers is 0 times infinity; it has the first order there, so bh2's is its."""
    x = torch.randn(1, 3, 4, 4)
    for config in (WAN, {}):
        found = run(ours.UniPCMultistepScheduler(solver_type="bh1", **config), x, 8)
        theirs = run(diffusers.UniPCMultistepScheduler(solver_type="bh1", **config), x, 8)
        torch.testing.assert_close(found[:-1], theirs[:-1], rtol=1e-5, atol=1e-5)
        assert theirs[-1].isnan().all() and found[-1].isfinite().all()
    late = run(ours.UniPCMultistepScheduler(lower_order_final=False, **WAN), x, 8)[-1]
    assert late.isfinite().all()


def test_timesteps_of_tokens():
    """x + (sigma - sigma') v, with the next lower sigma of the schedule; without them x + (sigma' - sigma) v."""
    x, v = torch.randn(2, 2, 6, 8)
    ts = torch.tensor([[1000.0, 700.0, 512.5, 20.0, 0.0, 3.0], [900.0] * 6])
    fused, plain = ours.FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler in (fused, plain):
        scheduler.set_timesteps(7)
    for pred, sample in ((v, x), (v.bfloat16(), x), (v.bfloat16(), x.bfloat16())):
        a, b = (s.step(pred, s.timesteps[0], sample, per_token_timesteps=ts) for s in (fused, plain))
        assert a.prev_sample.dtype == b.prev_sample.dtype == torch.float32
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-6, atol=1e-6)
    assert fused.step_index == plain.step_index == 3
    check_refused(lambda: fused.step(v, 3, x), ValueError, ["integer"])


@pytest.mark.parametrize(
    "pair", [("bfloat16", "bfloat16"), ("float32", "float16"), ("float16", "float32")]
)
@pytest.mark.parametrize("name, config", [(FLOW, {}), (DDIM, LATENT), (DPM, {}), (UNIPC, WAN)])
def test_dtypes(name, config, pair):
    of_x, of_m = (getattr(torch, d) for d in pair)
    x = torch.randn(2, 3, 5, 7)
    found = []
    for module in (ours, diffusers):
        scheduler = getattr(module, name)(**config)
        scheduler.set_timesteps(6)
        sample = x.to(of_x)
        for i, t in enumerate(scheduler.timesteps[:3]):
            sample = scheduler.step(model(x, i).to(of_m), t, sample, return_dict=False)[0]
            assert sample.shape == x.shape
        found.append(sample)
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)


FALLBACKS = [
    (DDIM, {}, {}),
    (DDIM, {**LATENT, "thresholding": True}, {"eta": 0.5}),
    (DDIM, LATENT, {"use_clipped_model_output": True}),
    (DPM, {"thresholding": True}, {}),
    (UNIPC, {"thresholding": True}, {}),
]


@pytest.mark.parametrize("name, config, options", FALLBACKS)
def test_what_is_not_fused_is_diffusers_own(name, config, options):
    x = torch.randn(2, 3, 5, 7)
    found, expected = (run(getattr(m, name)(**config), x, 4, **options) for m in (ours, diffusers))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name, config", [(FLOW, {}), (DDIM, LATENT), (DPM, {"solver_order": 3}), (UNIPC, WAN)]
)
def test_float64_is_diffusers_own_in_the_middle_of_a_run(name, config):
    """What is kept between steps is in the same places."""
    fused, plain = (getattr(m, name)(**config) for m in (ours, diffusers))
    x = y = torch.randn(2, 3, 5, 7)
    for scheduler in (fused, plain):
        scheduler.set_timesteps(6)
    for i, t in enumerate(fused.timesteps):
        own = torch.float64 if i in (2, 3) else torch.float32
        x = fused.step(model(x.to(own), i), t, x.to(own), return_dict=False)[0].float()
        y = plain.step(model(y, i), t, y, return_dict=False)[0]
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_gradients_pass():
    scheduler = ours.UniPCMultistepScheduler(**WAN)
    scheduler.set_timesteps(3)
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    y = x
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(model(y, i), t, y, return_dict=False)[0]
    y.sum().backward()
    own = diffusers.UniPCMultistepScheduler(**WAN)
    own.set_timesteps(3)
    z = (x0 := x.detach().clone().requires_grad_())
    for i, t in enumerate(own.timesteps):
        z = own.step(model(z, i), t, z, return_dict=False)[0]
    z.sum().backward()
    torch.testing.assert_close(x.grad, x0.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, config", [(FLOW, {}), (DDIM, LATENT), (DPM, {}), (UNIPC, WAN)])
def test_one_call_installs_it(name, config, tmp_path):
    own = getattr(diffusers, name)(**config)
    own.set_timesteps(5)
    if name == FLOW:
        own.set_shift(2.0)
    fused = ours.fuse_scheduler(own)
    assert type(fused) is getattr(ours, name) and ours.fuse_scheduler(fused) is fused
    assert torch.equal(fused.timesteps, own.timesteps) and getattr(own, "shift", 0) == getattr(
        fused, "shift", 0
    )
    fused.save_pretrained(tmp_path)
    assert dict(getattr(ours, name).from_pretrained(tmp_path).config).items() >= config.items()
    assert dict(getattr(diffusers, name).from_config(fused.config).config).items() >= config.items()
    assert type(copy.deepcopy(fused)) is type(fused)
    for reference in ("reference", "cpu"):
        with pd.use_backend(reference):
            run(fused, torch.randn(1, 2, 3, 4), 3)


def test_schedulers_that_are_not_fused_are_refused():
    check_refused(
        lambda: ours.fuse_scheduler(diffusers.EulerDiscreteScheduler()),
        TypeError,
        ["fuse_scheduler", "EulerDiscrete", "accepted", "DDIMScheduler"],
    )
