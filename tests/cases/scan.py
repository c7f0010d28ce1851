"""The cases of the selective scan and of what is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydiffuse.paths import ScanPath, from_order
from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # Products of float32 decays: a few roundings of 6e-8 per step that is remembered.
    torch.float32: Tolerance(2e-6, 1e-5),
    # The output's rounding, 2^-9 relative in the mean, and in gradients that of dy and y, too.
    torch.bfloat16: Tolerance(5e-3, 1e-2),
    torch.float16: Tolerance(1e-3, 2e-3),
}


class Size(NamedTuple):
    """batch, channels (a multiple of 3), tokens, states"""

    B: int
    D: int
    L: int
    N: int


SIZES = {
    "odd": Size(2, 21, 37, 5),  # no multiple of any vector, tile or chunk
    "chunks": Size(3, 36, 131, 16),  # three chunks of steps, the last one ragged
    "states": Size(1, 21, 9, 64),  # more states than fit into registers at once
    "one_state": Size(2, 6, 70, 1),
    "empty": Size(0, 6, 8, 4),
    "hollow": Size(2, 6, 0, 4),  # no tokens: the state stays as it was
}


@dataclass
class ScanMaker(Draws):
    size: Size
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: str = "bdl"
    seed: int = 0

    def _to(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return t.to(dtype or self.dtype).to(self.device)

    def tokens(self, *paths: int) -> Tensor:
        """(B, [K,] D, L), or (B, [K,] L, D)."""
        B, D, L, _ = self.size
        t = self._randn(B, *paths, D, L)
        return self._to(t if self.layout == "bdl" else t.transpose(-1, -2).contiguous())

    def delta(self, *paths: int) -> Tensor:
        t = self.tokens(*paths)
        return 0.5 * t.abs() + 0.01

    def weights(self, *leading: int) -> Tensor:
        """B or C: (B, [K,] [G,] N, L), or (B, [K,] L, [G,] N)."""
        B, _, L, N = self.size
        t = self._randn(B, *leading, N, L)
        return self._to(
            t if self.layout == "bdl" else t.movedim(-1, 1 + max(len(leading) - 1, 0)).contiguous()
        )

    def weights_of_paths(self, K: int, *groups: int) -> Tensor:
        B, _, L, N = self.size
        t = self._randn(B, K, *groups, N, L)
        return self._to(t if self.layout == "bdl" else t.movedim(-1, 2).contiguous())

    def constant(self) -> Tensor:
        return self._to(self._randn(self.size.D, self.size.N), torch.float32)

    def A(self, *paths: int) -> Tensor:
        return -self._to(self._randn(*paths, self.size.D, self.size.N).exp(), torch.float32)

    def channels(self, *paths: int) -> Tensor:
        return self._to(self._randn(*paths, self.size.D), torch.float32)

    def state(self, *leading: int) -> Tensor:
        B, D, _, N = self.size
        return self._to(self._randn(B, *leading, D, N), torch.float32)

    def matrix(self, *shape: int) -> Tensor:
        return self._to(self._randn(*shape) / max(shape[-1], 1) ** 0.5)

    def path(self, seed: int = 0) -> ScanPath | None:
        order = torch.randperm(self.size.L, generator=torch.Generator().manual_seed(seed))
        return from_order(order) if self.size.L else None

    def paths(self) -> list[ScanPath] | None:
        path = self.path(1)
        return [path, path.reversed()] if path else None

    def sequences(self) -> tuple[int, ...]:
        """Offsets of five sequences, one of them empty, one of a single step."""
        L = self.size.L
        return (0, L // 3, L // 3, L // 3 + (L > 0), L // 2, L) if L else (0, 0, 0, 0, 0, 0)


def scan(t: ScanMaker, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with everything that a Mamba layer has."""
    args = (
        t.tokens(), t.delta(), t.A(), t.weights(), t.weights(), t.channels(), t.tokens(), t.channels(), True,
    )  # fmt: skip
    return args, {"layout": t.layout, **options}


