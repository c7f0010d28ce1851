"""attention_plan around diffusers' transformers: whose attention it serves, and by which plan."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as checkpoints

from pydiffuse import plans
from tests.helpers import check_refused

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: bench)")
from diffusers.models.attention_dispatch import dispatch_attention_fn

from pydiffuse.integrations.diffusers import attention_plan
from tests.cases.transformers import MODELS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(name, **options):
    torch.manual_seed(0)
    tiny = MODELS[name](**options)
    tiny.model.eval()
    return tiny


def several(tiny):
    """A plan for each layer, no two of them alike."""
    return [plans.local(tiny.tokens, 2 + 3 * i, tile=8) for i in range(tiny.layers)]


@contextmanager
def masked(given, tokens):
    """Attention among `tokens` tokens under the plans as masks, by torch, in order of calls."""
    original, following = F.scaled_dot_product_attention, iter(given)

    def attend(query, key, value, attn_mask=None, **options):
        if query.shape[2] == key.shape[2] == tokens:
            seen = next(following).to_dense()[0]
            attn_mask = seen if attn_mask is None else seen & attn_mask
        return original(query, key, value, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_by_its_plan(name):
    tiny = made(name)
    given = several(tiny)
    # mochi's processor calls attention sample by sample
    times = 2 if name == "mochi" else 1
    with torch.no_grad():
        with masked([p for p in given for _ in range(times)], tiny.tokens):
            expected = tiny()
        with attention_plan(given):
            found = tiny()
            again = tiny()
        plain = tiny()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(again, found) and not torch.allclose(plain, found, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_of_another_length(name):
    tiny = made(name)
    for given in (plans.dense(tiny.tokens - 1), [plans.dense(tiny.tokens - 1)] * tiny.layers):
        with pytest.raises((ValueError, RuntimeError)) as caught, torch.no_grad(), attention_plan(given):
            tiny()
        assert "attention_plan" in str(caught.value)


@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_as_many_plans_as_layers(name):
    tiny = made(name)
    for many in (tiny.layers - 1, tiny.layers + 1):
        given = [plans.dense(tiny.tokens)] * many
        with pytest.raises((ValueError, RuntimeError)) as caught, torch.no_grad(), attention_plan(given):
            tiny()
        assert f"{many} plans" in str(caught.value)


def test_cross_attention_of_the_plans_length():
    for name, text in (("wan", {"text": 48}), ("pixart", {})):
        tiny = made(name, **text)
        if name == "pixart":
            tiny.arguments["encoder_hidden_states"] = torch.randn(2, tiny.tokens, 16)
        calls = []

        def seen(*call, calls=calls):
            calls.append(call)

        layers = [m for path, m in tiny.model.named_modules() if path.endswith("attn2")]
        hooks = [layer.register_forward_hook(seen, with_kwargs=True) for layer in layers]
        with torch.no_grad(), attention_plan(plans.local(tiny.tokens, 0, tile=8)):
            tiny()
        for hook in hooks:
            hook.remove()
        assert len(calls) == 2
        for module, args, kwargs, out in calls:
            with torch.no_grad():
                assert torch.equal(module(*args, **kwargs), out)


class Layer(nn.Module):
    """Self-attention through diffusers' dispatcher, or cross-attention where a context is given."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, context=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        if context is not None:
            _, k, v = self.qkv(context).unflatten(-1, (3, 2, 8)).unbind(-3)
        return x + dispatch_attention_fn(q, k, v).flatten(-2)


class Product(nn.Module):
    """Between a layer and the dispatcher, as some models wrap it."""

    def forward(self, query, key, value):
        return dispatch_attention_fn(query, key, value)


class Both(Layer):
    """Self-attention and then cross-attention in one module, through another one."""

    def __init__(self):
        super().__init__()
        self.product = Product()

    def forward(self, x, text):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        x = x + self.product(q, k, v).flatten(-2)
        _, k, v = self.qkv(text).unflatten(-1, (3, 2, 8)).unbind(-3)
        return x, self.product(q, k, v)


