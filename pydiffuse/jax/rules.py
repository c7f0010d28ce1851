"""What guidance is made of: Gram matrices, linear combinations and rules, with their gradients.

A guided prediction is g = sum_i c_i(G, s) p_i, so with y its gradient
    dp_i = c_i y + sum_j dG_ij p_j + ds_i,   dG and ds from dc_i = <y, p_i>:
one more Gram pass and one more combination, both in `guide_backward`. `gram` and `mix` are each other's
derivatives and differentiate to any order; `guide` once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pydiffuse._core.rules import COMMON, EMIT_PREDICT, EMIT_STATE, EMIT_UPDATE, RULES, UPDATE
from pydiffuse.jax.arrays import like, no_second, wide
from pydiffuse.jax.calls import Like, alike
from pydiffuse.jax.calls import call as call_handler

call = partial(call_handler, vmap="broadcast_all")
A, B, H, S, P, Q = range(len(UPDATE))
MOMENTUM = len(UPDATE) + len(COMMON) + RULES["apg"].parameters.index("momentum")


class Rule(NamedTuple):
    """What a call to `guide` is made of, beside its arrays."""

    op: str  # the public name, for messages
    rule: int
    params: tuple[float, ...]
    rescaled: bool
    columns: tuple[int, ...]  # parameters that vary over the batch, as the columns of `varied`
    emit: int
    donate: bool = False  # x' takes x's memory


def gram(*preds: Array) -> tuple[Array, Array]:
    """G [B, k, k] and the sums [B, k] of at most 17 arrays [B, ...]; float64 where JAX has it."""
    return _gram(*alike(*preds))


def mix(outs: int, matrix: Array, shift: Array | None, *terms: Array) -> tuple[Array, ...]:
    """shift_j + sum_m matrix_jm t_m, of the dtype of the first term. matrix [B, J, M], shift [B, J]; J = outs."""
    return _mix(outs, *alike(matrix, shift, *terms))


def guide(rule: Rule, varied: Array | None, x: Any, history: Any, noise: Any, *preds: Array) -> Any:
    """The outputs that `rule.emit` names. varied: [B, columns]."""
    return _guide(rule, *alike(varied, x, history, noise, *preds))


@jax.custom_vjp
def _gram(*preds: Array) -> tuple[Array, Array]:
    first, k = preds[0], len(preds)
    shapes = (first.shape[0], k, k), (first.shape[0], k)
    G, sums = call("gram", [Like(s, wide()) for s in shapes], preds, k=k, inner=first.ndim - 1)
    return G, sums


def _gram_forward(*preds: Array) -> Any:
    return _gram(*preds), preds


def _gram_backward(preds: tuple[Array, ...], grads: Any) -> Any:
    dG, dsums = grads
    dpreds = mix(len(preds), dG + dG.mT, dsums, *preds)
    return tuple(d.astype(p.dtype) for d, p in zip(dpreds, preds, strict=True))


_gram.defvjp(_gram_forward, _gram_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(outs: int, matrix: Array, shift: Array | None, *terms: Array) -> tuple[Array, ...]:
    first = terms[0]
    arrays = (*terms, matrix) if shift is None else (*terms, matrix, shift)
    return tuple(call("mix", [like(first)] * outs, arrays, k=len(terms), inner=first.ndim - 1))


def _mix_forward(outs: int, matrix: Array, shift: Array | None, *terms: Array) -> Any:
    return _mix(outs, matrix, shift, *terms), (matrix, shift, terms)


def _mix_backward(outs: int, saved: Any, grads: tuple[Array, ...]) -> Any:
    matrix, shift, terms = saved
    dterms = mix(len(terms), matrix.mT, None, *grads)
    dterms = tuple(d.astype(t.dtype) for d, t in zip(dterms, terms, strict=True))
    rows = []  # a gradient at a time: all of them with all terms may be more than a call takes
    sums = []
    for grad in grads:
        G, s = gram(grad, *terms)
        rows.append(G[:, 0, 1:])
        sums.append(s[:, 0])
    dmatrix = jnp.stack(rows, 1).astype(matrix.dtype)
    dshift = None if shift is None else jnp.stack(sums, 1).astype(shift.dtype)
    return dmatrix, dshift, *dterms


_mix.defvjp(_mix_forward, _mix_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guide(
    rule: Rule,
    varied: Array | None,
    x: Array | None,
    history: Array | None,
    noise: Array | None,
    *preds: Array,
) -> tuple[Array, ...]:
    first = preds[0]
    update = like(first if x is None else x)
    results = [update] * (rule.emit & ~EMIT_STATE).bit_count() + [like(first)] * bool(
        rule.emit & EMIT_STATE
    )
    extras = [t for t in (x, history, noise) if t is not None]
    has = sum(1 << i for i, t in enumerate((x, history, noise)) if t is not None)
    aliases = {len(preds): 0} if rule.donate else None
    arrays = (*preds, *extras, *([] if varied is None else [varied]))
    return tuple(call("guide", results, arrays, aliases, has=has, emit=rule.emit, **_shared(rule, preds)))


def _shared(rule: Rule, preds: tuple[Array, ...]) -> dict[str, Any]:
    return {
        "k": len(preds),
        "inner": preds[0].ndim - 1,
        "rule": rule.rule,
        "rescaled": int(rule.rescaled),
        "params": rule.params,
        "columns": rule.columns,
    }


def _guide_forward(rule: Rule, varied: Any, x: Any, history: Any, noise: Any, *preds: Array) -> Any:
    results = _guide(rule, varied, x, history, noise, *preds)
    dtypes = [None if t is None else Like((), t.dtype) for t in (x, history, noise)]
    learnt = any(i < len(UPDATE) for i in rule.columns)  # a coefficient of the update
    extras = (x, history, noise) if learnt else None
    return results, (varied, extras, dtypes, preds)


def _guide_backward(rule: Rule, saved: Any, grads: tuple[Array, ...]) -> Any:
    varied, extras, dtypes, preds = saved
    given = iter(grads)
    update = next(given) if rule.emit & EMIT_UPDATE else None
    predict = next(given) if rule.emit & EMIT_PREDICT else None
    state = next(given) if rule.emit & EMIT_STATE else None

    def times(i: int, y: Array | None) -> Any:
        """Parameter i times a gradient."""
        if y is None or i not in rule.columns:
            return None if y is None else y if rule.params[i] == 1 else rule.params[i] * y
        column = varied[:, rule.columns.index(i)]
        return column.astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1)) * y

    y = _plus(times(B, update), times(Q, predict))
    slopes: list[Any] = [_plus(times(A, update), times(P, predict)), times(H, update), times(S, update)]
    dextras = [None if t is None else d.astype(t.dtype) for d, t in zip(slopes, dtypes, strict=True)]
    found = guide_backward(rule, varied, y, *preds)
    dpreds = list(found[: len(preds)])
    dvaried = found[-1] if rule.columns else None
    if state is not None:  # c - u + momentum state: APG's own output
        for i, d in enumerate((state, -state, times(MOMENTUM, state))[: len(preds)]):
            dpreds[i] = dpreds[i] + d
        if MOMENTUM in rule.columns and len(preds) == 3:
            dvaried = _added(rule, dvaried, MOMENTUM, gram(state, preds[2])[0][:, 0, 1])
    if extras is not None:
        dvaried = _of_update(rule, varied, extras, preds, (update, predict), dvaried)
    return dvaried, *dextras, *dpreds


def _of_update(rule: Rule, varied: Any, extras: Any, preds: Any, grads: Any, dvaried: Any) -> Any:
    """The gradients of a, b, h, s, p and q: inner products of what they multiply with the outputs' gradients."""
    x, history, noise = extras
    update, predict = grads
    g = partial(guide, rule._replace(params=(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, *rule.params[6:]), emit=EMIT_UPDATE,
                columns=tuple(i for i in rule.columns if i >= len(UPDATE)), donate=False))  # fmt: skip
    kept = [n for n, i in enumerate(rule.columns) if i >= len(UPDATE)]
    terms = ((A, x, update), (B, None, update), (H, history, update), (S, noise, update), (P, x, predict),
             (Q, None, predict))  # fmt: skip
    for i, term, y in terms:
        if i not in rule.columns or y is None:
            continue
        if i in (B, Q):
            (term,) = g(varied[:, jnp.array(kept)] if kept else None, None, None, None, *preds)
        if term is not None:
            dvaried = _added(rule, dvaried, i, gram(y, term)[0][:, 0, 1])
    return dvaried


def _added(rule: Rule, dvaried: Any, parameter: int, of_sample: Array) -> Array:
    return dvaried.at[:, rule.columns.index(parameter)].add(of_sample.astype(dvaried.dtype))


def _plus(*terms: Array | None) -> Any:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


_guide.defvjp(_guide_forward, _guide_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def guide_backward(rule: Rule, varied: Array | None, grad: Array, *preds: Array) -> tuple[Array, ...]:
    """(gradients of the predictions, of varied where there is one) from that of the rule's value."""
    results = [like(p) for p in preds] + ([] if varied is None else [like(varied)])
    arrays = (*preds, grad, *([] if varied is None else [varied]))
    return tuple(call("guide_backward", results, arrays, **_shared(rule, preds)))


guide_backward.defvjp(
    partial(no_second, more=", or write it with gram and combine"), lambda rule, saved, grads: ()
)
