"""ComfyUI's hooks, called as its sampler calls them by tests/comfyui.py, a stand-in."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydiffuse
from pydiffuse.integrations import comfyui
from pydiffuse.integrations.comfyui import attention, guidance
from pydiffuse.reference import guidance as reference
from tests import comfyui as stand_in
from tests.comfyui import SIGMAS, Guider, Model
from tests.helpers import relative_error

FOLDER = Path(comfyui.__file__).parent
W = 4.0


def latents(seed=0, shape=(2, 3, 5, 7), many=4):
    """x, and predictions of it that are near each other."""
    generator = torch.Generator().manual_seed(seed)
    x, base, *moves = torch.randn(many + 1, *shape, generator=generator).unbind()
    return [x, *(base + 0.4 * (1 + i) * move for i, move in enumerate(moves))]


def condition(value, change=0.0):
    """A condition whose prediction moves with sigma."""
    return [{"predict": lambda x, sigma: value + change * sigma[0] * x}]


def sampled(model, x, cond, uncond, scale=W, sigmas=SIGMAS):
    return Guider(model, cond, uncond, scale).sample(x, sigmas)


@pytest.mark.parametrize("name", ["tcfg", "cfg_zero", "magnitude_aware"])
def test_rules_on_predictions(name):
    """The rule in float64 on x - D, per sample: the samples of a batch are of different sizes."""
    x, c, u, _ = (t * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1) for t in latents())
    model = getattr(guidance, name)(Model())
    found = sampled(model, x, condition(c), condition(u))
    x, c, u = x.double(), c.double(), u.double()
    expected = x - getattr(reference, name)(x - c, x - u, W)
    plain = u + W * (c - u)
    assert len(found) == len(SIGMAS) - 1
    assert all(relative_error(D, expected) < 2e-6 for D in found)
    assert relative_error(plain, expected) > 1e-2


def apg_steps(x, c, u, changes, eta, threshold, momentum, sigmas=SIGMAS):
    """c + (w - 1) d' in float64, by the paper: norms of whole samples, d summed up with momentum."""
    average, steps = 0, []
    for sigma in sigmas[:-1].double():
        moved = [
            v.double() + change * sigma * x.double() for v, change in zip((c, u), changes, strict=True)
        ]
        d = average = (moved[0] - moved[1]).flatten(1) + momentum * average
        d = d * (threshold / d.norm(dim=1, keepdim=True)).clamp(max=1) if threshold else d
        axis = torch.nn.functional.normalize(moved[0].flatten(1), dim=1)
        along = (d * axis).sum(1, keepdim=True) * axis
        steps.append(moved[0] + (W - 1) * (d - along + eta * along).view_as(x))
    return steps


@pytest.mark.parametrize("eta, threshold, momentum", [(0.2, 3.0, -0.5), (1.0, 0.0, 0.0), (0.0, 9.0, 0.7)])
def test_apg_on_denoised_samples(eta, threshold, momentum):
    x, c, u, _ = latents()
    model = guidance.apg(Model(), eta=eta, norm_threshold=threshold, momentum=momentum)
    expected = apg_steps(x, c, u, (0.1, -0.5), eta, threshold, momentum)
    for _ in range(2):  # every run begins with no momentum
        found = sampled(model, x, condition(c, 0.1), condition(u, -0.5))
        assert max(map(relative_error, found, expected)) < 2e-6
    if momentum:
        assert relative_error(expected[1], apg_steps(x, c, u, (0.1, -0.5), eta, threshold, 0.0)[1]) > 1e-3


def test_momentum_begins_anew_where_sigma_rises_and_after_an_error():
    x, c, u, _ = latents()
    model = guidance.apg(Model(), momentum=-0.5).clone()
    first = apg_steps(x, c, u, (0, 0), 1.0, 5.0, 0.0)[0]
    sigmas = torch.tensor([0.8, 0.5, 0.9, 0.0])
    found = sampled(model, x, condition(c), condition(u), sigmas=sigmas)
    assert relative_error(found[1], first) > 1e-2
    assert relative_error(found[2], first) < 2e-6

    def failing(x, sigma):
        if sigma[0] < 0.9:
            raise InterruptedError
        return c

    with pytest.raises(InterruptedError):
        sampled(model, x, [{"predict": failing}], condition(u))
    # Of another shape and at a lower sigma: nothing is left of the run before.
    part = [t[:1] for t in (x, c, u)]
    found = sampled(model, part[0], *map(condition, part[1:]), sigmas=torch.tensor([0.9, 0.0]))
    assert relative_error(found[0], first[:1]) < 2e-6


