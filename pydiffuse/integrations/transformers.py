"""The Mamba layers of transformers on pydiffuse's kernels: Mamba, FalconMamba, Jamba and their kind.

    from pydiffuse.integrations import transformers
    transformers.patch(model)

Their mixers call functions of their own module for the convolution, the scan and the step of decoding;
these are replaced. The layers, their parameters and their caches stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pydiffuse.integrations import mamba_ssm
from pydiffuse.integrations.places import modules, places, stand_in, stands_for

OWNER = "transformers"
OURS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": mamba_ssm.selective_scan_fn,
    "mamba_selective_state_update": mamba_ssm.selective_state_update,
    "mamba2_selective_state_update": mamba_ssm.selective_state_update,
    "causal_conv1d_fn": mamba_ssm.causal_conv1d_fn,
    "causal_conv1d_update": mamba_ssm.causal_conv1d_update,
}
"""What a module of transformers calls them. `mamba_inner_fn` stays: without it a mixer trains by the functions
above, where masks of padding count and FalconMamba's norm of dt stands where its slow path has it."""
STEPS = ("mamba_selective_state_update", "mamba2_selective_state_update", "causal_conv1d_update")
_lock = threading.Lock()


def patch(model: nn.Module) -> list[str]:
    """Put ours in the places of the functions that the model's Mamba layers call; every model of its
    architectures then runs on them. Returns the places, as "module.name". `unpatch` takes them back.

    model: of transformers 5.24, with Mamba layers; a ValueError says what it has not. On a CPU, too. A step of
    decoding that needs gradients is theirs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"transformers.patch: model is a {type(model).__name__}; accepted: a model of transformers"
        )
    of_classes = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    held = [m for m in modules() if m.__name__ in of_classes and any(name in STEPS for name in vars(m))]
    with _lock:
        found = [(place, f) for place, f in places(held) if place.cell is None and place.name in OURS]
        if not found:
            raise ValueError(
                f"transformers.patch: the modules of {type(model).__name__} have none of the functions"
                f" {', '.join(OURS)}; accepted: a model with Mamba layers, of transformers 5.24"
            )
        for place, f in found:
            if not stands_for(f, OWNER):
                place.put(stand_in(_serving(place.name, f), f, OWNER))
    return sorted(str(place) for place, _ in found)


def unpatch() -> list[str]:
    """Put everything back that `patch` replaced. Returns the places."""
    with _lock:
        restored = [
            (place, stands_for(f, OWNER)) for place, f in places(modules()) if stands_for(f, OWNER)
        ]
        for place, (original,) in restored:
            place.put(original)
    return sorted(str(place) for place, _ in restored)


def _serving(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, as transformers calls it: with options of its other paths, and activations that are no part of ours."""
    ours = OURS[name]
    accepted = frozenset(inspect.signature(ours).parameters)

    @functools.wraps(original)
    def function(*args: Any, activation: str | None = None, **kwargs: Any) -> Any:
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
            raise ValueError(
                f"{name}: seq_idx or cu_seqlens is given; accepted: None, the mixers' scans take neither"
            )
        if (
            name in STEPS
            and torch.is_grad_enabled()
            and any(_learns(t) for t in (*args, *kwargs.values()))
        ):
            more = {} if activation is None else {"activation": activation}
            return original(*args, **more, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key in accepted}
        if activation in ("silu", "swish"):
            return ours(*args, activation=activation, **kwargs)
        y = ours(*args, **kwargs)
        return y if activation is None else ACT2FN[activation](y)

    return function


def _learns(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
