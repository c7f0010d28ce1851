"""Tensors that outlive the call that made them: paths and plans keep theirs for every later call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def real_tensors() -> Iterator[None]:
    """What is made here belongs to no inference mode, fake mode, trace or transform of torch.func.
    Dynamo cannot trace it, and need not: what its graphs make is real."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield
