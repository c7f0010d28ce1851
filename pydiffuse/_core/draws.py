"""Random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def drawn(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None,
    **options: Any,
) -> Tensor:
    """torch.rand or torch.randn. Sizes may be symbols of a traced graph where no generator is named."""
    if generator is None:
        return draw(tuple(shape), device=device, **options)
    return draw(tuple(shape), generator=generator, device=device, **options)