@pytest.mark.parametrize("scale", [W, 1.0])
def test_perp_neg_is_per_sample(scale):
    """ComfyUI's own divides one sum over the whole batch by another."""
    x, c, n, u = latents()
    c, n, u = (t * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1) for t in (c, n, u))
    model = guidance.perp_neg(Model(), condition(u), stand_in.calc_cond_batch, 0.6)
    found = sampled(model, x, condition(c), condition(n), scale)
    c, n, u = c.double(), n.double(), u.double()
    expected = reference.perp_neg(c, u, [n], scale, [0.6])
    assert relative_error(found[0], expected) < 2e-6
    e, y = c - u, n - u
    whole = u + scale * (e - 0.6 * (y - (y * e).sum() / (e * e).sum() * e))
    assert relative_error(whole[0], expected[0]) > 1e-2
    with pytest.raises(RuntimeError, match="outside of a sampling run"):
        options = model.model_options
        stand_in.sampling_function(stand_in.Inner(), x, x[:, 0, 0, 0], [{}], [{}], scale, options)


def test_without_a_negative_prompt():
    x, c, u, _ = latents()
    rules = [guidance.tcfg, guidance.cfg_zero, guidance.apg, guidance.magnitude_aware]
    models = [rule(Model()) for rule in rules]
    models.append(guidance.perp_neg(Model(), condition(u), stand_in.calc_cond_batch, 1.0))
    for i, model in enumerate(models):
        # ComfyUI has zeros for the prediction that there is not.
        expected = c if rules[i : i + 1] in ([guidance.apg], [guidance.magnitude_aware]) else W * c
        assert torch.allclose(sampled(model, x, condition(c), None)[0], expected, atol=1e-6)
        assert torch.allclose(sampled(model, x, condition(c), None, 1.0)[0], c, atol=1e-6)
        if i < 4:  # cfg 1: ComfyUI leaves the negative prompt out
            assert torch.allclose(sampled(model, x, condition(c), condition(u), 1.0)[0], c, atol=1e-6)


def test_rules_before_the_guidance_go_with_another_one():
    """TCFG changes the unconditional prediction, and the other node's function guides."""
    x, c, u, _ = latents()
    model = guidance.magnitude_aware(guidance.tcfg(Model()), alpha=2.0, rescale=0.7)
    found = sampled(model, x, condition(c), condition(u))[0]
    x, c, u = x.double(), c.double(), u.double()
    damped = reference.tcfg(x - c, x - u, 0.0)
    expected = x - reference.magnitude_aware(x - c, damped, W, alpha=2.0, rescale=0.7)
    assert relative_error(found, expected) < 2e-6


def test_a_second_function_in_the_same_place_is_refused():
    model = Model()
    patched = guidance.apg(model)
    assert model.model_options == Model().model_options and not model.wrappers
    with pytest.raises(ValueError, match="magnitude_aware: the model has a sampler_cfg_function"):
        guidance.magnitude_aware(patched)
    once = guidance.perp_neg(Model(), [], stand_in.calc_cond_batch, 1.0)
    with pytest.raises(ValueError, match="perp_neg: the model has a sampler_calc_cond_batch_function"):
        guidance.perp_neg(once, [], stand_in.calc_cond_batch, 1.0)


@pytest.mark.parametrize("begin, zeros", [(1.0, 2), (0.9, 0)])
def test_zero_init(begin, zeros):
    x, c, u, _ = latents()
    sigmas = torch.tensor([begin, 0.7, 0.4, 0.0])
    model = guidance.cfg_zero(Model(), zero_init_steps=2)
    found = sampled(model, x, condition(c), condition(u), sigmas=sigmas)
    assert [torch.equal(D, x) for D in found] == [True] * zeros + [False] * (3 - zeros)


# Attention


def dense(q, k, v, plan, keys=None, scale=None):
    """[B, H, S, D] in float64 under the plan's mask, and under `keys` [B, S]."""
    seen = plan.to_dense()[:, None] if plan.to_dense().dim() == 3 else plan.to_dense()[None]
    if keys is not None:
        seen = seen & keys[:, None, None]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v


def unexpected(*args, **kwargs):
    raise AssertionError("the original was called")


PLAN = pydiffuse.plans.frames(3, 7, 1, text=2)
S = PLAN.q_length


def override_of(model):
    return model.model_options["transformer_options"]["optimized_attention_override"]


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape, key_heads", [(False, 4), (True, 4), (False, 2), (True, 2)])
def test_attention_layouts(skip_reshape, key_heads, skip_output_reshape):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, S, 16) for h in (4, key_heads, key_heads))
    given = [t if skip_reshape else t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    options = {"transformer_options": {"block": ("double", 1)}, "_inside_attn_wrapper": True}
    if key_heads < 4:
        options |= {"enable_gqa": True, "scale": 0.1}
    override = override_of(attention.tile_attention(Model(), PLAN))
    with torch.inference_mode():
        out = override(
            unexpected, *given, 4, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **options
        )  # fmt: skip
    expected = dense(q, k, v, PLAN, scale=options.get("scale"))
    if not skip_output_reshape:
        expected = expected.transpose(1, 2).flatten(2)
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 2e-6


def test_the_order_of_sliding_tiles():
    plan = attention.sliding_plan(torch.zeros(1, 4, 3, 7, 12), (1, 2, 3), (3, 2, 3))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, plan.q_length, 8)
    out = override_of(attention.tile_attention(Model(), plan))(
        unexpected, q, k, v, heads=2, skip_reshape=True, skip_output_reshape=True
    )
    assert plan.q_length == 3 * 4 * 6 and plan.density < 0.6
    assert relative_error(out, dense(q, k, v, plan)) < 2e-6


