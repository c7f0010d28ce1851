"""causal_conv1d's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse._core.checks import check_shape
from pydiffuse.conv import causal_conv1d
from pydiffuse.integrations.mamba_ssm.states import check_indices, load, store, without_padding

INTEGERS = (torch.int32, torch.int64)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`pydiffuse.causal_conv1d` in the order of the tokens, in pieces or over packed sequences.

    x: [B, D, L], tokens or channels next to each other. weight: [D, W], W from 1 to 8. activation: None or "silu".
    initial_states: [B, D, W - 1], the inputs before the first. With return_final_states the last W - 1 inputs
    come as second result, which a next call takes as initial_states; in final_states_out if that is given.
    seq_idx: int [B, L], the sequence of each token, each in one piece; a negative one is padding, whose result is
    0. It excludes states; where the sequences begin is read on the host.
    Differentiable in x, weight, bias and initial_states, through the final states, too.
    """
    op = "causal_conv1d_fn"
    check_shape(op, "x", x, (None, None, None), "(B, D, L)")
    batch, channels, L = x.shape
    check_shape(op, "weight", weight, (channels, None), "(D, W)", like=x)
    taps = weight.shape[1] - 1
    if seq_idx is not None:
        for name, given in (
            ("initial_states", initial_states is not None),
            ("return_final_states", return_final_states),
        ):
            if given:
                raise ValueError(f"{op}: seq_idx and {name} are given; accepted: one of them")
        return _packed(op, x, weight, bias, seq_idx, activation)
    y = causal_conv1d(x, weight, bias, activation=activation)
    if initial_states is not None:
        check_shape(
            op, "initial_states", initial_states, (batch, channels, taps), "(B, D, W - 1)", like=x
        )
        initial_states = initial_states.to(x.dtype)
        begin = min(taps, L)  # what sees the states
        if begin:
            seen = torch.cat([initial_states, x[..., :begin]], 2)
            first = causal_conv1d(seen, weight, bias, activation=activation)[..., taps:]
            y = y.slice_scatter(first, 2, 0, begin)
    if not return_final_states:
        return y
    before = x.new_zeros(batch, channels, taps) if initial_states is None else initial_states
    last = torch.cat([before[..., min(L, taps) :], x[..., max(L - taps, 0) :]], 2)
    if final_states_out is None:
        return y, last.transpose(1, 2).contiguous().transpose(
            1, 2
        )  # channels next to each other, as theirs
    check_shape(op, "final_states_out", final_states_out, last.shape, "(B, D, W - 1)", like=x)
    return y, final_states_out.copy_(last)


def _packed(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None
) -> Tensor:
    """All rows as one, with an offset wherever a sequence begins."""
    batch, channels, L = x.shape
    check_shape(op, "seq_idx", seq_idx, (batch, L), "(B, L)", like=x, dtypes=INTEGERS)
    if not batch * L:
        return causal_conv1d(x, weight, bias, activation=activation)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    piece = begins.cumsum(1)
    for back in range(2, weight.shape[1]):
        again = (seq_idx[:, back:] == seq_idx[:, :-back]) & (piece[:, back:] != piece[:, :-back])
        if again.any():
            raise ValueError(f"{op}: seq_idx comes back to a sequence; accepted: each in one piece")
    starts = begins.flatten().nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([batch * L])]).int()
    rows = x.transpose(1, 2).reshape(1, batch * L, channels)
    y = causal_conv1d(rows, weight, bias, activation=activation, cu_seqlens=offsets, layout="bld")
    y = y.view(batch, L, channels).transpose(1, 2)
    return y.masked_fill((seq_idx < 0)[:, None], 0)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next steps of a convolution; `conv_state`, which holds the last inputs, takes these in.

    x: [B, D], or [B, D, L] for several steps. conv_state: [B, D, S], S >= W - 1; any strides. The newest input is
    at its end, or, where cache_seqlens: int [B] has how many came before, it is a ring: input n is at n % S.
    conv_state_indices: int [B]: row b goes on from conv_state[conv_state_indices[b]]; a negative one is padding,
    whose result is 0. Returns y like x. Takes no part in autograd, as causal_conv1d's.
    """
    op = "causal_conv1d_update"
    one = isinstance(x, Tensor) and x.dim() == 2
    check_shape(op, "x", x, (None, None) if one else (None, None, None), "(B, D) or (B, D, L)")
    steps = x[..., None] if one else x
    batch, channels, L = steps.shape
    check_shape(op, "weight", weight, (channels, None), "(D, W)", like=x)
    taps = weight.shape[1] - 1
    rows = batch if conv_state_indices is None else None
    check_shape(op, "conv_state", conv_state, (rows, channels, None), "(B, D, S)", like=x)
    length = conv_state.shape[2]
    if length < taps:
        raise ValueError(
            f"{op}: conv_state holds {length} inputs; accepted: {taps} or more, for weights of width {taps + 1}"
        )
    state = conv_state
    if conv_state_indices is not None:
        check_indices(op, "conv_state_indices", conv_state_indices, batch, x)
        state = load(conv_state, conv_state_indices)
    if cache_seqlens is None:
        seen = torch.cat([state.to(x.dtype), steps], 2)
        new, seen = seen[..., L:], seen[..., length - taps :]
    else:
        check_indices(op, "cache_seqlens", cache_seqlens, batch, x)
        at = cache_seqlens.long()[:, None] + torch.arange(-taps, L, device=x.device)
        at = (at % max(length, 1))[:, None].expand(-1, channels, -1)
        seen = torch.cat([state.gather(2, at[..., :taps]).to(x.dtype), steps], 2)
        kept = min(L, length)  # of more steps than the ring holds, the last
        new = state.scatter(2, at[..., taps + L - kept :], steps[..., L - kept :].to(state.dtype))
    y = causal_conv1d(seen, weight, bias, activation=activation)[..., taps:]
    if conv_state_indices is None:
        conv_state.copy_(new)
    else:
        store(conv_state, conv_state_indices, new)
        y = without_padding(y, conv_state_indices)
    return y[..., 0] if one else y