def test_where_keys_come_from():
    torch.manual_seed(0)
    layer, both, x = Layer(), Both(), torch.randn(1, S, 16)
    context, text = torch.randn(1, S, 16), torch.randn(1, 9, 16)
    plan = GIVEN[0]
    crossed, own = layer(x, context), both(x, text)
    with attention_plan(plan):
        assert torch.equal(layer(x, context), crossed) and torch.equal(layer(x, context=context), crossed)
        assert not torch.allclose(layer(x), crossed)
        found = both(x, text)
        assert torch.equal(found[1], own[1]) and not torch.allclose(found[0], own[0])
        layer.register_forward_pre_hook(lambda *_: None)
        assert torch.equal(layer(x, context), crossed)


def test_a_model_beside_the_layers():
    """Another model with attention that no plan is for takes no numbers."""
    tiny, other = made("sd3"), made("dit")
    given = several(tiny)
    with torch.no_grad():
        with attention_plan(given):
            expected = tiny()
        with attention_plan(given):
            plain = other()
            assert torch.equal(tiny(), expected)
            other()
            assert torch.equal(tiny(), expected)
        assert torch.equal(other(), plain)


class Stack(nn.Module):
    """Layers that can stop, skip and be recomputed."""

    def __init__(self, layers=3):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x, stop=None, skip=(), recompute=None):
        for i, block in enumerate(self.blocks):
            if stop is not None and i >= stop:
                break
            if i in skip:
                continue
            if recompute is None:
                x = block(x)
            else:
                x = checkpoints.checkpoint(block, x, use_reentrant=recompute)
        return x


S = 24
GIVEN = [plans.local(S, 1 + 4 * i, tile=8) for i in range(3)]


def by_hand(model, x, layers):
    """Each of the layers under its plan alone."""
    for i in layers:
        with attention_plan(GIVEN[i]):
            x = model.blocks[i](x)
    return x


@pytest.mark.parametrize("skip", [(0,), (1,), (0, 1), (2,), (0, 2)])
def test_skipped_blocks(skip):
    model, x = Stack(), torch.randn(1, S, 16)
    layers = [i for i in range(3) if i not in skip]
    expected, whole = by_hand(model, x, layers), by_hand(model, x, range(3))
    for first in (True, False):
        with attention_plan(GIVEN):
            calls = [lambda: model(x, skip=skip), lambda: model(x)]
            found = [call() for call in (calls if first else calls[::-1])]
        for out, right in zip(found, [expected, whole] if first else [whole, expected], strict=True):
            assert torch.equal(out, right)


