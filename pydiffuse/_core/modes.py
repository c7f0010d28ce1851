"""Tensors that outlive the call that made them: paths and plans keep theirs for every later call.

Paths and plans work without torch: they are arrays, of which tensors are made where torch is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def torch_is_there() -> bool:
    """Whether this process has imported torch."""
    return "torch" in sys.modules


def is_tensor(value: Any) -> bool:
    if not torch_is_there():
        return False
    import torch

    return isinstance(value, torch.Tensor)


def compiling() -> bool:
    """Whether Dynamo traces this."""
    if not torch_is_there():
        return False
    import torch

    return torch.compiler.is_dynamo_compiling()


@contextmanager
def real_tensors() -> Iterator[None]:
    """What is made here belongs to no inference mode, fake mode, trace or transform of torch.func.
    Dynamo cannot trace it, and need not: what its graphs make is real."""
    import torch
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch.inference_mode(False), temporarily_clear_interpreter_stack(), _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
