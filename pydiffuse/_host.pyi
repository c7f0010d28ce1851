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
def mix_patches(
    op: str,
    out: list[Any],
    arrived: Any,
    terms: list[Any],
    t: Any,
    t_next: Any,
    last: Any,
    mask: Any,
    scales: Any,
    grid: list[int],
    rule: tuple[int, ...],
    scale: float,
    eta: float,
) -> None: ...
def select_patches(
    op: str, ids: Any, rest: Any, mask: Any, levels: Any, score: Any, k: int, t: Any, dt: Any
) -> None: ...
def modulate(
    y: Any, r: Any, x: Any, branch: Any, table: Any, row: Any, norm: int, eps: float, factors: bool
) -> None: ...
def causal_conv1d(
    out: Any, x: Any, weight: Any, bias: Any, order: Any, offsets: Any, silu: bool
) -> None: ...
def selective_scan(
    out: Any,
    last: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    initial: Any,
    order: Any,
    offsets: Any,
    softplus: bool,
) -> None: ...
def tile_attention(
    out: Any, lse: Any, q: Any, k: Any, v: Any, scales: Any, scale: float, packed: Any
) -> None: ...
def gather_tokens(out: Any, x: Any, ids: Any) -> None: ...
def scatter_tokens(out: Any, base: Any, y: Any, ids: Any, gate: Any) -> None: ...
def scan_floor(states: int, channel_tokens: int) -> None: ...
def attention_floor(dim: int, products: int, exponentials: int, pairs: int, bf16: bool) -> None: ...
def capability() -> str: ...
def threads() -> int: ...
def set_threads(n: int, /) -> None: ...