def masks(kind):
    keys = torch.ones(2, S, dtype=torch.bool)
    keys[0, -1] = keys[1, 4] = False
    bias = torch.where(keys, 0.0, torch.finfo(torch.float32).min)
    return keys, {
        "bool": keys[:, None, None],
        "3D": bias[:, None].expand(2, S, S),
        "additive": torch.where(keys, 0.0, -torch.inf)[:, None, None],
    }[kind]


@pytest.mark.parametrize("kind", ["bool", "3D", "additive"])
def test_masks_of_keys_are_combined_with_the_plan(kind):
    torch.manual_seed(0)
    keys, mask = masks(kind)
    q, k, v = torch.randn(3, 2, 2, S, 8)
    override = override_of(attention.tile_attention(Model(), PLAN))
    out = override(unexpected, q, k, v, 2, mask, None, True, True)
    assert relative_error(out, dense(q, k, v, PLAN, keys)) < 2e-6


@pytest.mark.parametrize("mask", [torch.ones(S, S).tril().bool(), torch.rand(2, S, S), torch.rand(1, S)])
def test_other_masks_are_refused(mask):
    q = torch.randn(2, S, 16)
    override = override_of(attention.tile_attention(Model(), PLAN))
    with pytest.raises(ValueError, match="attn_mask"):
        override(unexpected, q, q, q, 2, mask=mask)
    with pytest.raises(ValueError, match=r"unknown arguments \['is_causal'\]"):
        override(unexpected, q, q, q, 2, is_causal=True)
    assert override(unexpected, q, q, q, 2, mask=torch.zeros(S, S), is_causal=False).shape == q.shape


def test_other_attention_goes_on_unchanged():
    """Cross-attention, and lengths of other plans, which the node before this one serves."""
    smaller = pydiffuse.plans.local(S - 1, 4)
    model = attention.tile_attention(attention.tile_attention(Model(), smaller), PLAN)
    override, calls = override_of(model), []

    def function(*args, **kwargs):
        calls.append((args, kwargs))
        return args[0]

    q, k = torch.randn(1, S, 16), torch.randn(1, 5, 16)
    given = {"heads": 2, "mask": torch.rand(S, 5), "transformer_options": {}, "is_causal": True}
    assert override(function, q, k, k, **given) is q
    [((found, *others), kwargs)] = calls
    assert found is q and others[0] is k and kwargs == given
    q, k, v = torch.randn(3, 1, 2, S - 1, 8)
    out = override(unexpected, q, k, v, 2, skip_reshape=True, skip_output_reshape=True)
    assert relative_error(out, dense(q, k, v, smaller)) < 2e-6


def test_under_torch_compile():
    """The graph breaks at attention; what is around it is compiled."""
    model = attention.tile_attention(Model(), PLAN)
    q, k, v = torch.randn(3, 1, 2, S, 8)

    def block(q, k, v):
        out = override_of(model)(unexpected, 2 * q, k, v, 2, skip_reshape=True, skip_output_reshape=True)
        return 3 * out

    compiled = torch.compile(block, backend="eager")
    assert relative_error(compiled(q, k, v), 3 * dense(2 * q, k, v, PLAN)) < 2e-6


def test_a_run_without_the_plans_length_is_an_error():
    x = torch.zeros(1, 1, 1, 1)

    def run(tokens):
        model = attention.tile_attention(Model(), PLAN)
        q = torch.randn(1, tokens, 16)

        def predict(x, sigma):
            override_of(model)(lambda q, *rest, **options: q, q, q, q, 2)
            return x

        sampled(model, x, [{"predict": predict}], None)

    run(S)
    with pytest.raises(RuntimeError, match=rf"no attention had the {S} queries.*\({S + 1}, {S + 1}\)"):
        run(S + 1)
    with pytest.raises(TypeError, match="accepted: a TilePlan"):
        attention.tile_attention(Model(), [PLAN])


