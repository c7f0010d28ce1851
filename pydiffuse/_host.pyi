from typing import Any

def guide(
    out: list[Any],
    preds: list[Any],
    x: Any,
    history: Any,
    noise: Any,
    rule: int,
    params: list[float],
    rescaled: bool,
    varied: Any,
    columns: list[int],
    emit: int,
) -> None: ...
def mix(out: list[Any], terms: list[Any], matrix: Any) -> None: ...
def gram(preds: list[Any]) -> tuple[Any, Any]: ...
def capability() -> str: ...
def threads() -> int: ...
def set_threads(n: int, /) -> None: ...
