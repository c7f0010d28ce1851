"""mamba_ssm's functions by their names and signatures, on pydiffuse's kernels, CPU included.

    from pydiffuse.integrations.mamba_ssm import selective_scan_fn

or `patch()`, which puts them where mamba_ssm's modules look for theirs.
"""

from __future__ import annotations

import sys
from types import ModuleType

from torch import Tensor

from pydiffuse.scan import selective_scan, selective_state_update, zigzag_mamba_inner

__all__ = ["mamba_inner_fn", "patch", "selective_scan_fn", "selective_state_update"]


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
    """`pydiffuse.selective_scan` in the order of the tokens."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


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
    the backward, so `checkpoint_lvl` changes nothing; the norms of Falcon-Mamba are refused."""
    for name, weight in (("b", b_rms_weight), ("c", c_rms_weight), ("dt", dt_rms_weight)):
        if weight is not None:
            raise NotImplementedError(f"mamba_inner_fn: {name}_rms_weight is given; accepted: None")
    return zigzag_mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def patch() -> list[str]:
    """Replace selective_scan_fn and mamba_inner_fn in every mamba_ssm module that is loaded; returns what
    was replaced. (Not selective_state_update: mamba_ssm's takes heads and low-precision states, too.)

    Import the mamba_ssm modules first. ImportError if none is loaded.
    """
    ours = {f.__name__: f for f in (selective_scan_fn, mamba_inner_fn)}
    modules: dict[str, ModuleType] = {
        name: module
        for name, module in sys.modules.items()
        if name == "mamba_ssm" or name.startswith("mamba_ssm.")
    }
    if not modules:
        raise ImportError(
            "pydiffuse.integrations.mamba_ssm.patch: mamba_ssm is not loaded; import it first"
        )
    replaced = []
    for name, module in modules.items():
        for function in ours:
            if hasattr(module, function):
                setattr(module, function, ours[function])
                replaced.append(f"{name}.{function}")
    return replaced
