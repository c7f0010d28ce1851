"""The definition of every scan op in plain PyTorch: same names, same signatures, any device.

Computed in float32, or in float64 for float64 inputs (the oracle of the tests), rounded once. A is
float32 or float64, or complex, which the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffuse.conv.reference import causal_conv1d
from pydiffuse.paths import ScanPath

Path = ScanPath | Tensor | Sequence[int] | None


def _up(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float64, torch.complex64, torch.complex128) else t.float()


def steps_of(path: Path, reverse: bool, L: int) -> list[int]:
    """The tokens in the order of the steps."""
    order = range(L) if path is None else path.order if isinstance(path, ScanPath) else path
    tokens = [int(token) for token in order]
    return tokens[::-1] if reverse else tokens


def starts_of(cu_seqlens: Any, reverse: bool, L: int) -> dict[int, int]:
    """Step at which a sequence's state is put in place -> the sequences (the last one counts)."""
    offsets = [0, L] if cu_seqlens is None else [int(o) for o in cu_seqlens]
    if reverse:
        return {L - offsets[s + 1]: s for s in range(len(offsets) - 1) if offsets[s] < offsets[s + 1]}
    return {offsets[s]: s for s in range(len(offsets) - 1) if offsets[s] < offsets[s + 1]}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    path: Path | Sequence[ScanPath] = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;  y_l = <C_l, h_l> + D u_l, times silu(z_l).

    Step l is at token path[l]. delta <- delta + delta_bias, then softplus if asked for. With several
    paths the results add up, token by token.  Mamba, arXiv 2312.00752, eq. 2 and section 3.3.2.
    """
    dtype = u.dtype
    if layout == "bdl":
        u, delta = u.transpose(-1, -2), delta.transpose(-1, -2)
        z = None if z is None else z.transpose(-1, -2)
        if A.is_complex():
            B, C = (_complex(t) for t in (B, C))
        B, C = (t if _constant(t) else t.transpose(-1, -2) for t in (B, C))
    many = isinstance(path, list | tuple) and isinstance(path[0], ScanPath)
    if layout == "bld":
        B, C = (t.transpose(-3, -2) if t.dim() == 4 + many else t for t in (B, C))
    paths: Sequence[Any] = path if many else [path]  # type: ignore[assignment]
    starts = starts_of(cu_seqlens, reverse, u.shape[1])
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and cu_seqlens is None:
        initial_state = initial_state.unsqueeze(1)

    def own(t: Any, k: int, dims: int, axis: int = 0) -> Any:
        """Path k's part of a parameter that has more than the `dims` it has when shared."""
        return t.select(axis, k) if many and t is not None and t.dim() > dims else t

    results = []
    for k, each in enumerate(paths):
        Bk, Ck = (_up(t if _constant(t) else own(t, k, 3, 1)) for t in (B, C))
        steps = steps_of(each, reverse, u.shape[1])
        initial = own(initial_state, k, 0, 2)
        dt, bias = _up(own(delta, k, 3, 1)), own(delta_bias, k, 1)
        Ak, Dk = own(A, k, 2), own(D, k, 1)
        results.append(
            _scan(_up(u), dt, Ak, Bk, Ck, Dk, bias, delta_softplus, steps, starts, initial, sequences)
        )
    y = sum(y for y, _ in results[1:]) + results[0][0]
    if z is not None:
        y = y * F.silu(_up(z))
    y = y.to(dtype)
    last = torch.stack([h for _, h in results], 2) if many else results[0][1]
    last = last if cu_seqlens is not None else last[:, 0]
    y = y.transpose(-1, -2) if layout == "bdl" else y
    return (y, last) if return_last_state else y


def _constant(t: Tensor) -> bool:
    """B or C is (D, N), the same for every token."""
    return t.dim() == 2


def _channels_last(t: Tensor) -> Tensor:
    """B or C of layout "bdl" as layout "bld" has it."""
    return t if _constant(t) else t.movedim(-1, 1)


