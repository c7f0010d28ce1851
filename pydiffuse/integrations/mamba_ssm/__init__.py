"""The functions of mamba_ssm and causal_conv1d by their names and signatures, on pydiffuse's kernels, CPU included.

    from pydiffuse.integrations.mamba_ssm import selective_scan_fn

or `patch()`, which puts them where code that was written for the two packages finds theirs.
"""

from pydiffuse.integrations.mamba_ssm.conv import causal_conv1d_fn, causal_conv1d_update
from pydiffuse.integrations.mamba_ssm.patching import patch, unpatch
from pydiffuse.integrations.mamba_ssm.scan import (
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
    selective_state_update,
)

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "patch",
    "selective_scan_fn",
    "selective_state_update",
    "unpatch",
]
