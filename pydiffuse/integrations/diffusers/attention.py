"""Tile attention in the transformers of diffusers (>= 0.42), with a plan from a context.

    from pydiffuse import plans
    from pydiffuse.integrations.diffusers import attention_plan

    with attention_plan(plans.frames(num_frames=21, tokens_per_frame=1560, references=4)):
        video = pipe(prompt)

The plan is in force for the thread or the asynchronous task that entered the context, and for what these
start with their context (`asyncio.to_thread`). While any context is open, diffusers' dispatcher and
torch's scaled_dot_product_attention, which older models call, look here first. A checkpoint takes the plan
along to where it recomputes. torch.compile breaks its graph at attention under a plan.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.utils import checkpoint

from pydiffuse._core.checks import describe
from pydiffuse.attention import tile_attention
from pydiffuse.integrations.diffusers.layers import Attention, Layers, current_attention
from pydiffuse.integrations.hooks import Hooks
from pydiffuse.integrations.masks import Masks
from pydiffuse.plans import TilePlan

OP = "attention_plan"
BACKEND = "pydiffuse"
_registry: Any = attention_dispatch._AttentionBackendRegistry


class _Context:
    """The plans in force, and what they served."""

    def __init__(self, plans: Sequence[TilePlan], by_layer: bool) -> None:
        self.plans = list(plans)
        self.layers = Layers(len(plans)) if by_layer else None
        self.served: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.masks = Masks()
        self.lock = threading.Lock()
        self.outer = _current.get()
        self.reached = False

    def reach(self) -> None:
        context: _Context | None = self
        while context is not None:
            context.reached, context = True, context.outer

    def plan_of(self, attention: Attention, queries: int, keys: int, dispatched: bool) -> TilePlan | None:
        """None for what no plan is for: cross-attention, and what stands beside the transformer's layers."""
        layer = attention.layer
        cross = attention.is_cross(queries, keys)
        if cross or not any((p.q_length, p.k_length) == (queries, keys) for p in self.plans):
            if not cross and queries == keys and (dispatched or layer in self.served):
                given = self.plans[0] if len(self.plans) == 1 else f"one of {self.plans}"
                raise ValueError(
                    f"{OP}: a self-attention has {queries} tokens and the plan is {given!r}; accepted: a plan"
                    " for this length"
                )
            if self.layers is not None and layer is not None:
                model = self.layers.model(attention)
                model.others.add(model.role[layer])
            return None
        if layer is not None:
            self.served.add(layer)
        if self.layers is None:
            return self.plans[0]
        try:
            plan = self.plans[self.layers.number(attention)]
        except ValueError as error:
            raise ValueError(f"{OP}: {error}") from None
        if (plan.q_length, plan.k_length) != (queries, keys):
            raise ValueError(
                f"{OP}: a self-attention has {queries} tokens and its layer's plan is {plan!r}; accepted: a"
                " plan for this length"
            )
        return plan

    def attend(
        self,
        attention: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        dispatched: bool,
    ) -> Tensor | None:
        """q, k, v: [B, H, S, D]. None where the plan has no say."""
        try:
            with self.lock:
                plan = self.plan_of(attention, q.shape[2], k.shape[2], dispatched)
            if plan is None:
                return None
            for name, off in (("dropout_p", 0.0), ("is_causal", False)):
                if options[name] != off:
                    raise ValueError(
                        f"{OP}: {name} is {options[name]}; accepted: {off}, what is seen is the plan's to say"
                    )
            each = self.masks.plans(OP, plan, options["attn_mask"], q.shape[0])
            if isinstance(each, TilePlan):
                out = tile_attention(q, k, v, each, scale=options["scale"])
            else:
                samples = zip(q.split(1), k.split(1), v.split(1), each, strict=True)
                out = torch.cat([tile_attention(*s, scale=options["scale"]) for s in samples])  # type: ignore[misc]
        except Exception:
            self.reach()  # what is refused has been looked at
            raise
        self.reach()
        assert isinstance(out, Tensor)
        return out

    def check_served(self) -> None:
        if not self.reached:
            raise RuntimeError(
                f"{OP}: no attention was served: none had the plan's length and came to diffusers' dispatcher"
                " or to torch's scaled_dot_product_attention; accepted: a plan for the model's self-attentions;"
                " reset backends of their own that processors have (`set_attention_backend`)"
            )
        many = None if self.layers is None else self.layers.missing()
        if many is not None:
            raise RuntimeError(
                f"{OP}: the model has {many} self-attentions and there are {len(self.plans)} plans; accepted: a"
                " plan for each layer"
            )


_current: ContextVar[_Context | None] = ContextVar(OP, default=None)


