"""What errors say of a value, with torch and without."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydiffuse._core.modes import is_tensor


def describe(value: Any) -> str:
    if is_tensor(value):
        return f"a {value.dtype} tensor {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """A scalar of NumPy as Python's own number."""
    return value.item() if isinstance(value, np.generic) else value


def check_flag(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {argument} is {value!r}; accepted: True or False")
