"""From the arguments of a public scan function to one op call.

The ops know one order of dimensions, tokens before channels: `bdl` tensors arrive as transposed views,
and every path runs forward: `reverse` has turned the order, the sequences and their states around.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydiffuse._core.checks import check_flag, check_shape, describe, parameter_dtypes
from pydiffuse._core.layouts import dense
from pydiffuse._core.structs import MAX_STATES, ScanArguments
from pydiffuse.paths.steps import check_layout, steps_of


def scan_arguments(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    path: Any,
    reverse: bool,
    initial: Tensor | None,
    cu_seqlens: Any,
    layout: str,
) -> tuple[ScanArguments, int | None]:
    """Checked, and in the ops' order of dimensions; and the number of paths if a list was given."""
    check_layout(op, layout)
    check_flag(op, "delta_softplus", softplus)
    bdl = layout == "bdl"
    names = "(B, D, L)" if bdl else "(B, L, D)"
    check_shape(op, "u", u, (None, None, None), names)
    batch, channels, L = u.shape if bdl else (u.shape[0], u.shape[2], u.shape[1])
    steps, K = steps_of(op, path, reverse, cu_seqlens, L, u.device)
    paths = K or 1
    each = names.replace("B, ", "B, K, ")
    inner = (channels, L) if bdl else (L, channels)

    def tokens(t: Tensor) -> Tensor:
        return dense(t.transpose(-1, -2) if bdl else t)

    shared = isinstance(delta, Tensor) and delta.dim() == 3
    wanted = (batch, *inner) if K is None or shared else (batch, paths, *inner)
    check_shape(op, "delta", delta, wanted, names if K is None else f"{names} or {each}", like=u)
    if z is not None:
        check_shape(op, "z", z, (batch, *inner), names, like=u)
    delta = tokens(delta)
    delta = delta[:, None].expand(-1, paths, -1, -1) if shared else delta

    def parameter(name: str, t: Tensor | None, *sizes: int | None) -> Tensor | None:
        if t is None:
            return None
        one = isinstance(t, Tensor) and t.dim() == len(sizes)
        text = "(D, N)" if len(sizes) == 2 else "(D,)"
        text = text if K is None else f"{text} or {text.replace('(', '(K, ')}"
        expected = sizes if K is None or one else (paths, *sizes)
        check_shape(op, name, t, expected, text, like=u, dtypes=parameter_dtypes(u))
        return _float(t.expand(paths, *t.shape) if one else t).contiguous()

    if isinstance(A, Tensor) and A.is_complex():
        raise TypeError(
            f"{op}: A is {describe(A)}; accepted: float32; a complex A runs inside"
            ' `with pydiffuse.use_backend("reference")`'
        )
    A = parameter("A", A, channels, None)  # type: ignore[assignment]
    N = A.shape[-1]
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{op}: A has {N} states; accepted: 1 to {MAX_STATES}")

    def weights(name: str, t: Tensor) -> Tensor:
        if isinstance(t, Tensor) and t.dim() == 2:
            check_shape(op, name, t, (channels, N), "(D, N)", like=u)
            return t.float().expand(paths, channels, N).contiguous()
        last = "N, L" if bdl else "L, N"
        order = (N, L) if bdl else (L, N)
        dims = t.dim() if isinstance(t, Tensor) else 3
        sizes: tuple[int | None, ...]
        if K is None:
            text = f"(B, {last}), {'(B, G, N, L)' if bdl else '(B, L, G, N)'} or (D, N)"
            sizes = (
                (batch, *order) if dims == 3 else (batch, None, *order) if bdl else (batch, L, None, N)
            )
        else:
            text = f"(B, {last}), (B, K, {last}), (B, K, {'G, N, L' if bdl else 'L, G, N'}) or (D, N)"
            sizes = (batch, paths, None, *order) if bdl else (batch, paths, L, None, N)
            sizes = (batch, paths, *order) if dims == 4 else sizes
        check_shape(op, name, t, (batch, *order) if dims == 3 else sizes, text, like=u)
        if K is None or dims == 3:
            t = t[:, None].expand(-1, paths, *t.shape[1:])
        if t.dim() == 4:
            return t.transpose(-1, -2).unsqueeze(2) if bdl else t.unsqueeze(2)
        return t.transpose(-1, -2) if bdl else t.transpose(2, 3)

    B, C = weights("B", B), weights("C", C)
    groups = [t.shape[2] for t in (B, C) if t.dim() == 5]
    if groups and groups[0] != groups[-1]:
        raise ValueError(f"{op}: B has {B.shape[2]} groups and C has {C.shape[2]}; they must be equal")
    if groups and (groups[0] == 0 or channels % groups[0]):
        raise ValueError(
            f"{op}: B and C have {groups[0]} groups and there are {channels} channels;"
            " the groups must divide the channels"
        )
    if initial is not None:
        one, several = cu_seqlens is None, K is not None
        sizes = (batch, *(() if one else (steps.sequences,)), *((paths,) if several else ()), channels, N)
        text = f"(B, {'' if one else 'S, '}{'K, ' if several else ''}D, N)"
        check_shape(op, "initial_state", initial, sizes, text, like=u, dtypes=parameter_dtypes(u))
        initial = _float(initial).reshape(batch, steps.sequences, paths, channels, N)
        initial = (initial.flip(1) if reverse and not one else initial).contiguous()
    return ScanArguments(
        dense(u.transpose(1, 2) if bdl else u),
        delta,
        A,
        B,
        C,
        parameter("D", D, channels),
        None if z is None else tokens(z),
        parameter("delta_bias", delta_bias, channels),
        initial,
        steps.order,
        steps.offsets,
        softplus,
    ), K


