"""A stand-in for the parts of ComfyUI that our nodes touch: not ComfyUI, which is no package to install.

It calls hooks with the arguments, and in the order, of ComfyUI 0.3.64 (comfy/samplers.py, model_patcher.py,
patcher_extension.py); the samplers and the loading of models are left out.
"""

from __future__ import annotations

import copy
import sys
import types
from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0])


class Model:
    """A ModelPatcher: hooks in model_options, wrappers beside them."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> Model:
        other = Model()
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {k: {key: list(w) for key, w in v.items()} for k, v in self.wrappers.items()}
        return other

    def set_model_sampler_cfg_function(self, function: Any) -> None:
        self.model_options["sampler_cfg_function"] = function

    def set_model_sampler_calc_cond_batch_function(self, function: Any) -> None:
        self.model_options["sampler_calc_cond_batch_function"] = function

    def set_model_sampler_pre_cfg_function(self, function: Any) -> None:
        before = self.model_options.get("sampler_pre_cfg_function", [])
        self.model_options["sampler_pre_cfg_function"] = [*before, function]

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*before, function]

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


class Inner:
    """A BaseModel: D for a condition, which here is a list of one dict with the function that gives it."""

    model_sampling = types.SimpleNamespace(sigma_max=torch.tensor(1.0))


def calc_cond_batch(
    model: Inner, conds: list[Any], x: Tensor, sigma: Tensor, options: Any
) -> list[Tensor]:
    return [torch.zeros_like(x) if c is None else c[0]["predict"](x, sigma) for c in conds]


def sampling_function(
    model: Inner, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, scale: float, options: dict[str, Any]
) -> Tensor:
    if scale == 1 and not options.get("disable_cfg1_optimization", False):
        uncond = None
    common = {"input": x, "sigma": sigma, "model": model, "model_options": options}
    conds = [cond, uncond]
    if "sampler_calc_cond_batch_function" in options:
        out = options["sampler_calc_cond_batch_function"]({"conds": conds, **common})
    else:
        out = calc_cond_batch(model, conds, x, sigma, options)
    for function in options.get("sampler_pre_cfg_function", []):
        out = function(
            {"conds": conds, "conds_out": out, "cond_scale": scale, "timestep": sigma, **common}
        )
    c, u = out[0], out[1]
    if "sampler_cfg_function" in options:
        args = {
            "cond": x - c, "uncond": x - u, "cond_scale": scale, "timestep": sigma, "cond_denoised": c,
            "uncond_denoised": u, "input_cond": cond, "input_uncond": uncond, **common,
        }  # fmt: skip
        result = x - options["sampler_cfg_function"](args)
    else:
        result = u + (c - u) * scale
    for function in options.get("sampler_post_cfg_function", []):
        args = {
            "denoised": result, "cond": cond, "uncond": uncond, "cond_scale": scale,
            "uncond_denoised": u, "cond_denoised": c, **common,
        }  # fmt: skip
        result = function(args)
    return result


class Guider:
    """A CFGGuider with a sampler that evaluates the model at every sigma and stays where it is."""

    def __init__(self, model: Model, positive: Any, negative: Any, scale: float) -> None:
        self.model, self.scale = model, scale
        self.given = {"positive": positive, "negative": negative}

    def outer_sample(self, x: Tensor, sigmas: Tensor) -> list[Tensor]:
        options = copy.copy(self.model.model_options)
        options["transformer_options"] = {**options["transformer_options"], "sample_sigmas": sigmas}
        return [
            sampling_function(
                Inner(), x, s.expand(len(x)), self.conds.get("negative"), self.conds.get("positive"),
                self.scale, options,
            )
            for s in sigmas[:-1]
        ]  # fmt: skip

    def sample(self, x: Tensor, sigmas: Tensor = SIGMAS) -> list[Tensor]:
        """What the model's hooks made of the predictions at every sigma."""
        self.conds = dict(self.given)
        wrappers = [w for ws in self.model.wrappers.get("outer_sample", {}).values() for w in ws]
        with torch.inference_mode():
            return Executor(self.outer_sample, self, wrappers)(x, sigmas)


class Executor:
    """A WrapperExecutor."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](
            Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs
        )


class Port:
    """An input or output, as it was declared."""

    def __init__(self, id: str = "", **options: Any) -> None:
        self.id, self.options = id, options


def _type(name: str) -> Any:
    return types.SimpleNamespace(
        io_type=name, Input=type("Input", (Port,), {}), Output=type("Output", (Port,), {})
    )


def modules() -> dict[str, types.ModuleType]:
    """What `import comfy_api.latest`, `comfy.samplers` and `comfy.sampler_helpers` find."""
    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: types.SimpleNamespace(**fields),
        NodeOutput=lambda *values: types.SimpleNamespace(result=values),
        Custom=_type,
        **{n: _type(n.upper()) for n in ("Model", "Float", "Int", "String", "Latent", "Conditioning")},
    )
    held: dict[str, dict[str, Any]] = {
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ComfyExtension": type("ComfyExtension", (ABC,), {})},
        "comfy": {},
        "comfy.samplers": {"calc_cond_batch": calc_cond_batch},
        "comfy.sampler_helpers": {"convert_cond": lambda cond: [dict(c[1]) for c in cond]},
    }
    made = {name: types.ModuleType(name) for name in held}
    for name, values in held.items():
        vars(made[name]).update(values)
    return made


def install(monkeypatch: Any) -> None:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "pydiffuse.integrations.comfyui.nodes", raising=False)
