"""Tile attention in the transformers of diffusers (>= 0.42), with a plan from a context.

    from pydiffuse import plans
    from pydiffuse.integrations.diffusers import attention_plan

    with attention_plan(plans.frames(num_frames=21, tokens_per_frame=1560, references=4)):
        video = pipe(prompt)

The context is diffusers' active attention backend while it lasts. Attention between sequences of two
lengths (cross-attention to a prompt) goes to the backend that was active before; what the plan should
serve and cannot is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor

from pydiffuse._core.checks import describe
from pydiffuse.attention import tile_attention
from pydiffuse.plans import TilePlan

OP = "attention_plan"
BACKEND = "pydiffuse"
_registry: Any = attention_dispatch._AttentionBackendRegistry


class _Context:
    """The plans in force, and which of them comes next."""

    def __init__(self, plans: Sequence[TilePlan], before: Any) -> None:
        self.plans, self.before, self.calls = plans, before, 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        plan = self.plans[self.calls % len(self.plans)]
        lengths = query.shape[1], key.shape[1]
        if lengths != (plan.q_length, plan.k_length):
            if lengths[0] == lengths[1]:
                raise ValueError(
                    f"{OP}: a self-attention has {lengths[0]} tokens and the plan is {plan!r}; accepted: a plan"
                    " for this length"
                )
            with _active(self.before):
                return attention_dispatch.dispatch_attention_fn(query, key, value, **options)
        for name, off in (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False)):
            if options[name] is not off and options[name] != off:
                given = describe(options[name]) if isinstance(options[name], Tensor) else options[name]
                raise ValueError(
                    f"{OP}: {name} is {given}; accepted: {off}, what is seen is the plan's to say"
                )
        self.calls += 1
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = tile_attention(q, k, v, plan, scale=options["scale"])
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


_current: list[_Context] = []


@contextmanager
def _active(backend: Any) -> Iterator[None]:
    before = _registry._active_backend
    _registry.set_active_backend(backend)
    try:
        yield
    finally:
        _registry.set_active_backend(before)


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query, key, value: [B, S, H, D], as every attention backend of diffusers takes them."""
    options = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
        "enable_gqa": enable_gqa,
    }  # fmt: skip
    return _current[-1].attend(query, key, value, options)


@contextmanager
def attention_plan(plan: TilePlan | Sequence[TilePlan]) -> Iterator[None]:
    """Self-attentions of diffusers' models inside the `with` block compute the tiles of a plan.

    plan: for all of them, or a list with one for each layer, in the order in which the model calls them (the
    `.plans` of pydiffuse.plans.search); after the last one the model's next call begins. Models whose
    processors have a backend of their own (`set_attention_backend`) do not look at it: reset these first.
    Raises ValueError for a self-attention of another length, and for masks, dropout and causality.
    """
    chosen = [plan] if isinstance(plan, TilePlan) else list(plan) if isinstance(plan, Sequence) else []
    if not chosen or not all(isinstance(p, TilePlan) for p in chosen):
        raise TypeError(f"{OP}: plan is {describe(plan)}; accepted: a TilePlan or a list of them")
    if BACKEND not in _registry._backends:
        _registry.register(BACKEND)(_backend)
    _current.append(_Context(chosen, _registry._active_backend))
    try:
        with _active(BACKEND):
            yield
    finally:
        _current.pop()
