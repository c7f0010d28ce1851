"""Functions on JAX arrays: values and gradients against float64, under the transforms, without copies."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import pydiffuse
from tests.cases import adaln, attention, conv, guidance, patch, routing, scan
from tests.helpers import doubled, leaves, relative_error, values_and_gradients

jax = pytest.importorskip("jax", reason="jax is not installed (extra: jax)")
pytest.importorskip("pydiffuse._jax", reason="pydiffuse was built without jax")
jnp = jax.numpy
ROOT = Path(__file__).parent.parent
import pydiffuse.jax as pj  # noqa: E402
from pydiffuse import _jax, paths, plans  # noqa: E402

ATTENTION = {"odd": (2, 4, 2, 24), "equal": (1, 3, 3, 64), "empty": (0, 2, 1, 8)}
FAMILIES = {
    "guidance": (guidance, guidance.Maker, guidance.SHAPES),
    "scan": (scan, scan.ScanMaker, scan.SIZES),
    "bld": (scan, partial(scan.ScanMaker, layout="bld"), scan.SIZES),
    "conv": (conv, scan.ScanMaker, scan.SIZES),
    "attention": (
        attention,
        lambda size, dtype: attention.Maker(attention.Size(*size), dtype),
        ATTENTION,
    ),
    "adaln": (adaln, adaln.Maker, adaln.SHAPES),
    "routing": (routing, routing.Maker, routing.SHAPES),
    "patch": (patch, lambda shape, dtype: patch.Maker(*shape, dtype), patch.SHAPES),
}
CASES = [
    (stem, case)
    for stem, (cases, *_) in FAMILIES.items()
    for case in cases.CASES
    if hasattr(pj, case.op)
    and case.op != "route"
    and (stem != "bld" or case.name in ("mamba", "groups", "paths", "sequences"))
    and (stem != "guidance" or case.name not in ("rescaled", "first", "one", "none", "or", "per_sample"))
]
ROUNDED = {"gram"}
"""Float64 in torch."""
DEFINED = {c.id for c in {case.op + str(i % 3): case for i, (_, case) in enumerate(CASES)}.values()}
"""Cases that pydiffuse.jax.reference computes, too: three of each op at most."""
INVERTED = {"superpose-and": 1e-3}
"""A linear system solved in float32, where the others have float64."""


@pytest.fixture(autouse=True)
def quick(request):
    """XLA optimises nothing, which takes half of the time, but where a test looks at what it makes."""
    quickly = "in_place" not in request.node.name and "copies" not in request.node.name
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tolerances(family):
    return getattr(family, "TOLERANCE", scan.TOLERANCE)


def to_jax(t):
    if not isinstance(t, torch.Tensor):
        return t
    if t.dtype == torch.bfloat16:
        return jnp.asarray(t.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return jnp.asarray(t.detach().contiguous().numpy())


def to_torch(a):
    return torch.from_numpy(np.asarray(a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None))


def wanted(stem, maker):
    """Which tensors have a gradient: no levels, no scales of attention."""
    if stem == "patch":
        return lambda t: t.shape == maker.shape
    return lambda t: stem != "attention" or t.dim() == 4


def error(found, expected, **least):
    """With infinities of lse in the same places."""
    found, expected = to_torch(found), expected.detach()
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    found, expected = (t.masked_fill(t == -torch.inf, 0) for t in (found, expected))
    return relative_error(found, expected, **least)


def split(given, wants=lambda t: True):
    """The float arrays among arguments, and what makes the arguments of such arrays."""
    leaves, form = tree_flatten(given)
    at = [
        i
        for i, t in enumerate(leaves)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and wants(t)
    ]
    rest = [to_jax(t) for t in leaves]

    def joined(arrays):
        new = list(rest)
        for i, a in zip(at, arrays, strict=True):
            new[i] = a
        return tree_unflatten(new, form)

    return [rest[i] for i in at], joined


def call(function, joined):
    def of(*arrays):
        args, kwargs = joined(arrays)
        return [
            a for a in jax.tree.leaves(function(*args, **kwargs)) if jnp.issubdtype(a.dtype, jnp.floating)
        ]

    return of


def weights_of(results):
    """As in values_and_gradients."""
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    return [jnp.asarray(w.numpy(), r.dtype) for w, r in zip(draw, results, strict=True)]


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def with_gradients(function, given, wants):
    arrays, joined = split(given, wants)
    f = call(function, joined)
    weights = weights_of(jax.eval_shape(f, *arrays))

    @jax.jit
    def run(*arrays):
        results, back = jax.vjp(f, *arrays)
        return results, back(weights)

    return run(*arrays)


@pytest.mark.parametrize(("stem", "case"), CASES, ids=lambda v: getattr(v, "id", v))
def test_values_and_gradients(stem, case):
    family, make, shapes = FAMILIES[stem]
    maker = make(next(iter(shapes.values())), torch.float32)
    given, wants = case.make(maker), wanted(stem, maker)
    right, slopes = values_and_gradients(case, doubled(given), "reference", wants=wants)
    right = [r for r in right if r.is_floating_point()]
    tolerance, looser = tolerances(family)[torch.float32], INVERTED.get(case.id, 0)
    values, grads = with_gradients(getattr(pj, case.op), given, wants)
    for found, expected in zip(values, right, strict=True):
        assert error(found, expected) <= max(looser, tolerance.value)
    for found, expected in zip(grads, slopes, strict=True):
        assert error(found, expected, least=1e-6) <= max(looser, 3 * tolerance.grad)
    if case.id not in DEFINED:
        return
    arrays, joined = split(given)
    defined = jax.jit(call(getattr(pj.reference, case.op), joined))(*arrays)
    for found, expected in zip(defined, right, strict=True):
        assert error(found, expected) <= max(looser, 1e-5)


BY_OP = {case.op: (stem, case) for stem, case in reversed(CASES) if case.op != "superpose"}


@pytest.mark.parametrize("op", BY_OP)
def test_shapes_and_dtypes_have_the_bits_of_torch(op):
    stem, case = BY_OP[op]
    family, make, shapes = FAMILIES[stem]
    for i, shape in enumerate(shapes.values()):
        for dtype in [torch.float32] if i else [torch.float32, torch.bfloat16, torch.float16]:
            given = case.make(make(shape, dtype))
            arrays, joined = split(given)
            found = call(getattr(pj, op), joined)(*arrays)
            expected = [
                t for t in leaves(getattr(pydiffuse, op)(*given[0], **given[1])) if t.is_floating_point()
            ]
            for a, t in zip(found, expected, strict=True):
                assert a.shape == tuple(t.shape)
                if op in ROUNDED:
                    assert error(a, t) <= max(1e-5, tolerances(family)[dtype].value)
                else:
                    assert a.dtype.name == str(t.dtype).removeprefix("torch.")
                    assert np.array_equal(np.asarray(a), np.asarray(to_jax(t)), equal_nan=True)


def test_vmap_folds_into_the_batch():
    c, u, x = normal(3, 2, 3, 4, 5)
    w = jnp.array([1.0, 3.0])

    def loss(c, u, w, x):
        g = pj.tcfg(c, u, w)
        return (x * g).sum() + (pj.gram([c, u]) ** 2).sum() / 99

    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0, 0)))(c, u[0], w, x)
    for i in range(2):
        alone = jax.jit(jax.grad(loss, (0, 1, 2)))(c[i], u[0], w[i], x[i])
        for many, one in zip(grads, alone, strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-5, atol=1e-6)
    summed = jax.jit(jax.grad(lambda u: jax.vmap(loss, (0, None, 0, 0))(c, u, w, x).sum()))(u[0])
    np.testing.assert_allclose(summed, grads[1].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapped", ["tokens", "parameters", "both"])
def test_vmap_of_tokens_and_parameters(mapped):
    u, delta, z = normal(3, 3, 2, 6, 9)
    B, C = normal(2, 3, 2, 4, 9)
    A, D, w = -jnp.exp(normal(3, 6, 4)), normal(3, 6), normal(3, 6, 4)
    path = paths.zigzag((3, 3), 1)

    def loss(u, delta, A, B, C, D, z, w):
        x = pj.causal_conv1d(u, w, activation="silu", path=path)
        y, last = pj.selective_scan(x, delta, A, B, C, D, z, None, True, True, path=path)
        return (y**2).sum() + last.sum()

    over = [int(mapped != ("parameters" if i in (0, 1, 3, 4, 6) else "tokens")) for i in range(8)]
    given = [a if m else a[0] for a, m in zip((u, delta, A, B, C, D, z, w), over, strict=True)]
    run = jax.value_and_grad(loss, tuple(range(8)))
    values, grads = jax.jit(jax.vmap(run, [0 if m else None for m in over]))(*given)
    alone = jax.jit(run)
    for i in range(3):
        value, slopes = alone(*(a[i] if m else a for a, m in zip(given, over, strict=True)))
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for many, one in zip(grads, slopes, strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_the_other_families(shared):
    """What every sample has for itself, or what all of them share."""
    x, y, q = normal(3, 2, 8, 16), normal(3, 2, 4, 16), normal(3, 1, 2, 6, 8)
    table, image = normal(3, 3, 2, 16), normal(3, 1, 2, 4, 4)
    ids = jnp.array([[[0, 2, 4, 7], [1, 3, 5, 6]]] * 3)[:, :, ::-1]
    t = jnp.linspace(0.1, 0.9, 12).reshape(3, 1, 4)
    rows = jnp.arange(48).reshape(3, 2, 8) % 3
    plan = plans.frames(3, 2, 1)

    def loss(x, y, q, image, table, ids, t, rows):
        z = pj.scatter_tokens(x, 2 * y + pj.gather_tokens(x, ids), ids, 0.3)
        z = pj.modulate(z, table, rows)
        o, lse = pj.tile_attention(q, 2 * q, q, plan, return_lse=True)
        x_t, goal = pj.noise_patches(image, t, 2, noise=image[..., ::-1])
        new, _ = pj.patch_step(x_t, goal, t, 1.0, 2, mask=pj.select_patches(t, 2, as_mask=True))
        return (z**2).sum() + (o**2).sum() + lse.sum() + (new * x_t).sum()

    given = [x, y, q, image, table, ids, t, rows]
    given = [a[0] if shared and i > 3 else a for i, a in enumerate(given)]
    axes = [None if shared and i > 3 else 0 for i in range(8)]
    run = jax.value_and_grad(loss, tuple(range(5)))
    values, grads = jax.jit(jax.vmap(run, axes))(*given)
    alone = jax.jit(run)
    for i in range(3):
        value, slopes = alone(*(a if axis is None else a[i] for a, axis in zip(given, axes, strict=True)))
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for many, one in zip(grads, slopes, strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5)


def test_integers_are_those_of_the_reference():
    score = normal(3, 9).at[1, 4].set(jnp.nan).at[2].set(0)
    for given in ({}, {"as_mask": True}):
        select = [jax.jit(partial(m.select_patches, k=4, **given)) for m in (pj, pj.reference)]
        found, expected = (f(score) for f in select)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    found = jax.vmap(lambda s: pj.select_patches(s, 2))(jnp.stack([score, -score]))
    np.testing.assert_array_equal(found[0][1], pj.select_patches(-score, 2)[0])
    ids = pj.route(4, 10, 0.5, key=jax.random.key(0))
    assert ids.shape == (4, 5) and (jnp.diff(ids) > 0).all() and ids.max() < 10


def test_scatter_in_place():
    base, y = normal(2, 6, 8), normal(2, 3, 8)
    ids = jnp.array([[0, 2, 4], [5, 1, 3]])
    expected = pj.reference.scatter_tokens(base, y, ids)
    run = jax.jit(partial(pj.scatter_tokens, donate_base=True), donate_argnums=0)
    here = base.unsafe_buffer_pointer()
    out = run(base, y, ids)
    np.testing.assert_array_equal(out, expected)
    assert out.unsafe_buffer_pointer() == here


@pytest.mark.parametrize(
    ("words", "attempt"),
    [
        ("ids holds 6; accepted: 0 to 5", lambda x: pj.gather_tokens(x, jnp.array([[6], [0]]))),
        ("ids holds 1 twice in sample 0", lambda x: pj.gather_tokens(x, jnp.array([[1, 1], [0, 1]]))),
        (
            "rows holds -1; accepted: 0 to 1",
            lambda x: pj.modulate(x, jnp.ones((2, 2, 8)), -jnp.ones((2, 6), int)),
        ),
        ("t holds a value outside", lambda x: pj.noise_patches(x, jnp.full(2, 1.5), noise=x)),
    ],
)
def test_wrong_values_are_named_where_they_are_met(words, attempt):
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(jax.jit(attempt)(jnp.ones((2, 6, 8))))


def sampler():
    c, x = normal(2, 2, 4, 8, 8)

    def sample(x, scale, donate_x=True):
        def step(x, dt):
            return pj.guide([c - x, 0.5 * x], "tcfg", x=x, b=dt, scale=scale, donate_x=donate_x), None

        return jax.lax.scan(step, x, jnp.linspace(0.1, 0.3, 5))[0]

    def defined(x, scale):
        for dt in np.linspace(0.1, 0.3, 5):
            x = pj.reference.guide([c - x, 0.5 * x], "tcfg", x=x, b=float(dt), scale=scale)
        return x

    return x, sample, defined


def test_a_sampler_in_scan():
    x, sample, defined = sampler()
    scale = jnp.float32(3)
    np.testing.assert_allclose(
        jax.jit(sample)(x, scale), jax.jit(defined)(x, scale), rtol=1e-5, atol=1e-5
    )
    slope, expected = (jax.jit(jax.grad(lambda w, f=f: f(x, w).sum()))(scale) for f in (sample, defined))
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_a_sampler_writes_in_place():
    x, sample, _ = sampler()
    scale = jnp.float32(3)

    def copies(donate_x):
        compiled = jax.jit(partial(sample, donate_x=donate_x), donate_argnums=0).lower(x, scale).compile()
        return compiled.as_text().count(" copy(")

    assert copies(True) < copies(False)


def test_coefficients_of_the_update_have_gradients():
    c, u, x, h = normal(4, 2, 3, 4)
    ab = jnp.array([[0.9, 0.8], [0.1, 0.2], [0.3, 0.4], [1.1, 1.2], [0.5, 0.6]])

    def loss(module, ab, w):
        a, b, k, p, q = ab
        new, D = module.guide(
            [c, u], "tcfg", x=x, a=a, b=b, history=h, h=k, predict=(p, q), scale=w, rescale=0.3
        )
        return (new * x).sum() + (D * c).sum()

    found, expected = (
        jax.jit(jax.grad(partial(loss, module), (0, 1)))(ab, jnp.float32(4))
        for module in (pj, pj.reference)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_copies_in_or_out():
    c, u, x = (jax.block_until_ready(a) for a in normal(3, 2, 4, 32, 32))

    def seen(function, *arrays):
        compiled = jax.jit(function, donate_argnums=2 if len(arrays) == 3 else ())
        places = [a.unsafe_buffer_pointer() for a in arrays]
        out = jax.block_until_ready(compiled(*arrays))
        return _jax.seen(), [*places, out.unsafe_buffer_pointer()]

    _jax.watch(True)
    try:
        here, there = seen(lambda c, u: pj.cfg(c, u, 3.0), c, u)
        assert here == there
        here, there = seen(
            lambda c, u, x: pj.guide([c, u], "tcfg", x=x, scale=3.0, donate_x=True), c, u, x
        )
        assert here == there and there[2] == there[3]
    finally:
        _jax.watch(False)


def test_wrong_arguments_are_named():
    c, u = normal(2, 2, 3)
    x, A, B = normal(2, 6, 9), -jnp.ones((6, 4)), normal(2, 4, 9)
    q, plan, table = normal(1, 2, 6, 8), plans.frames(3, 2, 1), jnp.ones((2, 2, 9))

    def scanned(delta=x, A=A, B=B, **options):
        return pj.selective_scan(x, delta, A, B, B, **options)

    wrong = {
        "cfg: the predictions is 'c'; accepted: float32": lambda: pj.cfg("c", u, 1.0),
        "cfg: the predictions is a int32 array": lambda: pj.cfg(c.astype(int), u, 1.0),
        "cfg: the predictions is a float64 array": lambda: pj.cfg(np.zeros((2, 3)), u, 1.0),
        "cfg: the predictions have shapes": lambda: pj.cfg(c, u[:, :1], 1.0),
        "cfg: the predictions are float32 and bfloat16": lambda: pj.cfg(c, u.astype(jnp.bfloat16), 1.0),
        "cfg: the predictions has no batch": lambda: pj.cfg(c[0, 0], u[0, 0], 1.0),
        "tcfg: scale has shape (3,); accepted: a number or (2,)": lambda: pj.tcfg(c, u, jnp.ones(3)),
        "tcfg: scale is a list": lambda: pj.tcfg(c, u, [1.0]),
        "compose: weights is 1 values; accepted: 2": lambda: pj.compose([c, u], u, [1.0]),
        "apg: state was given without momentum": lambda: pj.apg(c, u, 1.0, state=c),
        "gram: preds is a float32 array (2, 3); accepted: a list": lambda: pj.gram(c),
        "gram: preds holds 17 arrays; accepted: 1 to 16": lambda: pj.gram([c] * 17),
        "combine: coefficients has shape (3,)": lambda: pj.combine([c, u], jnp.ones(3)),
        "guide: unknown rule 'x'": lambda: pj.guide([c, u], "x", x=c),
        "guide: x is None": lambda: pj.guide([c, u], "cfg", x=None, scale=1.0),
        "guide: h needs history": lambda: pj.guide([c, u], "cfg", x=c, h=1.0, scale=1.0),
        "guide: preds[0], x have shapes": lambda: pj.guide([c, u], "cfg", x=c[:1], scale=1.0),
        "superpose: unknown kind": lambda: pj.superpose([c, u], jnp.zeros(2), 0.1, kind="xor"),
        "selective_scan: A is a float32 array (6,); accepted: (D, N), here (6, any)": lambda: scanned(
            A=A[:, 0]
        ),
        "selective_scan: A is a bfloat16 array": lambda: scanned(A=A.astype(jnp.bfloat16)),
        "selective_scan: delta is a float32 array (2, 6, 8)": lambda: scanned(delta=x[..., 1:]),
        "selective_scan: B and C have [4] groups": lambda: scanned(B=jnp.ones((2, 4, 4, 9))),
        "selective_scan: path is traced": lambda: jax.jit(lambda p: scanned(path=p))(jnp.arange(9)),
        "selective_scan: path is no permutation": lambda: scanned(path=[0] * 9),
        "selective_scan: cu_seqlens is [0, 3]": lambda: scanned(cu_seqlens=[0, 3]),
        "selective_scan: delta_softplus is 1": lambda: scanned(delta_softplus=1),
        "causal_conv1d: weight has width 9": lambda: pj.causal_conv1d(x, jnp.ones((6, 9))),
        "causal_conv1d: activation is 'relu'": lambda: pj.causal_conv1d(x, A, activation="relu"),
        "causal_conv1d: layout is 'x'": lambda: pj.causal_conv1d(x, A, layout="x"),
        "causal_conv1d: its gradient has no derivative": lambda: jax.grad(
            lambda x: jax.grad(lambda x: pj.causal_conv1d(x, A).sum())(x).sum()
        )(x),
        "tile_attention: scale takes no gradient": lambda: jax.grad(
            lambda s: pj.tile_attention(q, q, q, plan, scale=s).sum()
        )(1.0),
        "patch_step: t takes no gradient": lambda: jax.grad(
            lambda t: pj.patch_step(q, q, t, 1.0)[0].sum()
        )(0.5),
        "tile_attention: head_dim 9 is not": lambda: pj.tile_attention(
            *[q[..., :1].repeat(9, -1)] * 3, plan
        ),
        "tile_attention: q has 6 tokens": lambda: pj.tile_attention(q, q, q, plans.causal(7)),
        "tile_attention: k is a bfloat16": lambda: pj.tile_attention(q, q.astype(jnp.bfloat16), q, plan),
        "tile_attention: plan is a dict": lambda: pj.tile_attention(q, q, q, {}),
        "modulate: table is": lambda: pj.modulate(x, x, jnp.zeros((2, 6), int)),
        "modulate: norm is 'batch'": lambda: pj.modulate(x, table, jnp.zeros((2, 6), int), norm="batch"),
        "modulate: rows has shape (5,)": lambda: pj.modulate(x, table, jnp.zeros(5, int)),
        "modulate: rows is a float32": lambda: pj.modulate(x, table, jnp.zeros(6)),
        "scatter_tokens: y is": lambda: pj.scatter_tokens(x, x, jnp.zeros((2, 3), int)),
        "gather_tokens: ids has shape (3,)": lambda: pj.gather_tokens(x, jnp.zeros(3, int)),
        "noise_patches: neither noise nor key": lambda: pj.noise_patches(q, 0.5),
        "noise_patches: patch_size (5, 5) does not": lambda: pj.noise_patches(q, 0.5, 5),
        "noise_patches: t has shape (3,)": lambda: pj.noise_patches(q, jnp.ones(3), noise=q),
        "patch_step: scale was given without": lambda: pj.patch_step(q, q, 0.5, 1.0, scale=2.0),
        "select_patches: k is 10; accepted": lambda: pj.select_patches(x[0], 10),
        "tcfg: its gradient has no derivative": lambda: jax.grad(
            lambda c: jax.grad(lambda c: pj.tcfg(c, u, 2.0).sum())(c).sum()
        )(c),
    }
    for words, attempt in wrong.items():
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(words)):
            attempt()


def test_another_platform_is_an_error_that_says_so():
    jax.ffi.register_ffi_target("pydiffuse_elsewhere", _jax.no_kernels, platform="cpu")
    with pytest.raises(Exception, match="its kernels run on the CPU only"):
        jax.ffi.ffi_call("pydiffuse_elsewhere", jax.ShapeDtypeStruct((2,), jnp.float32))(jnp.ones(2))


@pytest.mark.parametrize(
    ("arrays", "attributes", "words"),
    [
        (lambda c: [c], {"k": 2}, "too few arrays"),
        (lambda c: [c, c, c], {"k": 2}, "too many arrays"),
        (lambda c: [c, c[:1]], {"k": 2}, "one shape"),
        (lambda c: [c.astype(int)], {"k": 1}, "accepted: float32"),
        (lambda c: [c], {"k": 99}, "too many arrays"),
        (lambda c: [c], {"k": 1, "inner": 7}, "too few dimensions"),
        (lambda c: [c], {"inner": 1}, "no attribute k"),
    ],
)
def test_a_handler_checks_what_memory_safety_needs(arrays, attributes, words):
    from pydiffuse.jax.calls import Like, call

    c = jnp.ones((2, 3))
    k = min(attributes.get("k", 1), 2)
    results = [Like((2, k, k), jnp.float32), Like((2, k), jnp.float32)]
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(call("gram", results, arrays(c), **{"inner": 1, **attributes}))


ALONE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
import pydiffuse.jax as pj
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
c, u = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))

def loss(tcfg, w):
    return (tcfg(c, u, w) ** 2).sum()

split = jax.shard_map(pj.tcfg, mesh=mesh, in_specs=(P("batch"), P("batch"), P()), out_specs=P("batch"))
here, there = (jax.jit(jax.value_and_grad(lambda w: loss(f, w)))(jnp.float32(3)) for f in (split, pj.tcfg))
np.testing.assert_allclose(here, there, rtol=1e-5)
assert len(jax.jit(split)(c, u, jnp.float32(3)).devices()) == 2
jax.config.update("jax_enable_x64", True)
assert pj.gram([c, u]).dtype == jnp.float64
assert "torch" not in sys.modules, "torch was imported"
"""


def test_shard_map_float64_and_no_torch():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


@pytest.mark.parametrize(
    ("missing", "words"), [("jax", "pip install jax"), ("pydiffuse._jax", "build it again")]
)
def test_what_is_missing_is_named(missing, words):
    code = f"import sys; sys.modules[{missing!r}] = None; import pydiffuse.jax"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: pydiffuse.jax" in done.stderr and words in done.stderr


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/jax_arrays.py")], check=True, capture_output=True, text=True
    )
    rows = [line for line in done.stdout.splitlines() if "differ by" in line]
    assert len(rows) == 3 and all(float(line.split()[-1]) < 2e-3 for line in rows), done.stdout