def _complex(t: Tensor) -> Tensor:
    """Token-dependent B or C of a complex A, as mamba_ssm has it: real and imaginary parts in turn."""
    if t.is_complex() or _constant(t):
        return t
    return torch.view_as_complex(_up(t).unflatten(-1, (-1, 2)).contiguous())


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    steps: list[int],
    starts: dict[int, int],
    initial: Tensor | None,
    sequences: int,
) -> tuple[Tensor, Tensor]:
    """u, delta: [B, L, D]. A: [D, N]. B, C: [B, L, N], [B, G, L, N] or [D, N]. initial: [B, S, D, N].
    Returns y [B, L, D] and the last states [B, S, D, N]."""
    batch, L, channels = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if softplus:
        delta = F.softplus(delta)  # the identity above 20

    def at(t: Tensor, token: int) -> Tensor:  # [B or 1, D, N]
        if _constant(t):
            return t
        rows = t[:, None, token] if t.dim() == 3 else t[:, :, token]
        return rows.repeat_interleave(channels // rows.shape[1], 1)

    complex_ = A.is_complex()
    h = torch.zeros(batch, channels, A.shape[1], dtype=A.dtype if complex_ else u.dtype, device=u.device)
    last = [h if initial is None else initial[:, s].to(h.dtype) for s in range(sequences)]
    y: list[Tensor] = [h[..., 0]] * L
    current = 0
    for step, token in enumerate(steps):
        if step in starts:
            current = starts[step]
            h = last[current]
        dt = delta[:, token, :, None]
        h = torch.exp(dt * A) * h + dt * at(B, token) * u[:, token, :, None]
        last[current] = h
        product = (h * at(C, token)).sum(-1)
        y[token] = 2 * product.real if complex_ else product
    out = torch.stack(y, 1) if L else u.new_zeros(batch, 0, channels)
    return out if D is None else out + D * u, torch.stack(last, 1) if last else h[:, None][:, :0]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of `selective_scan`; `state` is overwritten by the new one. Heads are more channels."""

    def channels(t: Any, first: int) -> Any:
        """Heads and channels, from dimension `first`, as one."""
        return t if t is None or x.dim() == 2 else t.flatten(first, first + 1)

    def token(t: Any) -> Any:
        return None if t is None else t.unsqueeze(-1)

    u, delta, gate = (token(channels(t, 1)) for t in (x, dt, z))
    y, last = selective_scan(
        u, delta, channels(A, 0), token(B), token(C), channels(D, 0), gate, channels(dt_bias, 0), dt_softplus,
        True, initial_state=channels(state, 1),
    )  # fmt: skip
    state.copy_(last.view_as(state))
    return y.view_as(x)


def zigzag_mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    path: Path = None,
    reverse: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
    ops: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Tensor:
    """Mamba's inner block in path order: x, z = xz; x = silu(conv(x)); delta, B, C = projections of x;
    selective_scan; out_proj. Mamba, arXiv 2312.00752, figure 3; ZigMa, arXiv 2403.13802, section 3.2.
    The RMS norms of B, C and delta: Falcon Mamba, arXiv 2410.05355."""
    conv, scan = ops or (causal_conv1d, selective_scan)
    return inner_block(
        conv, scan, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
        out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight,
        b_c_dt_rms_eps=b_c_dt_rms_eps, path=path, reverse=reverse, cu_seqlens=cu_seqlens, layout=layout,
    )  # fmt: skip


def inner_block(
    conv: Callable[..., Any],
    scan: Callable[..., Any],
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    path: Path = None,
    reverse: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
) -> Tensor:
    """`zigzag_mamba_inner` out of a given convolution and scan: the public one takes the public ops."""
    xz = xz if layout == "bld" else xz.transpose(1, 2)
    x, z = xz.chunk(2, -1)
    weight = conv1d_weight.flatten(1)
    where: dict[str, Any] = {"path": path, "reverse": reverse, "cu_seqlens": cu_seqlens, "layout": "bld"}
    x = conv(x, weight, conv1d_bias, activation="silu", **where)
    rank, N = delta_proj_weight.shape[1], A.shape[-1]
    projected = F.linear(x, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if B is None:
        B = projected[..., rank : rank + N]
        B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)
    elif layout == "bdl":
        B = _channels_last(B)
    if C is None:
        C = projected[..., -N:]
        C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)
    elif layout == "bdl":
        C = _channels_last(C)
    if b_rms_weight is not None:
        B = _rms_norm(B, b_rms_weight, b_c_dt_rms_eps)
    if c_rms_weight is not None:
        C = _rms_norm(C, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus, **where)
    if out_proj_weight is not None:
        return F.linear(y, out_proj_weight, out_proj_bias)  # type: ignore[arg-type]
    return y if layout == "bld" else y.transpose(1, 2)  # type: ignore[union-attr]


def _rms_norm(t: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _up(t)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _up(weight)).to(t.dtype)
