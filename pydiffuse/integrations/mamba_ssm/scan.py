"""mamba_ssm's functions around the selective scan."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse import scan
from pydiffuse.integrations.mamba_ssm.states import check_indices, load, store, without_padding


def selective_scan_fn(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """`pydiffuse.selective_scan` in the order of the tokens. The last state has a gradient, too."""
    return scan.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`pydiffuse.zigzag_mamba_inner` in the order of the tokens. The scan always recomputes its states in
    the backward, so `checkpoint_lvl` changes nothing."""
    bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return scan.zigzag_mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight=b_rms_weight,
        c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight, b_c_dt_rms_eps=b_c_dt_rms_eps,
    )  # fmt: skip


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """`mamba_inner_fn` up to its output projection, [B, D, L]: of the copies of mamba_ssm in Vim and ZigMa."""
    return scan.zigzag_mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, None, None,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


@torch.no_grad()
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
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`pydiffuse.selective_state_update`, and with state_batch_indices [B] the states of many sequences in one
    tensor: row b goes on from state[state_batch_indices[b]]. A negative index is padding, whose result is 0.

    Takes no part in autograd, as mamba_ssm's.
    """
    rest = (x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if state_batch_indices is None:
        return scan.selective_state_update(state, *rest)
    check_indices("selective_state_update", "state_batch_indices", state_batch_indices, len(x), state)
    rows = load(state, state_batch_indices)
    y = scan.selective_state_update(rows, *rest)
    store(state, state_batch_indices, rows)
    return without_padding(y, state_batch_indices)
