"""The schemas of the ops, by stem: a stem's kernels stand in csrc/cpu/<stem>.cpp, kernels/<stem>.py, ...

Every op writes into tensors its caller gives it and returns nothing.
"""

_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial, Tensor? order, Tensor? offsets, bool softplus"
)
_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? order, Tensor? offsets, bool silu"
_MODULATE = "Tensor x, Tensor? branch, Tensor table, Tensor rows, int norm, float eps, bool factors"
_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? scales, float scale, Tensor bounds, Tensor starts, Tensor spans,"
    " Tensor blocks, Tensor k_bounds, Tensor k_starts, Tensor k_spans, Tensor k_blocks, Tensor words,"
    " Tensor mask_at, Tensor? order"
)

BY_STEM = {
    "guidance": {
        "guide": "(Tensor(a!)[] out, Tensor[] preds, Tensor? x, Tensor? history, Tensor? noise, int rule,"
        " float[] params, bool rescaled, Tensor? varied, int[] columns, int emit) -> ()",
        "guide_backward": "(Tensor(a!)[] dpreds, Tensor(b!)? dvaried, Tensor grad, Tensor[] preds,"
        " int rule, float[] params, bool rescaled, Tensor? varied, int[] columns) -> ()",
        "mix": "(Tensor(a!)[] out, Tensor[] terms, Tensor matrix, Tensor? shift) -> ()",
        "gram": "(Tensor(a!) out, Tensor(b!)? sums, Tensor[] preds) -> ()",
    },
    "scan": {
        "selective_scan": f"(Tensor(a!) out, Tensor(b!)? last, Tensor(c!)? chunks, {_SCAN}) -> ()",
        "selective_scan_backward": "(Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, Tensor(d!) dB,"
        " Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial,"
        f" Tensor dout, Tensor? dlast, Tensor chunks, {_SCAN}) -> ()",
        "selective_state_update": "(Tensor(a!) out, Tensor(b!) state, Tensor x, Tensor dt, Tensor A,"
        " Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool softplus) -> ()",
    },
    "conv": {
        "causal_conv1d": f"(Tensor(a!) out, {_CONV}) -> ()",
        "causal_conv1d_backward": "(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, Tensor dout,"
        f" {_CONV}) -> ()",
    },
    "attention": {
        "tile_attention": f"(Tensor(a!) out, Tensor(b!)? lse, {_ATTENTION}) -> ()",
        "tile_attention_backward": "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor? dlse,"
        f" Tensor out, Tensor lse, {_ATTENTION}) -> ()",
    },
    "adaln": {
        "modulate": f"(Tensor(a!) y, Tensor(b!)? r, {_MODULATE}) -> ()",
        "modulate_backward": "(Tensor(a!) dx, Tensor(b!)? dbranch, Tensor(c!) dtable, Tensor dy,"
        f" Tensor? dr, {_MODULATE}) -> ()",
    },
    "routing": {
        "gather_tokens": "(Tensor(a!) out, Tensor x, Tensor ids, Tensor? gate) -> ()",
        "scatter_tokens": "(Tensor(a!) out, Tensor? base, Tensor? y, Tensor ids, Tensor? gate) -> ()",
    },
    "patch": {
        "mix_patches": "(Tensor(a!)[] out, Tensor(b!)? arrived, Tensor[] terms, Tensor t, Tensor? t_next,"
        " Tensor? t_last, Tensor? mask, Tensor? scales, SymInt[] grid, int[] rule, float scale, float eta,"
        " bool transposed) -> ()",
        "patch_loss": "(Tensor(a!) loss, Tensor(b!) errors, Tensor pred, Tensor target, Tensor? logvar,"
        " Tensor? weight, float nll, SymInt[] grid) -> ()",
        "select_patches": "(Tensor(a!)? ids, Tensor(b!)? rest, Tensor(c!)? mask, Tensor(d!)? levels,"
        " Tensor score, SymInt k, Tensor? t, Tensor? dts, float dt) -> ()",
    },
}

_GUIDE = "Tensor[] preds, Tensor? x, Tensor? history, Tensor? noise, Tensor numbers"
DIRECT = {
    "guide.rule": "(Tensor[] preds, Tensor numbers) -> Tensor?",
    "guide.new": f"({_GUIDE}) -> (Tensor?, Tensor?, Tensor?)",
    "guide.into": f"(Tensor(a!)[] out, {_GUIDE}) -> bool",
    "selective_scan.new": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? delta_bias, Tensor? initial, Tensor? order, bool softplus, bool bdl, bool with_last)"
    " -> (Tensor?, Tensor?)",
    "causal_conv1d.new": "(Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu, bool bdl)"
    " -> Tensor?",
    "tile_attention.new": "(Tensor q, Tensor k, Tensor v, float scale, Tensor plan, bool with_lse)"
    " -> (Tensor?, Tensor?)",
    "modulate.new": "(Tensor x, Tensor? branch, Tensor table, Tensor rows, int norm, float eps)"
    " -> (Tensor?, Tensor?)",
    "gather_tokens.new": "(Tensor x, Tensor ids) -> Tensor?",
    "scatter_tokens.new": "(Tensor base, Tensor y, Tensor ids) -> Tensor?",
    "mix_patches.new": "(Tensor x, Tensor? pred, Tensor? uncond, Tensor? noise, Tensor t, Tensor? t_next,"
    " Tensor? mask, Tensor numbers) -> (Tensor?, Tensor?, Tensor?)",
    "select_patches.new": "(Tensor score, int k, bool as_mask) -> (Tensor?, Tensor?)",
}
"""The usual call of a public function as one op of the compiled extension: it takes the user's tensors as they
are and allocates its results; numbers come as one float64 tensor (`structs.numbers`). Nothing comes back
where a call is unusual or wrong (`dispatch.direct`)."""

SCHEMAS = {name: schema for ops in BY_STEM.values() for name, schema in ops.items()}
STEMS = {name: stem for stem, ops in BY_STEM.items() for name in ops}
