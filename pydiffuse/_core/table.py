"""The table of public ops: tests, benchmarks and `backends()` go by it."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Op:
    """A row of the table of public ops."""

    name: str
    stem: str
    kernels: tuple[str, ...]
    """The ops of `SCHEMAS` it calls, forward and backward."""
    backends: tuple[str, ...] = BACKENDS


_RULE = ("guide", "guide_backward")
_LINEAR = ("gram", "mix")
_SCANS = ("selective_scan", "selective_scan_backward")
_CONVS = ("causal_conv1d", "causal_conv1d_backward")
_ATTENTIONS = ("tile_attention", "tile_attention_backward")
_MODULATIONS = ("modulate", "modulate_backward")
_TOKENS = ("gather_tokens", "scatter_tokens")
_NO_CUDA = ("reference", "cpu", "triton")  # on a GPU, Triton: bound by memory, it has nothing to gain
_COMPOSED = ("reference",)  # a few small operations of torch, the same on every device
_MIX_PATCHES = ("mix_patches",)
PUBLIC = {
    op.name: op
    for op in (
        *(
            Op(name, "guidance", _RULE)
            for name in ("cfg", "cfg_zero", "apg", "magnitude_aware", "perp_neg", "compose", "slerp")
        ),
        Op("tcfg", "guidance", _RULE + _LINEAR),
        Op("rescale", "guidance", _RULE),
        Op("guide", "guidance", _RULE + _LINEAR),
        Op("superpose", "guidance", _LINEAR),
        Op("gram", "guidance", _LINEAR),
        Op("combine", "guidance", _LINEAR),
        Op("selective_scan", "scan", _SCANS),
        Op("selective_state_update", "scan", ("selective_state_update",)),
        Op("zigzag_mamba_inner", "scan", _SCANS),
        Op("causal_conv1d", "conv", _CONVS),
        Op("tile_attention", "attention", _ATTENTIONS, _NO_CUDA),
        Op("modulate", "adaln", _MODULATIONS, _NO_CUDA),
        Op("gate_residual_modulate", "adaln", _MODULATIONS, _NO_CUDA),
        Op("embed_t", "adaln", (), _COMPOSED),
        Op("gather_tokens", "routing", _TOKENS, _NO_CUDA),
        Op("scatter_tokens", "routing", _TOKENS, _NO_CUDA),
        Op("routed_linear", "routing", _TOKENS, _NO_CUDA),
        Op("route", "routing", (), _COMPOSED),
        Op("channel_mask", "routing", (), _COMPOSED),
        Op("noise_patches", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("patch_step", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("convert", "patch", _MIX_PATCHES, _NO_CUDA),
        Op("patch_loss", "patch", ("patch_loss", "mix_patches"), _NO_CUDA),
        Op("select_patches", "patch", ("select_patches",), _NO_CUDA),
        Op("dual_loop_t", "patch", ("select_patches",), _NO_CUDA),
        Op("sample_t", "patch", (), _COMPOSED),
        Op("next_t", "patch", (), _COMPOSED),
    )
}
"""Every public op: where it lives, which kernels it calls, which backends it declares."""