def inner(t: ScanMaker, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    D, N, rank = t.size.D, t.size.N, 3
    B, _, L, _ = t.size
    xz = t._randn(B, 2 * D, L) if t.layout == "bdl" else t._randn(B, L, 2 * D)
    given = "B" in options
    args = (
        t._to(xz), t.matrix(D, 1, 4), t.matrix(D), t.matrix(rank + (1 if given else 2) * N, D), t.matrix(D, rank),
        t.matrix(7, D), t.matrix(7), t.A(),
    )  # fmt: skip
    return args, {"D": t.channels(), "delta_bias": t.channels(), "layout": t.layout, **options}


def bare(t: ScanMaker, *more: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (t.tokens(), t.delta(), t.A(), *more), {"layout": t.layout, **options}


OP = "selective_scan"
CASES = [
    Case(OP, "plain", lambda t: bare(t, t.weights(), t.weights())),
    Case(OP, "mamba", lambda t: scan(t, path=t.path())),
    Case(
        OP,
        "groups",
        lambda t: bare(t, t.weights(3), t.weights(3), t.channels(), path=t.path(), reverse=True),
    ),
    Case(OP, "constants", lambda t: bare(t, t.constant(), t.constant(), None, t.tokens())),
    Case(OP, "constant_c", lambda t: bare(t, t.weights(), t.constant(), path=t.path())),
    Case(
        OP,
        "constant_b",
        lambda t: bare(
            t,
            t.constant(),
            t.weights(3),
            delta_bias=t.channels().abs(),
            return_last_state=True,
        ),
    ),
    Case(
        OP,
        "states",
        lambda t: scan(t, initial_state=t.state(), return_last_state=True, reverse=True),
    ),
    Case(
        OP,
        "sequences",
        lambda t: scan(
            t,
            path=t.path(),
            reverse=True,
            cu_seqlens=t.sequences(),
            initial_state=t.state(5),
            return_last_state=True,
        ),
    ),
    Case(
        OP,
        "paths",
        lambda t: (
            (
                t.tokens(),
                t.delta(2),
                t.A(2),
                t.weights_of_paths(2, 3),
                t.weights_of_paths(2, 3),
                t.channels(2),
                t.tokens(),
                t.channels(2),
                True,
                True,
            ),
            {"layout": t.layout, "path": [t.path(1), t.path(2)], "initial_state": t.state(2)},
        ),
    ),
    Case(
        OP,
        "both_ways",
        lambda t: scan(t, path=t.paths(), cu_seqlens=t.sequences()),
    ),
    Case("zigzag_mamba_inner", "mamba", lambda t: inner(t, path=t.path())),
    Case(
        "zigzag_mamba_inner",
        "given_b",
        lambda t: inner(
            t,
            B=t.weights(),
            C_proj_bias=t.matrix(t.size.N),
            reverse=True,
            cu_seqlens=t.sequences(),
        ),
    ),
]


def one_step(t: ScanMaker, *groups: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    B, D, _, N = t.size
    row = [t._to(t._randn(B, D)) for _ in range(3)]
    weights = [t._to(t._randn(B, *groups, N)) for _ in range(2)]
    return (t.state(), row[0], row[1], t.A(), *weights, t.channels(), row[2], t.channels(), True), {}


def low_step(t: ScanMaker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As a model in low precision has it: the state, D and dt_bias, too."""
    args, kwargs = one_step(t)
    return tuple(a if i in (3, 9) else t._to(a) for i, a in enumerate(args)), kwargs


def heads_step(t: ScanMaker) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Mamba-2's: three heads in three groups; A, dt, D and dt_bias are shared within a head, and not copied."""
    args, kwargs = one_step(t, 3)
    state, x, dt, A, B, C, D, z, bias, softplus = args
    x, z = (r.unflatten(1, (3, -1)) for r in (x, z))
    dt, D, bias = (
        r.unflatten(-1, (3, -1))[..., :1].expand(*r.shape[:-1], *x.shape[1:]) for r in (dt, D, bias)
    )
    A = A.unflatten(0, (3, -1))[:, :1, :1].expand(*x.shape[1:], A.shape[-1])
    return (state.unflatten(1, (3, -1)), x, dt, A, B, C, D, z, bias, softplus), kwargs


STEPS = [
    Case("selective_state_update", "mamba", one_step),
    Case("selective_state_update", "groups", lambda t: one_step(t, 3)),
    Case("selective_state_update", "low", low_step),
    Case("selective_state_update", "heads", heads_step),
]
