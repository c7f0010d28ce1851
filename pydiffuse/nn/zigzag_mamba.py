"""ZigMa's Mamba block, with the path inside its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiffuse._core.structs import MAX_STATES, MAX_WIDTH
from pydiffuse._core.words import plain
from pydiffuse.paths import ScanPath
from pydiffuse.paths.steps import PathLike, path_of
from pydiffuse.scan import zigzag_mamba_inner


class ZigzagMamba(nn.Module):
    """A Mamba block that scans its tokens along a path (ZigMa, arXiv 2403.13802, section 3.2).

    In place of ZigMa's block and of mamba_ssm's Mamba, whose parameters it has by name and shape: state
    dicts go either way. x [B, L, d_model] -> [B, L, d_model].

    d_model, d_state, d_conv, expand, dt_rank ("auto": ceil(d_model / 16)), dt_min, dt_max, dt_init,
    dt_scale, dt_init_floor, conv_bias, bias: as in mamba_ssm. path: this layer's ScanPath, such as
    `zigzag_layers((32, 32), depth)[i]`; None for the order of the tokens; `forward` takes another one for a
    call. bidirectional: a second convolution and scan, with parameters of their own (conv1d_b, x_proj_b,
    dt_proj_b, A_b_log, D_b, as in Vim), runs along the reversed path; both go through one out_proj, averaged
    if `average`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        *,
        path: ScanPath | None = None,
        bidirectional: bool = False,
        average: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model, d_state, d_conv, expand = map(plain, (d_model, d_state, d_conv, expand))
        for name, value, most in (
            ("d_model", d_model, None), ("d_state", d_state, MAX_STATES), ("d_conv", d_conv, MAX_WIDTH),
            ("expand", expand, None),
        ):  # fmt: skip
            if not isinstance(value, int) or value < 1 or (most is not None and value > most):
                accepted = "1, 2, ..." if most is None else f"1 to {most}"
                raise ValueError(f"ZigzagMamba: {name} is {value!r}; accepted: {accepted}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"ZigzagMamba: dt_init is {dt_init!r}; accepted: 'random' or 'constant'")
        if path is not None and not isinstance(path, ScanPath):
            raise TypeError(f"ZigzagMamba: path is a {type(path).__name__}; accepted: a ScanPath or None")
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.path, self.average = path, average
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.directions = ("", "_b") if bidirectional else ("",)
        for suffix in self.directions:
            self._add_direction(
                suffix, conv_bias, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, factory
            )

    def _add_direction(
        self,
        suffix: str,
        conv_bias: bool,
        dt_min: float,
        dt_max: float,
        dt_init: str,
        dt_scale: float,
        dt_init_floor: float,
        factory: dict[str, Any],
    ) -> None:
        D, N, rank = self.d_inner, self.d_state, self.dt_rank
        conv = nn.Conv1d(D, D, self.d_conv, groups=D, padding=self.d_conv - 1, bias=conv_bias, **factory)
        x_proj = nn.Linear(D, rank + 2 * N, bias=False, **factory)
        dt_proj = nn.Linear(rank, D, bias=True, **factory)
        # delta starts between dt_min and dt_max, log-uniformly: dt_proj's bias is softplus^-1 of it.
        spread = rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "constant":
                dt_proj.weight.fill_(spread)
            else:
                dt_proj.weight.uniform_(-spread, spread)
            low, high = math.log(dt_min), math.log(dt_max)
            dt = torch.exp(torch.rand(D, **factory) * (high - low) + low).clamp(min=dt_init_floor)
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        states = torch.arange(1, N + 1, dtype=torch.float32, device=factory["device"])
        A_log = nn.Parameter(torch.log(states).repeat(D, 1))  # float32 whatever the dtype
        skip = nn.Parameter(torch.ones(D, device=factory["device"]))
        for parameter in (A_log, skip):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.add_module("conv1d" + suffix, conv)
        self.add_module("x_proj" + suffix, x_proj)
        self.add_module("dt_proj" + suffix, dt_proj)
        self.register_parameter("A_log" if not suffix else "A_b_log", A_log)
        self.register_parameter("D" + suffix, skip)

    inner = staticmethod(zigzag_mamba_inner)
    """What runs between the projections; `pydiffuse.distributed.split_tokens` puts another function in its place."""

    def forward(
        self,
        x: Tensor,
        path: PathLike = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """x: [B, L, d_model]. path: instead of the layer's own. cu_seqlens: as in `selective_scan`."""
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"ZigzagMamba: x is {tuple(x.shape)}; accepted: (B, L, {self.d_model})")
        path = self.path if path is None else path
        if path is not None:
            path = path_of("ZigzagMamba", path, x.shape[1])
        xz = self.in_proj(x)
        scans = [self._scan(xz, path, suffix, cu_seqlens) for suffix in self.directions]
        y = scans[0] + scans[1] if len(scans) == 2 else scans[0]
        y = y / len(self.directions) if self.average else y
        return F.linear(y, self.out_proj.weight, self.out_proj.bias)  # type: ignore[arg-type]

    def _scan(self, xz: Tensor, path: PathLike, suffix: str, cu_seqlens: Any) -> Tensor:
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log = getattr(self, "A_log" if not suffix else "A_b_log")
        return self.inner(
            xz,
            conv.weight,
            conv.bias,
            x_proj.weight,
            dt_proj.weight,
            None,
            None,
            -torch.exp(A_log.float()),
            D=getattr(self, "D" + suffix).float(),
            delta_bias=dt_proj.bias.float(),
            path=path,
            reverse=bool(suffix),
            cu_seqlens=cu_seqlens,
            layout="bld",
        )

    def extra_repr(self) -> str:
        return f"path={self.path!r}, bidirectional={len(self.directions) == 2}"