@pytest.mark.parametrize("stop", [1, 2])
def test_an_early_stop(stop):
    model, x = Stack(), torch.randn(1, S, 16)
    with attention_plan(GIVEN):
        found = [model(x, stop=stop) for _ in range(2)] + [model(x)]
    expected = [by_hand(model, x, range(n)) for n in (stop, stop, 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("thread", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation(reentrant, inside, thread):
    """Within the context and after it, and in a thread that knows nothing of it, as on a GPU."""
    model, x = Stack(), torch.randn(1, S, 16)

    def gradients(recompute, given, inside=True):
        own = x.clone().requires_grad_()
        model.zero_grad()
        with attention_plan(given):
            loss = model(own, recompute=recompute).square().sum()
            if inside:
                run(loss.backward)
        if not inside:
            run(loss.backward)
        return [own.grad, *(p.grad.clone() for p in model.parameters())]

    def run(backward):
        if not thread:
            return backward()
        other = threading.Thread(target=backward)
        other.start()
        other.join()

    expected = gradients(None, GIVEN)
    for given, right in ((GIVEN, expected), (GIVEN[0], gradients(None, GIVEN[0]))):
        found = gradients(reentrant, given, inside)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_gradient_checkpointing_of_diffusers():
    tiny = made("wan")
    tiny.model.train()
    found = []
    for recompute in (False, True):
        tiny.model.zero_grad()
        if recompute:
            tiny.model.enable_gradient_checkpointing()
        with attention_plan(several(tiny)):
            loss = tiny().square().sum()
        loss.backward()
        found.append([p.grad for p in tiny.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_no_model_holds():
    model, x = Stack(), torch.randn(1, S, 16)
    expected = by_hand(model, x, range(3))
    with attention_plan(GIVEN):
        for _ in range(2):
            y = x
            for block in model.blocks:
                y = block(y)
            assert torch.equal(y, expected)

    def skipping():
        with attention_plan(GIVEN):
            model.blocks[2](model.blocks[1](x))

    check_refused(skipping, RuntimeError, ["2 self-attentions", "3 plans"])


def test_two_models():
    models, x = [Stack(), Stack()], torch.randn(1, S, 16)
    with attention_plan(GIVEN):
        for model in models:
            assert torch.equal(model(x), by_hand(models[0], x, range(3)))


def test_what_cannot_be_told():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x, skip=False):
            return self.second(x if skip else self.first(x))

    model, x = nn.Sequential(Twice(), Twice()), torch.randn(1, S, 16)

    def skipping():
        with attention_plan([*GIVEN, GIVEN[0]]):
            model[1](x)
            model(x)

    check_refused(skipping, ValueError, ["attention_plan"])
    check_refused(lambda: direct(GIVEN), ValueError, ["in no module"])


def direct(given, **options):
    q = torch.randn(1, S, 2, 8)
    with attention_plan(given):
        return dispatch_attention_fn(q, q, q, **options)


def test_a_context_that_serves_nothing():
    def nothing(given=GIVEN[0]):
        with attention_plan(given):
            pass

    check_refused(nothing, RuntimeError, ["attention_plan: no attention was served"])
    check_refused(lambda: nothing(GIVEN), RuntimeError, ["no attention was served"])
    with pytest.raises(KeyError), attention_plan(GIVEN[0]):
        raise KeyError("the block's own error comes out")


def test_contexts_within_each_other():
    model, x = Stack(), torch.randn(1, S, 16)
    outer, inner = by_hand(model, x, range(3)), None
    with attention_plan(GIVEN):
        assert torch.equal(model(x), outer)
        with attention_plan(GIVEN[0]):
            inner = model(x)
        assert torch.equal(model(x), outer)
    with attention_plan(GIVEN[0]):
        assert torch.equal(model(x), inner)
        with pytest.raises(ValueError, match="24 tokens"), attention_plan(plans.dense(7)):
            model(x)
        assert torch.equal(model(x), inner)
    with attention_plan(plans.dense(S)), attention_plan(GIVEN[0]):  # the outer one has nothing to serve
        assert torch.equal(model(x), inner)


def test_threads():
    model, x = Stack(), torch.randn(1, S, 16)
    plain = model(x)
    expected = [by_hand(model, x, range(3)), plain]
    barrier, found = threading.Barrier(2), [None, None]

    def call(i):
        if i:
            barrier.wait()
            found[i] = [model(x) for _ in range(3)]  # while the other one is in its context
            barrier.wait()
        else:
            with attention_plan(GIVEN):
                barrier.wait()
                found[i] = [model(x) for _ in range(3)]
                barrier.wait()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        assert all(torch.equal(result, right) for result in results)
    assert torch.equal(model(x), plain)


def test_tasks():
    model, x = Stack(), torch.randn(1, S, 16)
    plain = model(x)

    async def call(given, order):
        out = []
        with attention_plan(given):
            for _ in range(3):
                await asyncio.sleep(0.001 * order)
                out.append(model(x))
            out.append(await asyncio.to_thread(model, x))
        return [*out, model(x)]

    async def both():
        return await asyncio.gather(call(GIVEN[0], 1), call(GIVEN[1], 2), call(GIVEN, 3))

    found = asyncio.run(both())
    for given, results in zip((GIVEN[0], GIVEN[1], GIVEN), found, strict=True):
        with attention_plan(given):
            right = model(x)
        assert all(torch.equal(result, right) for result in results[:-1])
        assert torch.equal(results[-1], plain)


def test_nothing_stays_behind():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    def state():
        return (
            F.scaled_dot_product_attention, vars(registry)["get_active_backend"], registry._active_backend,
            checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator,
        )  # fmt: skip

    before = state()
    direct(GIVEN[0])
    for error in (lambda: direct(plans.dense(7)), lambda: direct(GIVEN)):
        with pytest.raises(ValueError):
            error()

    async def closed_elsewhere():
        async def forever():
            with attention_plan(GIVEN[0]):
                yield direct(GIVEN[1])

        steps = forever()
        await steps.__anext__()
        await asyncio.create_task(steps.aclose())

    asyncio.run(closed_elsewhere())
    assert state() == before


def test_a_compiled_model():
    model, x = Stack(), torch.randn(1, S, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    torch.testing.assert_close(plain, model(x))
    for given in (GIVEN, GIVEN[0]):
        with attention_plan(given):
            expected = model(x)
        with attention_plan(given):
            for _ in range(2):
                torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), plain)
    torch._dynamo.reset()


def key_mask(*lengths):
    return (torch.arange(S) < torch.tensor(lengths)[:, None])[:, None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: key_mask(24, 24),
        lambda: key_mask(24, 9),
        lambda: key_mask(10),
        lambda: key_mask(20, 9)[:, 0, 0],
        lambda: key_mask(20, 9).expand(2, 2, S, S),
        lambda: torch.zeros(2, 1, 1, S).masked_fill(~key_mask(20, 9), -torch.inf),
        lambda: torch.zeros(S, S),
        lambda: torch.ones(S, S, dtype=torch.bool),
        lambda: torch.ones(1, 1, 1, 1, dtype=torch.bool),
        lambda: key_mask(24, 17) & (torch.arange(S) % 5 > 0),
    ],
)
@pytest.mark.parametrize("plan", [plans.local(S, 12, tile=8), plans.sliding_tile((4, 6), (2, 3), (4, 3))])
def test_masks_of_keys(make, plan):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, S, 2, 8, requires_grad=True) for _ in range(3))
    mask = make()
    with attention_plan(plan):
        found = dispatch_attention_fn(q, k, v, attn_mask=mask)
        assert torch.equal(dispatch_attention_fn(q, k, v, attn_mask=mask), found)
    counts = mask if mask.dtype is torch.bool else mask == 0
    counts = counts[:, None, None] if counts.shape == (2, S) else counts
    both = (plan.to_dense() & counts).expand(2, -1, S, S)[:, :1]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=both)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(found, expected.nan_to_num(), **CLOSE)
    weights = torch.randn_like(found)
    rows = both.any(-1)[:, 0, :, None, None]  # rows of no keys are zeros, and torch's own nan
    grads = [torch.autograd.grad((out * weights * rows).sum(), (q, k, v)) for out in (found,)]
    masked_scores = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).masked_fill(~both, -1e30).softmax(-1)
    right = torch.einsum("bhij,bjhd->bihd", masked_scores, v)
    grads.append(torch.autograd.grad((right * weights * rows).sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_mask_that_changes_in_place():
    plan, mask = plans.dense(S), key_mask(24, 24).clone()
    q = torch.randn(2, S, 2, 8)
    with attention_plan(plan):
        before = dispatch_attention_fn(q, q, q, attn_mask=mask)
        mask[1, ..., 5:] = False
        after = dispatch_attention_fn(q, q, q, attn_mask=mask)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(S, S, dtype=torch.bool).tril(),
        torch.ones(2, 1, S, S, dtype=torch.bool).tril(),
        torch.randn(2, 1, 1, S),
        torch.arange(2).view(1, 2, 1, 1).expand(2, 2, 1, S) == 0,
        key_mask(24, 9).float(),
    ],
)
def test_masks_that_a_plan_cannot_hold(mask):
    q = torch.randn(2, S, 2, 8)

    def call():
        with attention_plan(plans.dense(S)):
            dispatch_attention_fn(q, q, q, attn_mask=mask)

    check_refused(call, ValueError, ["attention_plan: attn_mask", "[B, 1, 1, keys]"])
