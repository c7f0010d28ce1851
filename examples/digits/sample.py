"""Three ways to spend the same number of model evaluations on drawing digits.

net = load_model()
label = torch.arange(10)
noise = torch.randn(10, 1, 16, 16)
digits = SAMPLERS["dual loop"](denoiser(net, label, pydiffuse.tcfg, 2.0), noise, 32)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from model import ZigzagTransformer
from torch import Tensor

import pydiffuse
from pydiffuse.samplers import Model, Prediction, diffusion_forcing, dual_loop, look_ahead

Rule = Callable[[Tensor, Tensor, float], Tensor]
Sampler = Callable[[Model, Tensor, int], Tensor]  # (model, noise (B, C, H, W), evaluations) -> images

PATCH = 2
RULES: dict[str, Rule] = {"cfg": pydiffuse.cfg, "tcfg": pydiffuse.tcfg}


def denoiser(net: ZigzagTransformer, label: Tensor, rule: Rule | None, scale: float) -> Model:
    """The network as the samplers call it: v under guidance, and how sure it is of each patch.

    An evaluation is one pass with the label and one without it, as a batch; without a rule the first only.
    """
    both = torch.cat([label, torch.full_like(label, net.classes)])

    def model(x: Tensor, t: Tensor) -> Prediction:
        if rule is None:
            v, logvar = net(x, t, label, levels=2)
            return Prediction(v, score=-logvar)
        v, logvar = net(torch.cat([x, x]), torch.cat([t, t]), both, levels=2)
        cond, uncond = v.chunk(2)
        return Prediction(rule(cond, uncond, scale), score=-logvar[: len(x)])

    return model


def watched(model: Model, seen: list[tuple[Tensor, Tensor]], which: int) -> Model:
    """The model; `seen` gets what it is shown of one sample, x (C, H, W) and t (N,), at every call."""

    def call(x: Tensor, t: Tensor) -> Tensor | Prediction:
        seen.append((x[which].clone(), t[which].clone()))
        return model(x, t)

    return call


def tokens(noise: Tensor) -> int:
    return noise.shape[2] * noise.shape[3] // PATCH**2


def uniform(model: Model, noise: Tensor, evaluations: int) -> Tensor:
    """All patches in step: Euler."""
    levels = torch.linspace(0, 1, evaluations + 1)[:, None].expand(-1, tokens(noise))
    return diffusion_forcing(model, noise, PATCH, schedule=levels)


def dual(model: Model, noise: Tensor, evaluations: int) -> Tensor:
    """The half of the patches that the network is surer of takes a step at once, the others in two parts."""
    certain = tokens(noise) // 2
    return dual_loop(model, noise, PATCH, steps=evaluations // 2, certain=certain, inner=2)


def ahead(model: Model, noise: Tensor, evaluations: int) -> Tensor:
    """The surer half jumps ahead, for the others to look at; in every step, so that each has two evaluations."""
    half = tokens(noise) // 2
    return look_ahead(model, noise, PATCH, steps=evaluations // 2, certain=half, plain=-1)


SAMPLERS: dict[str, Sampler] = {"uniform": uniform, "dual loop": dual, "look-ahead": ahead}
