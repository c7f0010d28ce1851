"""Guidance rules on the hooks of a ComfyUI model.

ComfyUI's models predict the denoised sample D. A rule that is made for the model's own prediction, noise or
velocity, gets x - D, which is that times sigma: all rules here but CFG-Zero*'s 1e-8 are the same at any
scale. APG is made for denoised samples and gets them.

Every function returns a clone of the model (a ModelPatcher), as nodes do. Sums are over each sample of the
batch, all its dimensions. A step that ComfyUI samples without the negative prompt (cfg 1, or a guider that
has none) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pydiffuse import guidance

KEY = "pydiffuse"
Args = dict[str, Any]


def tcfg(model: Any) -> Any:
    """TCFG (arXiv 2503.18137): the unconditional prediction without its tangential part.

    It stands before the guidance itself: ComfyUI's own, or another node's (`sampler_pre_cfg_function`).
    """

    def hook(args: Args) -> list[Tensor]:
        out: list[Tensor] = args["conds_out"]
        if _unguided(args["conds"]):
            return out
        x = args["input"]
        return [out[0], x - guidance.tcfg(x - out[0], x - out[1], 0.0), *out[2:]]

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(hook)
    return patched


def cfg_zero(model: Any, *, zero_init_steps: int = 0) -> Any:
    """CFG-Zero* (arXiv 2503.18886): the unconditional prediction scaled to the conditional one.

    It stands before the guidance itself (`sampler_pre_cfg_function`). zero_init_steps: for so many steps of a
    run that begins at the model's largest sigma the prediction is zero, as the paper has it for flow models.
    """

    def scaled(args: Args) -> list[Tensor]:
        out: list[Tensor] = args["conds_out"]
        if _unguided(args["conds"]):
            return out
        x = args["input"]
        return [out[0], x - guidance.cfg_zero(x - out[0], x - out[1], 0.0), *out[2:]]

    def still(args: Args) -> Tensor:
        return args["input"] if _within(args, zero_init_steps) else args["denoised"]  # type: ignore[no-any-return]

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(scaled)
    if zero_init_steps > 0:
        patched.set_model_sampler_post_cfg_function(still)
    return patched


def apg(model: Any, *, eta: float = 1.0, norm_threshold: float = 5.0, momentum: float = 0.0) -> Any:
    """Adaptive projected guidance (arXiv 2410.02416) of denoised samples: c + (w - 1) (d_orth + eta d_par).

    The state of momentum belongs to a sampling run: it begins anew with each, and where sigma rises within
    one. A sampler that evaluates the model twice in a step also counts twice. norm_threshold 0: no limit.
    """
    state: dict[str, Any] = {}

    def hook(args: Args) -> Tensor:
        if args["input_uncond"] is None:
            return args["cond"]  # type: ignore[no-any-return]
        options: dict[str, Any] = {"eta": eta, "norm_threshold": norm_threshold, "original": True}
        given = args["cond_denoised"], args["uncond_denoised"], args["cond_scale"] - 1
        if momentum == 0:
            return args["input"] - guidance.apg(*given, **options)  # type: ignore[no-any-return]
        sigma = float(args["sigma"].max())
        if sigma > state.get("sigma", sigma):
            state.clear()
        guided, state["average"] = guidance.apg(
            *given, momentum=momentum, state=state.get("average"), **options
        )
        state["sigma"] = sigma
        return args["input"] - guided  # type: ignore[no-any-return]

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        state.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            state.clear()

    patched = _with_own(model, "apg", "sampler_cfg_function")
    patched.set_model_sampler_cfg_function(hook)
    patched.add_wrapper_with_key("outer_sample", KEY, run)
    return patched


def magnitude_aware(model: Any, *, alpha: float = 8.0, rescale: float = 0.0) -> Any:
    """Magnitude-aware guidance (MAMBO-G): the scale shrinks where the two predictions are far apart.

    rescale: the factor of arXiv 2305.08891.
    """

    def hook(args: Args) -> Tensor:
        if args["input_uncond"] is None:
            return args["cond"]  # type: ignore[no-any-return]
        return guidance.magnitude_aware(
            args["cond"], args["uncond"], args["cond_scale"], alpha=alpha, rescale=rescale
        )

    patched = _with_own(model, "magnitude_aware", "sampler_cfg_function")
    patched.set_model_sampler_cfg_function(hook)
    return patched


def perp_neg(
    model: Any, empty: list[Args], calculate: Callable[..., list[Tensor]], neg_scale: float
) -> Any:
    """Perp-Neg (arXiv 2304.04968): the negative prompt pushed away from, across the positive one.

    empty: an empty prompt as a guider has it (`comfy.sampler_helpers.convert_cond`), sampled in one batch with
    the other two. calculate: `comfy.samplers.calc_cond_batch`. What guides afterwards, ComfyUI or another
    node, gets the empty prompt's prediction u as the unconditional one, and u + e - v perp(n - u, e) with
    e = c - u as the conditional one: under plain guidance that is Perp-Neg.
    """
    name = f"{KEY}_empty"
    guiders: list[Any] = []

    def hook(args: Args) -> list[Tensor]:
        conds, rest = args["conds"], (args["input"], args["sigma"], args["model_options"])
        if _unguided(conds):
            return calculate(args["model"], conds, *rest)
        if not guiders:
            raise RuntimeError("perp_neg: called outside of a sampling run of a CFGGuider")
        given = [*conds[:2], guiders[-1].conds[name], *conds[2:]]
        cond, negative, uncond, *others = calculate(args["model"], given, *rest)
        return [guidance.perp_neg(cond, uncond, [negative], 1.0, [neg_scale]), uncond, *others]

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guiders.append(executor.class_obj)
        guiders[-1].conds[name] = [{**cond, "prompt_type": "negative"} for cond in empty]
        try:
            return executor(*args, **kwargs)
        finally:
            guiders.pop()

    patched = _with_own(model, "perp_neg", "sampler_calc_cond_batch_function")
    patched.set_model_sampler_calc_cond_batch_function(hook)
    patched.add_wrapper_with_key("outer_sample", KEY, run)
    patched.model_options["disable_cfg1_optimization"] = True  # at cfg 1 the negative prompt counts, too
    return patched


def _unguided(conds: list[Any]) -> bool:
    """ComfyUI has zeros in the place of the prediction for a prompt that is None."""
    return len(conds) < 2 or conds[0] is None or conds[1] is None


def _with_own(model: Any, node: str, hook: str) -> Any:
    """A clone, if it has no such hook: a model has one, and a second would replace it without a word."""
    if hook in model.model_options:
        raise ValueError(
            f"{node}: the model has a {hook} of another node already; accepted: a model without one"
        )
    return model.clone()


def _within(args: Args, steps: int) -> bool:
    """Whether this is one of the first steps of a run from the model's largest sigma on."""
    sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
    begin, end = float(sigmas[0]), float(sigmas[min(steps, len(sigmas) - 1)])
    largest = float(args["model"].model_sampling.sigma_max)
    return begin >= largest * (1 - 1e-5) and float(args["sigma"].max()) > end