def test_plans_for_latents():
    plan = attention.frames_plan(torch.zeros(1, 16, 5, 9, 13), 2, text_tokens=3)
    assert plan == pydiffuse.plans.frames(5, 35, 2, 3)
    image = attention.sliding_plan(torch.zeros(1, 4, 16, 24), (9, 4, 4), (9, 8, 12), patch_size=1)
    assert image == pydiffuse.plans.sliding_tile((16, 24), (4, 4), (8, 12))
    with pytest.raises(ValueError, match=r"frames_plan: the latent is .*accepted: \[B, C, T, H, W\]"):
        attention.frames_plan(torch.zeros(1, 4, 8, 8), 1)


# Nodes


@pytest.fixture
def nodes(monkeypatch):
    """The folder as ComfyUI loads it: by its path, under a name of ComfyUI's making."""
    stand_in.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("/custom_nodes/pydiffuse", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in found}


def test_schemas_fit_the_functions(nodes):
    assert len(nodes) == 9 and all(name.startswith("Pydiffuse") for name in nodes)
    for node in nodes.values():
        schema = node.define_schema()
        defaults = {port.id: port.options.get("default", 0) for port in schema.inputs}
        inspect.signature(node.execute).bind(**defaults)
        assert len(schema.outputs) == 1 and schema.category.startswith("pydiffuse/")
        for port in schema.inputs:
            if "default" in port.options:
                assert port.options["min"] <= port.options["default"] <= port.options["max"]


def test_nodes_do_what_the_functions_do(nodes, tmp_path):
    x, c, u, n = latents()

    def run(name, negative=u, **inputs):
        [patched] = nodes[f"Pydiffuse{name}"].execute(model=Model(), **inputs).result
        return sampled(patched, x, condition(c), condition(negative))[-1]

    expected = x - pydiffuse.tcfg(x - c, x - u, W)
    assert relative_error(run("TCFG"), expected) < 1e-5
    expected = x - pydiffuse.cfg_zero(x - c, x - u, W)
    assert relative_error(run("CFGZeroStar", zero_init_steps=1), expected) < 1e-5
    expected = apg_steps(x, c, u, (0, 0), 0.5, 2.0, -0.3)[-1]
    assert relative_error(run("APG", eta=0.5, norm_threshold=2.0, momentum=-0.3), expected) < 1e-5
    expected = x - pydiffuse.magnitude_aware(x - c, x - u, W, alpha=3.0, rescale=0.2)
    assert relative_error(run("MagnitudeAware", alpha=3.0, rescale=0.2), expected) < 1e-5
    empty = [[torch.zeros(1, 1), condition(u)[0]]]
    expected = pydiffuse.perp_neg(c, u, [n], W, [0.8])
    found = run("PerpNeg", negative=n, empty_conditioning=empty, neg_scale=0.8)
    assert relative_error(found, expected) < 1e-5

    latent, sizes = {"samples": torch.zeros(1, 4, 2, 8, 8)}, {"patch_size": 2, "text_tokens": 1}
    [plan] = nodes["PydiffuseFramesPlan"].execute(latent=latent, references=1, **sizes).result
    assert plan == pydiffuse.plans.frames(2, 16, 1, 1)
    tiles = {f"{of}_{n}": 2 for of in ("tile", "window") for n in ("frames", "height", "width")}
    [sliding] = nodes["PydiffuseSlidingTilePlan"].execute(latent=latent, **tiles, **sizes).result
    assert sliding == pydiffuse.plans.sliding_tile((2, 4, 4), (2, 2, 2), (2, 2, 2), text=1)
    plan.save(tmp_path / "plan.json")
    [loaded] = nodes["PydiffuseLoadPlan"].execute(path=str(tmp_path / "plan.json")).result
    [patched] = nodes["PydiffuseTileAttention"].execute(model=Model(), plan=loaded).result
    q = torch.randn(1, plan.q_length, 16)
    assert override_of(patched)(unexpected, q, q, q, 2).shape == q.shape


def test_the_folder_says_what_it_is():
    text = (FOLDER / "pyproject.toml").read_text()
    assert "[tool.comfy]" in text and 'dependencies = ["pydiffuse"]' in text
    assert re.search(r'^version = "(.*)"', text, re.M)[1] == pydiffuse.__version__


@pytest.mark.skipif(
    "PYDIFFUSE_COMFYUI" not in os.environ, reason="PYDIFFUSE_COMFYUI names no ComfyUI folder"
)
def test_comfyui_itself():
    """The example in ComfyUI's engine: a plan that keeps all moves nothing, nodes go together."""
    example = FOLDER.parents[2] / "examples" / "comfyui_plan.py"
    command = [sys.executable, str(example), "--frames", "2", "--size", "8", "--width", "64"]
    done = subprocess.run(
        command, cwd=os.environ["PYDIFFUSE_COMFYUI"], capture_output=True, text=True, timeout=300
    )
    moved = [float(m) for m in re.findall(r"moved by ([\d.]+)", done.stdout)]
    assert len(moved) == 2 and moved[0] == 0.0 < moved[1], done.stdout + done.stderr
