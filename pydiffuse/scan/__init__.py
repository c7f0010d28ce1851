"""The selective scan of Mamba along any path over the tokens (ZigMa, arXiv 2403.13802).

Tokens stay where they are: step l of the scan reads and writes token path[l], and no permuted copy is
made. Every function raises ValueError or TypeError before touching memory if an argument does not fit.
The formulas stand in pydiffuse.reference.scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydiffuse._core import dispatch
from pydiffuse._core.checks import check_flag, check_shape, parameter_dtypes, written
from pydiffuse._core.functions import differentiable, may_learn, needs_function
from pydiffuse.conv import causal_conv1d
from pydiffuse.paths import ScanPath
from pydiffuse.paths.steps import PathLike, check_layout, steps_of, usual_order
from pydiffuse.scan import reference
from pydiffuse.scan.arguments import last_state, scan_arguments, update_arguments
from pydiffuse.scan.autograd import run_scan


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
    path: PathLike | Sequence[ScanPath] = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;  y_l = (<C_l, h_l> + D u_l) silu(z_l).

    With B = batch, D = channels, L = tokens, N = states (1 to 256), G = groups of channels:
      u, delta, z: [B, D, L], or [B, L, D] with layout="bld" (neither is copied); float32, bfloat16, float16.
      A: [D, N], float32. D, delta_bias: [D], float32.
      B, C: [B, N, L] or [B, G, N, L] ("bld": [B, L, N] or [B, L, G, N]), or [D, N] for every token.
      delta_softplus: softplus of delta + delta_bias; the identity above 20.
      path: a ScanPath or a permutation [L]: step l is at token path[l]. Everything is indexed by tokens,
        results too. reverse: from the last step to the first.
      initial_state: [B, D, N], float32; 0 by default.
      cu_seqlens: int offsets [S + 1], from 0 up to L, into the steps: the state starts anew at each, so
        that sequences of any lengths share a row. States are then [B, S, D, N]. (A tensor on a GPU
        is brought to the host to be checked; a tuple is not.)
    Several paths in one call: path is a list of K ScanPaths. The scans share u and z and their results add
    up. delta, A, D, delta_bias, B, C are shared, or have a dimension K: delta [B, K, D, L], A [K, D, N],
    D, delta_bias [K, D], B, C [B, K, N, L] or [B, K, G, N, L]; states are [B, (S,) K, D, N].

    Returns y like u; with return_last_state (y, state [B, D, N] float32). Differentiable once, in all
    tensors, the states too; saved for it are the inputs and a state per 64 steps. The same bits every run,
    whatever the threads and the neighbours in the batch.

    As mamba_ssm's selective_scan_fn where path is None.  Mamba, arXiv 2312.00752.
    """
    ops = dispatch.direct("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state)
    if ops and cu_seqlens is None and layout in ("bdl", "bld") and delta_softplus.__class__ is bool:
        usual, order = usual_order(path, reverse, u)
        y, last = None, None
        if usual:
            y, last = ops.selective_scan.new(
                u, delta, A, B, C, D, z, delta_bias, initial_state, order, delta_softplus, layout == "bdl",
                bool(return_last_state),
            )  # fmt: skip
        if y is not None:
            return y if last is None else (y, last)
    given = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    where: dict[str, Any] = {
        "path": path,
        "reverse": reverse,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
    }
    if dispatch.forced_reference() and isinstance(A, Tensor) and A.is_complex():
        check_layout("selective_scan", layout)
        check_shape("selective_scan", "u", u, (None, None, None), "(B, D, L) or (B, L, D)")
        L = u.shape[2 if layout == "bdl" else 1]
        steps_of("selective_scan", path, reverse, cu_seqlens, L, u.device)
        return reference.selective_scan(*given, return_last_state, **where, layout=layout)
    args, K = scan_arguments("selective_scan", *given, path, reverse, initial_state, cu_seqlens, layout)
    if dispatch.forced_reference():
        return reference.selective_scan(*given, return_last_state, **where, layout=layout)
    if needs_function(u, delta, A, B, C, D, z, delta_bias, initial_state):
        y, _, *states = differentiable("scan.SelectiveScan", "selective_scan", return_last_state, *args)
        last = states[0] if states else None
    else:
        y, last, _ = run_scan("selective_scan", args, with_last=return_last_state, with_chunks=False)
    y = y.transpose(1, 2) if layout == "bdl" else y
    return y if last is None else (y, last_state(last, K, cu_seqlens, reverse))


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
    """One step of `selective_scan`, for inference token by token; `state` becomes the new state.

    state: [B, D, N]. x, dt, z: [B, D]. A: [D, N], D, dt_bias: [D]. B, C: [B, N] or [B, G, N]. Mamba-2's heads
    stand before D: state [B, H, D, N], x, dt, z [B, H, D], A [H, D, N], D, dt_bias [H, D], and the groups of B
    and C are groups of heads. Any of them is float32, bfloat16 or float16; the arithmetic is in float32, and
    a low-precision state is rounded once. Returns y like x. Takes no part in autograd.

    As mamba_ssm's function of that name.
    """
    op = "selective_state_update"
    folded, *rest = update_arguments(op, state, x, dt, A, B, C, D, z, dt_bias)
    check_flag(op, "dt_softplus", dt_softplus)
    if dispatch.forced_reference():
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    tensors = [t for t in (state, x, dt, A, B, C, D, z, dt_bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"{op}: it takes no part in autograd, and an argument requires a gradient;"
            " call it under torch.no_grad()"
        )
    if torch._C._are_functorch_transforms_active() or may_learn():
        y, new = differentiable("scan.StateUpdate", folded.float().contiguous(), *rest, dt_softplus)
        state.copy_(new.view(state.shape))
        return y.view(x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    here = state.dtype is torch.float32 and state.is_contiguous()
    new = folded if here else folded.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if here:
        written([state])
    dispatch.ops_for(op, x).selective_state_update.default(out.flatten(1), new, *rest, dt_softplus)
    if not here:
        state.copy_(new.view_as(state))
    return out


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
    path: PathLike = None,
    reverse: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "bdl",
    ops: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Tensor:
    """Mamba's inner block in path order: convolution, projections, selective scan, output projection.

    The arguments of mamba_ssm's mamba_inner_fn, and a path. With R = dt_rank:
      xz: [B, 2 D, L], or [B, L, 2 D] with layout="bld". conv1d_weight: [D, W] or [D, 1, W]; conv1d_bias: [D].
      x_proj_weight: [R + 2 N, D] (R + N or R where B or C are given). delta_proj_weight: [D, R].
      out_proj_weight: [M, D], out_proj_bias: [M]; without them y [B, D, L] ("bld": [B, L, D]) is returned.
      A: [D, N]. B, C: as in `selective_scan`, instead of projections of x. B_proj_bias, C_proj_bias: [N].
      b_rms_weight, c_rms_weight: [N], dt_rms_weight: [D]: RMS norms of B, C and delta, as in Falcon Mamba.
      ops: what takes the places of causal_conv1d and selective_scan, as `pydiffuse.distributed`'s do.
    Returns [B, L, M]. The projections are torch's matrix products.
    """
    op = "zigzag_mamba_inner"
    check_layout(op, layout)
    bld = layout == "bld"
    check_shape(op, "xz", xz, (None, None, None), "(B, L, 2 D)" if bld else "(B, 2 D, L)")
    width = xz.shape[2 if bld else 1]
    D_ = width // 2
    if width % 2:
        raise ValueError(f"{op}: xz has {width} channels; accepted: an even number, x and then z")
    check_shape(op, "A", A, (D_, None), "(D, N)", like=xz, dtypes=parameter_dtypes(xz))
    N = A.shape[1]
    if isinstance(conv1d_weight, Tensor) and conv1d_weight.dim() == 3:
        check_shape(op, "conv1d_weight", conv1d_weight, (D_, 1, None), "(D, 1, W)", like=xz)
    else:
        check_shape(op, "conv1d_weight", conv1d_weight, (D_, None), "(D, W) or (D, 1, W)", like=xz)
    if conv1d_bias is not None:
        check_shape(op, "conv1d_bias", conv1d_bias, (D_,), "(D,)", like=xz)
    check_shape(op, "delta_proj_weight", delta_proj_weight, (D_, None), "(D, R)", like=xz)
    rank = delta_proj_weight.shape[1]
    rows = rank + N * ((B is None) + (C is None))
    check_shape(op, "x_proj_weight", x_proj_weight, (rows, D_), "(R + 2 N, D)", like=xz)
    for name, bias, given in (("B_proj_bias", B_proj_bias, B), ("C_proj_bias", C_proj_bias, C)):
        if bias is not None and given is not None:
            raise ValueError(
                f"{op}: {name} and {name[0]} are given; accepted: one, a bias is of the projection"
            )
        if bias is not None:
            check_shape(op, name, bias, (N,), "(N,)", like=xz)
    norms = (
        ("b_rms_weight", b_rms_weight, N, "(N,)", B),
        ("c_rms_weight", c_rms_weight, N, "(N,)", C),
        ("dt_rms_weight", dt_rms_weight, D_, "(D,)", None),
    )
    for name, weight, size, text, given in norms:
        if weight is not None:
            check_shape(op, name, weight, (size,), text, like=xz)
            if given is not None and given.dim() == 2:
                raise ValueError(
                    f"{op}: {name} is given with a constant {name[0].upper()}; accepted: one of them"
                )
    if out_proj_weight is not None:
        check_shape(op, "out_proj_weight", out_proj_weight, (None, D_), "(M, D)", like=xz)
    if out_proj_bias is not None:
        if out_proj_weight is None:
            raise ValueError(
                f"{op}: out_proj_bias is given without out_proj_weight; accepted: both or neither"
            )
        check_shape(op, "out_proj_bias", out_proj_bias, (out_proj_weight.shape[0],), "(M,)", like=xz)
    conv, scan = ops or (causal_conv1d, selective_scan)
    return reference.inner_block(
        conv, scan, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
        out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight,
        b_c_dt_rms_eps=b_c_dt_rms_eps, path=path, reverse=reverse, cu_seqlens=cu_seqlens, layout=layout,
    )  # fmt: skip
