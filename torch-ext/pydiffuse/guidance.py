"""Guidance: per-sample linear combinations of predictions, decided by their inner products.

Predictions are [B, ...] of float32, bfloat16 or float16, alike in shape, dtype and device. Every scale is a
number or a (B,) tensor, and may require a gradient. `original` starts from the conditional prediction instead
of the unconditional one; `rescale` is the factor of arXiv 2305.08891.
"""

from __future__ import annotations

import torch

from ._ops import add_op_namespace_prefix, ops

CFG, TCFG, CFG_ZERO, APG, MAGNITUDE_AWARE, PERP_NEG = range(1, 7)  # csrc/guidance.h
_PLAIN = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # no sampler's update
_UPDATE = 1  # emit the guided prediction


@torch.library.register_fake(add_op_namespace_prefix("guide"))
def _(out, preds, x, history, noise, rule, params, rescaled, varied, columns, emit):
    return None


@torch.library.register_fake(add_op_namespace_prefix("guide_backward"))
def _(dpreds, dvaried, grad, preds, rule, params, rescaled, varied, columns):
    return None


def cfg(cond, uncond, scale, *, original=False, rescale=0.0):
    """Classifier-free guidance (arXiv 2207.12598): u + w (c - u). Returns [B, ...]."""
    return _guided(CFG, (cond, uncond), (scale,), original, rescale)


def tcfg(cond, uncond, scale, *, original=False, rescale=0.0):
    """TCFG (arXiv 2503.18137): u_f + w (c - u_f), u_f the part of u along the top right singular vector of
    [c; u], in closed form. Returns [B, ...]."""
    return _guided(TCFG, (cond, uncond), (scale,), original, rescale)


def cfg_zero(cond, uncond, scale, *, original=False, rescale=0.0):
    """CFG-Zero* (arXiv 2503.18886): u' + w (c - u'), u' = u <c,u> / (<u,u> + 1e-8). Returns [B, ...]."""
    return _guided(CFG_ZERO, (cond, uncond), (scale,), original, rescale)


def apg(cond, uncond, scale, *, eta=1.0, norm_threshold=0.0, original=False, rescale=0.0):
    """Adaptive projected guidance (arXiv 2410.02416): u + w (d_orth + eta d_par), d = c - u cut to the norm
    `norm_threshold` where that is positive, d_par its part along c. Returns [B, ...]."""
    return _guided(APG, (cond, uncond), (scale, eta, norm_threshold, 0.0), original, rescale)


def magnitude_aware(cond, uncond, scale, *, alpha=8.0, original=False, rescale=0.0):
    """Magnitude-aware guidance (MAMBO-G): w' = 1 + (w - 1) exp(-alpha ||c - u|| / ||u||). Returns [B, ...]."""
    return _guided(MAGNITUDE_AWARE, (cond, uncond), (scale, alpha), original, rescale)


def perp_neg(cond, uncond, negatives, scale, weights, *, original=False, rescale=0.0):
    """Perp-Neg (arXiv 2304.04968): u + w (e - sum_i v_i perp(n_i - u, e)), e = c - u. negatives: m tensors like
    cond; weights: v, m numbers or (B,) tensors. Returns [B, ...]."""
    if len(negatives) != len(weights):
        raise ValueError(
            f"perp_neg: {len(negatives)} negatives and {len(weights)} weights; accepted: as many"
        )
    return _guided(PERP_NEG, (cond, *negatives, uncond), (scale, *weights), original, rescale)


def _guided(rule, preds, values, original, rescale):
    like = preds[0]
    for p in preds:
        if p.shape != like.shape or p.dtype != like.dtype or p.device != like.device:
            raise ValueError(
                f"the predictions must be alike in shape, dtype and device; given {tuple(like.shape)}"
                f" {like.dtype} on {like.device} and {tuple(p.shape)} {p.dtype} on {p.device}"
            )
    given = (*_PLAIN, float(original), rescale, *values)
    columns = [i for i, value in enumerate(given) if isinstance(value, torch.Tensor)]
    varied = None
    if columns:
        varied = torch.stack([given[i].double().expand(like.shape[0]) for i in columns], 1)
    params = [0.0 if i in columns else float(value) for i, value in enumerate(given)]
    rescaled = len(_PLAIN) + 1 in columns or params[len(_PLAIN) + 1] != 0
    call = (rule, params, rescaled, columns)
    preds = [p.contiguous() for p in preds]
    due = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (varied, *preds))
    return _Guide.apply(call, varied, *preds) if due else _run(call, varied, preds)


def _run(call, varied, preds):
    out = torch.empty_like(preds[0])
    rule, params, rescaled, columns = call
    ops.guide([out], preds, None, None, None, rule, params, rescaled, varied, columns, _UPDATE)
    return out


class _Guide(torch.autograd.Function):
    @staticmethod
    def forward(call, varied, *preds):
        return _run(call, varied, preds)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        varied, *preds = ctx.saved_tensors
        rule, params, rescaled, columns = ctx.call
        dpreds = [torch.empty_like(p) for p in preds]
        dvaried = None if varied is None else torch.empty_like(varied)
        given = (grad.contiguous(), preds, rule, params, rescaled, varied, columns)
        ops.guide_backward(dpreds, dvaried, *given)
        return (None, dvaried, *dpreds)