def _float(t: Tensor) -> Tensor:
    """float32, or what the reference takes as it is."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def last_state(last: Tensor, K: int | None, cu_seqlens: Any, reverse: bool) -> Tensor:
    """[B, S, K, D, N] with the dimensions that the caller has."""
    last = last.flip(1) if reverse and cu_seqlens is not None else last
    last = last if K is not None else last[:, :, 0]
    return last if cu_seqlens is not None else last[:, 0]


def update_arguments(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Any, ...]:
    """state, x, dt, A, B, C, D, z and dt_bias of one step, checked: heads are folded into channels, B and C have
    groups, parameters are float32, and everything but the state is contiguous."""
    heads = isinstance(x, Tensor) and x.dim() == 3
    names = "H, D" if heads else "D"
    check_shape(op, "x", x, (None, None, None) if heads else (None, None), f"(B, {names})")
    batch, *channels = x.shape
    check_shape(op, "A", A, (*channels, None), f"({names}, N)", like=x)
    N = A.shape[-1]
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{op}: A has {N} states; accepted: 1 to {MAX_STATES}")
    check_shape(op, "state", state, (batch, *channels, N), f"(B, {names}, N)", like=x)
    for name, t in (("dt", dt), ("z", z)):
        if t is not None:
            check_shape(op, name, t, x.shape, f"(B, {names})", like=x)
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            check_shape(op, name, t, channels, f"({names})" if heads else "(D,)", like=x)
    for name, t in (("B", B), ("C", C)):
        grouped = isinstance(t, Tensor) and t.dim() == 3
        sizes = (batch, None, N) if grouped else (batch, N)
        check_shape(op, name, t, sizes, "(B, N) or (B, G, N)", like=x)
        if grouped and (t.shape[1] == 0 or channels[0] % t.shape[1]):
            raise ValueError(
                f"{op}: {name} has {t.shape[1]} groups; they must divide the {channels[0]}"
                f" {'heads' if heads else 'channels'}"
            )
    if B.dim() != C.dim() or (B.dim() == 3 and B.shape[1] != C.shape[1]):
        raise ValueError(
            f"{op}: B is {tuple(B.shape)} and C is {tuple(C.shape)}; they must have the same groups"
        )

    def row(t: Tensor | None) -> Tensor | None:  # [B, D]
        return None if t is None else t.flatten(1).contiguous()

    def parameter(t: Tensor | None) -> Tensor | None:  # [D]
        return None if t is None else t.float().flatten()

    groups = [(t if t.dim() == 3 else t[:, None]).contiguous() for t in (B, C)]
    A = A.float().reshape(-1, N).contiguous()
    return state.flatten(1, -2), row(x), row(dt), A, *groups, parameter(D), row(z), parameter(dt_bias)
