"""Models whose tokens are split over the ranks of a group."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from pydiffuse.distributed.attention import tile_attention
from pydiffuse.distributed.comm import Group
from pydiffuse.distributed.scan import zigzag_mamba_inner
from pydiffuse.distributed.tokens import reorder
from pydiffuse.nn import TileAttention, ZigzagMamba

Model = TypeVar("Model", bound=nn.Module)


def split_tokens(
    model: Model, lengths: Sequence[int], *, group: Group = None, method: str = "auto"
) -> Model:
    """Makes the ZigzagMamba and TileAttention layers of a model take this rank's tokens, [B, lengths[r], dim],
    in place; every other layer that works token by token is what it was.

    lengths: the tokens of each rank, such as `split(plan, ranks)`. A ZigzagMamba's tokens go into its path's order
    and back, two all-to-alls of x. method: as in `tile_attention`. Parameters keep their names, and are the same
    on every rank; their gradients add up to those of one process (`sum_gradients`).
    """
    for layer in model.modules():
        if isinstance(layer, TileAttention):
            layer.attend = functools.partial(  # type: ignore[method-assign]
                tile_attention, lengths=tuple(lengths), group=group, method=method
            )
        elif isinstance(layer, ZigzagMamba):
            layer.inner = functools.partial(zigzag_mamba_inner, group=group)  # type: ignore[method-assign]
            path, layer.path = layer.path, None
            layer.register_forward_pre_hook(functools.partial(_forth, path, lengths, group))
            layer.register_forward_hook(functools.partial(_back, path, lengths, group))
    return model


def _forth(
    path: Any, lengths: Any, group: Group, layer: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    if any(a is not None for a in args[1:]):
        raise ValueError(
            "ZigzagMamba: path or cu_seqlens is given; accepted over ranks: the layer's own path"
        )
    return (reorder(args[0], None, path, lengths, group=group),)


def _back(path: Any, lengths: Any, group: Group, layer: nn.Module, args: Any, y: Any) -> Any:
    return reorder(y, path, None, lengths, group=group)