@contextmanager
def _in_force(context: _Context | None) -> Iterator[None]:
    token = _current.set(context)
    try:
        yield
    finally:
        with suppress(ValueError):  # closed from another task, which never saw it
            _current.reset(token)


def _active_backend(registry: Any) -> Any:
    """Dynamo traces it; what it must not look into is behind it."""
    return BACKEND, _backend


@torch.compiler.disable
def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """query, key, value: [B, S, H, D], as every attention backend of diffusers takes them."""
    options: dict[str, Any] = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
        "enable_gqa": enable_gqa,
    }  # fmt: skip
    context = _current.get()
    if context is not None:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = context.attend(current_attention(), q, k, v, options, dispatched=True)
        if out is not None:
            return out.transpose(1, 2)
    name, function = _hooks.original(_registry, "get_active_backend").__func__(_registry)
    options["_parallel_config"] = _parallel_config
    with _in_force(None):
        if isinstance(name, attention_dispatch.AttentionBackendName):
            options["parallel_config"] = options.pop("_parallel_config")
            return attention_dispatch.dispatch_attention_fn(query, key, value, **options, backend=name)
        known = _registry._supported_arg_names[name]
        return function(query, key, value, **{k: v for k, v in options.items() if k in known})  # type: ignore[no-any-return]


@torch.compiler.disable
def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """For models whose processors call torch's themselves. Only layers of diffusers' transformers: not the
    autoencoders and text encoders that a pipeline calls, too."""
    options = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale,
        "enable_gqa": enable_gqa,
    }  # fmt: skip
    context = _current.get()
    if context is not None and query.dim() == key.dim() == 4:
        attention = current_attention()
        within = [type(m).__module__ for m in attention.modules]
        ours = any(name.startswith("diffusers.") for name in within)
        if ours and not any(name.startswith("diffusers.models.autoencoders") for name in within):
            out = context.attend(attention, query, key, value, options, dispatched=False)
            if out is not None:
                return out
    original = _hooks.original(F, "scaled_dot_product_attention")
    return original(query, key, value, **options)  # type: ignore[no-any-return]


def _carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the plan that is in force now, wherever and whenever it is called."""
    context = _current.get()
    if context is None:
        return function

    def carried(*args: Any, **kwargs: Any) -> Any:
        with _hooks, _in_force(context):
            return function(*args, **kwargs)

    return carried


class _Recomputed:
    """In the place of torch.utils.checkpoint.CheckpointFunction, which reentrant checkpoints apply."""

    @staticmethod
    def apply(function: Callable[..., Any], *args: Any) -> Any:
        return _hooks.original(checkpoint, "CheckpointFunction").apply(_carried(function), *args)


def _recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of what other checkpoints are made by; `function` is what they recompute with."""
    original = _hooks.original(checkpoint, "_checkpoint_without_reentrant_generator")
    return original(_carried(function), *args, **kwargs)


_hooks = Hooks(
    [
        (_registry, "get_active_backend", classmethod(_active_backend)),
        (F, "scaled_dot_product_attention", _scaled_dot_product_attention),
        (checkpoint, "CheckpointFunction", _Recomputed),
        (checkpoint, "_checkpoint_without_reentrant_generator", _recomputed),
    ]
)
_registry.register(BACKEND)(_backend)


@contextmanager
def attention_plan(plan: TilePlan | Sequence[TilePlan]) -> Iterator[None]:
    """Self-attentions of diffusers' models inside the `with` block compute the tiles of a plan.

    plan: for all of them, or a list with one for each layer, in the order in which the model calls them (the
    `.plans` of pydiffuse.plans.search). A layer keeps its plan where the model stops early, skips blocks or
    recomputes them. Joint attention of a prompt and an image counts as self-attention, of both together;
    cross-attention, and in models that call torch's scaled_dot_product_attention attention of other lengths,
    stay as they are. Of contexts within each other the inner one counts.

    A mask may leave out keys of a sample (prompts of several lengths). Raises ValueError for other masks,
    dropout and causality, for self-attention of another length, and where a layer's plan cannot be told;
    RuntimeError at the end where no attention was served, or there are fewer layers than plans.
    """
    by_layer = not isinstance(plan, TilePlan)
    chosen = [plan] if isinstance(plan, TilePlan) else list(plan) if isinstance(plan, Sequence) else []
    if not chosen or not all(isinstance(p, TilePlan) for p in chosen):
        raise TypeError(f"{OP}: plan is {describe(plan)}; accepted: a TilePlan or a list of them")
    context = _Context(chosen, by_layer)
    with _hooks, _in_force(context):
        yield
    context.check_served()
