"""Token and channel routing: parts of the input that take another way through a network.

    ids = pydiffuse.route(B, N, keep=0.5)                 # which tokens go through the middle blocks
    y = middle(pydiffuse.gather_tokens(x, ids))           # half the tokens
    x = pydiffuse.scatter_tokens(x, y, ids)               # the others come back as they left (TREAD)

In Sparse Guidance the same model runs with two values of `keep`, and guidance goes from the weaker
prediction to the stronger one.

Tokens are [B, N, D...] of float32, bfloat16 or float16. ids are unique within a sample; gradients rely
on it. Each function raises ValueError or TypeError before touching memory if an argument does not fit;
on a GPU the values of ids are not looked at beforehand (that would be a sync): ids out of range are
pulled to the ends. The formulas stand in pydiffuse.reference.routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from pydiffuse._core import dispatch
from pydiffuse._core.checks import (
    check_no_grad,
    check_outs,
    describe,
    is_integer,
    narrowed,
    plain,
    values_hidden,
    widest,
)
from pydiffuse._core.functions import differentiable, needs_function
from pydiffuse.routing import reference
from pydiffuse.routing.arguments import (
    check_apart,
    check_ids,
    check_linear,
    check_tokens,
    gate_of,
    group_sizes,
    grouping,
)
from pydiffuse.routing.autograd import Gather, Scatter, run_scatter


def route(
    B: int,
    N: int,
    keep: int | float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens take the way: for each of B samples a uniformly random subset of N tokens.

    keep: how many, an int of 0 to N, or the fraction of them, a float of 0.0 to 1.0 (rounded to the
    nearest count). generator: a torch.Generator of `device`. Returns ids (B, keep) int64, sorted,
    unique.
    """
    B, N, keep = map(plain, (B, N, keep))
    for name, value in (("B", B), ("N", N)):
        if not is_integer(value) or value < 0:
            raise ValueError(f"route: {name} is {value!r}; accepted: an integer, 0 or more")
    count = is_integer(keep) and 0 <= keep <= N
    if not count and not (isinstance(keep, float) and 0.0 <= keep <= 1.0):
        raise ValueError(
            f"route: keep is {keep!r}; accepted: a count of 0 to {N}, or a fraction, a float of 0.0 to 1.0"
        )
    return reference.route(B, N, keep, generator=generator, device=device)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x[b, ids[b, j]]: the tokens that take the way.

    x: [B, N, D...]. ids: (B, keep) int32 or int64, unique within a sample, in any order. Returns
    [B, keep, D...]. Differentiable to any order, without atomics.
    """
    ops = dispatch.direct("gather_tokens", x, ids)
    if ops:
        tokens = ops.gather_tokens.new(x, ids)
        if tokens is not None:
            return tokens
    check_tokens("gather_tokens", "x", x)
    check_ids("gather_tokens", ids, x)
    if dispatch.forced_reference():
        return reference.gather_tokens(x, ids)
    flat = x.reshape(*x.shape[:2], x.shape[2:].numel())
    gather = partial(differentiable, "routing.Gather") if needs_function(flat) else Gather.forward
    (out,) = gather("gather_tokens", flat, narrowed(ids, x.shape[1]), None)
    return out.view(*ids.shape, *x.shape[2:])


def scatter_tokens(
    base: Tensor,
    y: Tensor,
    ids: Tensor,
    gate: float | Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """base with token ids[b, j] replaced by y[b, j]: the tokens come back among the others.

    With a gate by (1 - gate) base + gate y, so that 0 leaves the token as it was and 1 replaces it.

    base: [B, N, D...]. y: [B, keep, D...]. ids: (B, keep) int32 or int64, unique within a sample, in any
    order. gate: a number, or a float tensor that broadcasts to (B, keep). out: a tensor like base to
    write to; base itself leaves its other tokens untouched and halves the work. It takes no part in
    autograd. Under autocast base and y of two dtypes are taken in the wider one; elsewhere they must
    be alike. Returns [B, N, D...].
    """
    op = "scatter_tokens"
    ops = dispatch.direct(op, base, y, ids)
    if ops and gate is None and out is None:
        tokens = ops.scatter_tokens.new(base, y, ids)
        if tokens is not None:
            return tokens
    base, y = widest(base, y)
    check_tokens(op, "base", base)
    check_ids(op, ids, base)
    check_tokens(op, "y", y, like=base, count=ids.shape[1])
    g = gate_of(op, gate, ids)
    if out is not None:
        check_outs(op, [out], [base], [base])
        check_apart(op, out, y)
        check_no_grad(op, [t for t in (base, y, g) if t is not None], [out])
    if dispatch.forced_reference():
        return reference.scatter_tokens(base, y, ids, gate, out=out)
    shape, ids = base.shape, narrowed(ids, base.shape[1])
    base, y = (t.reshape(*t.shape[:2], shape[2:].numel()) for t in (base, y))
    if out is None:
        learns = needs_function(base, y, g)
        scatter = partial(differentiable, "routing.Scatter") if learns else Scatter.forward
        return scatter(op, shape[1], base, y, ids, g)[0].view(shape)
    target = out.view(base.shape) if out.is_contiguous() else torch.empty_like(base.contiguous())
    run_scatter(op, target, base, y, ids, g)
    return out if out.is_contiguous() else out.copy_(target.view(shape))


def channel_mask(
    level: float | Tensor, channels: int, *, beta: float = 0.8, alpha: float = 4.0
) -> Tensor:
    """Denoising task routing (arXiv 2310.07138): which channels a noise level may use.

    A window of floor(beta C) channels slides from the first, at level 0, to the last, at level 1, by
    level^alpha: neighbouring levels share most channels, and with alpha > 1 noisy levels have more
    that are theirs. Multiply a block's input by it, and let the other channels pass the block by.

    level: a number or tensor in [0, 1], 1 the noisiest: i / (T - 1) for step i of T. channels: C.
    beta: the share of channels in the window, in (0, 1]. alpha: > 0. Returns bool [..., C].
    """
    level, channels, beta, alpha = map(plain, (level, channels, beta, alpha))
    if not is_integer(channels) or channels < 1:
        raise ValueError(f"channel_mask: channels is {channels!r}; accepted: an integer, 1 or more")
    if not (isinstance(level, int | float) and not isinstance(level, bool)) and not (
        isinstance(level, Tensor) and level.is_floating_point()
    ):
        raise TypeError(
            f"channel_mask: level is {describe(level)}; accepted: a number or float tensor in [0, 1]"
        )
    if not isinstance(beta, int | float) or not 0 < beta <= 1:
        raise ValueError(f"channel_mask: beta is {beta!r}; accepted: a number in (0, 1]")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"channel_mask: alpha is {alpha!r}; accepted: a number > 0")
    if not isinstance(level, Tensor) or not (values_hidden(level) or not level.numel()):
        low, high = level.aminmax() if isinstance(level, Tensor) else (level, level)
        if not (low >= 0 and high <= 1):
            found = float(low if not low >= 0 else high)
            raise ValueError(f"channel_mask: level holds {found}; accepted: 0 to 1, 1 the noisiest")
    return reference.channel_mask(level, channels, beta=beta, alpha=alpha)


def routed_linear(
    x: Tensor,
    weights: Tensor,
    modality: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """A linear layer whose weight depends on the token: weights[m] x + bias[m], m = modality[b, n].

    Mixture-of-Mamba (arXiv 2501.16295) has such projections for text, image and speech tokens in one
    sequence. Tokens are grouped by modality, each group is one matrix product (torch's), and the
    results go back to their places: no token meets a weight that is not its own.

    x: [B, N, Din]. weights: [M, Dout, Din]. modality: (B, N) int32 or int64, 0 to M - 1. bias: [M, Dout].
    sizes: how many tokens each modality has, M ints, where they are known. Without it they are read
    from `modality`, which on a GPU is a host sync; graph capture and torch.compile need it. Returns
    [B, N, Dout].
    """
    check_linear(x, weights, modality, bias, sizes)
    if dispatch.forced_reference():
        return reference.routed_linear(x, weights, modality, bias, sizes=sizes)
    B, N, M = *x.shape[:2], weights.shape[0]
    groups = group_sizes(modality, M, sizes)
    order = grouping(modality, groups)
    op, learns = "routed_linear", needs_function(x, weights, bias)
    gather, scatter = (
        (partial(differentiable, "routing.Gather"), partial(differentiable, "routing.Scatter"))
        if learns
        else (Gather.forward, Scatter.forward)
    )
    grouped = gather(op, x.reshape(1, B * N, x.shape[2]), order, None)[0][0]
    if learns or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        parts = [
            linear(part, weights[m], None if bias is None else bias[m])
            for m, part in enumerate(grouped.split(groups))
        ]
        results = torch.cat(parts)
    else:  # each product straight to where it would be concatenated
        results = x.new_empty(B * N, weights.shape[1])
        for m, (part, to) in enumerate(zip(grouped.split(groups), results.split(groups), strict=True)):
            if bias is None:
                torch.mm(part, weights[m].t(), out=to)
            else:
                torch.addmm(bias[m], part, weights[m].t(), out=to)
    (out,) = scatter(op, B * N, None, results[None], order, None)
    return out.view(B, N, weights.shape[1])
