"""The search for plans: what it chooses, what it reports, what it keeps in memory."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
import torch.nn.functional as F

from pydiffuse import plans
from pydiffuse.plans import SearchResult
from pydiffuse.search import relative_error
from tests.helpers import DEVICE, check_refused

CANDIDATES = [
    plans.frames(8, 4, 5), plans.frames(8, 4, 1), plans.frames(8, 4, 3), plans.local(32, 6, tile=8),
]  # fmt: skip


def layer_for(plan, sharp=4.0, heads=2, seed=0, kv_heads=None):
    """q, k, v whose scores are large where the plan keeps them: dense attention is nearly the plan's."""
    generator = torch.Generator().manual_seed(seed)
    S, D = plan.q_length, 64
    seen = plan.to_dense().double()
    liked = (seen[0] + seen[0].mT) / 2
    values, vectors = torch.linalg.eigh(liked)
    basis = vectors * values.clamp(min=0).sqrt()  # rows whose products are about `liked`
    q = torch.zeros(1, heads, S, D)
    q[..., :S] = sharp * D**0.25 * basis.float()
    v = torch.randn(1, kv_heads or heads, S, D, generator=generator)
    return tuple(t.to(DEVICE) for t in (q, q[:, : kv_heads or heads].clone(), v))


def errors_by_hand(layer, plan, scale=None):
    """||plan's - dense|| / ||dense||, with a mask in float64."""
    q, k, v = (t.double() for t in layer)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = plan.to_dense().to(q.device)
    exact = scores.softmax(-1) @ v
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return ((out - exact).norm() / exact.norm()).item(), [
        ((out - exact)[:, h].norm() / exact[:, h].norm()).item() for h in range(q.shape[1])
    ]


def share(plan):
    return plan.computed.mean() / (plan.q_length * plan.k_length)


def expected_choice(layer, threshold, candidates=CANDIDATES):
    passing = [p for p in candidates if errors_by_hand(layer, p)[0] <= threshold]
    return min(passing, key=share, default=plans.dense(32))


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.3, 10.0])
def test_the_sparsest_below_the_threshold(threshold):
    layers = [layer_for(CANDIDATES[i], sharp, seed=i) for i in range(4) for sharp in (1.0, 4.0)]
    found = plans.search(layers, CANDIDATES, threshold)
    assert found.plans == [expected_choice(layer, threshold) for layer in layers]
    for layer, choice in zip(layers, found.layers, strict=True):
        error = errors_by_hand(layer, choice.plan)[0]
        assert choice.error == pytest.approx(error, rel=1e-3, abs=2e-6) and choice.error <= threshold
        assert choice.density == choice.plan.density
        assert choice.speedup == pytest.approx(1 / share(choice.plan))
        tried = sorted(CANDIDATES, key=share)
        stop = tried.index(choice.plan) if choice.plan in tried else len(tried)
        assert len(choice.rejected) == stop and all(e > threshold for _, e in choice.rejected)
    assert found.speedup == pytest.approx(len(layers) / sum(share(p) for p in found.plans))
    assert found.density == pytest.approx(sum(p.density for p in found.plans) / len(layers))
    if threshold == 0:
        assert set(found.plans) == {plans.dense(32)}
    if threshold == 10:
        assert set(found.plans) == {min(CANDIDATES, key=share)}
    if threshold == 0.1:
        assert len(set(found.plans)) > 1, "layers differ"


def test_a_plan_for_each_head():
    a, b = layer_for(CANDIDATES[1]), layer_for(CANDIDATES[3])
    mixed = tuple(torch.cat([x[:, :1], y[:, :1], x[:, :1] * 0.1], 1) for x, y in zip(a, b, strict=True))
    found = plans.search([mixed], CANDIDATES, 0.005, per_head=True).layers[0]
    chosen = []
    for h in range(3):
        passing = [p for p in CANDIDATES if errors_by_hand(mixed, p)[1][h] <= 0.005]
        chosen.append(min(passing, key=share, default=plans.dense(32)))
    assert len(set(chosen)) == 3
    assert found.plan is plans.per_head(chosen)
    errors = [errors_by_hand(mixed, p)[1][h] for h, p in enumerate(chosen)]
    assert found.error == pytest.approx(max(errors), rel=1e-3, abs=2e-6)
    alike = plans.search([a], CANDIDATES, 0.005, per_head=True).plans[0]
    assert alike.heads == 1 and alike is CANDIDATES[1], "one plan for all heads where they agree"


def test_heads_share_an_order():
    """Head 0 wants tiles of an order, head 1 frames: the dearer of the two goes dense."""
    tiled = plans.sliding_tile((4, 8), (2, 2), (2, 2))
    a, b = layer_for(tiled, heads=1), layer_for(plans.frames(4, 8, 0), heads=1)
    both = tuple(torch.cat(pair, 1) for pair in zip(a, b, strict=True))
    found = plans.search([both], [tiled, plans.frames(4, 8, 0)], 0.15, per_head=True).plans[0]
    assert share(tiled) < share(plans.frames(4, 8, 0))
    assert found is plans.per_head([tiled, plans.dense(32)])


def test_layers_come_one_by_one():
    held = []

    def layers():
        for i in range(3):
            assert not [r for r in held if r() is not None], "the layer before is gone"
            layer = layer_for(CANDIDATES[i], seed=i)
            held.extend(weakref.ref(t) for t in layer)
            yield layer
            del layer

    seen = []
    found = plans.search(layers, CANDIDATES, 0.1, progress=lambda i, choice: seen.append((i, choice)))
    assert seen == list(enumerate(found.layers)) and len(seen) == 3


def test_options_of_the_attention():
    """Grouped queries, scales, low precision, a metric of one's own."""
    grouped = layer_for(CANDIDATES[1], heads=4, kv_heads=2)
    found = plans.search([grouped], CANDIDATES, 0.1).layers[0]
    assert found.error == pytest.approx(errors_by_hand(grouped, found.plan)[0], rel=1e-3, abs=2e-6)
    layer = layer_for(CANDIDATES[1])
    for scale in (0.02, torch.tensor([0.02, 0.3], device=DEVICE)):
        per_head = scale if isinstance(scale, float) else scale.reshape(2, 1, 1).double()
        found = plans.search([layer], CANDIDATES, 0.1, scale=scale).layers[0]
        if found.plan in CANDIDATES:
            assert found.error == pytest.approx(
                errors_by_hand(layer, found.plan, per_head)[0], rel=1e-3, abs=2e-6
            )
        for name, error in found.rejected:
            plan = next(p for p in CANDIDATES if all(f"{k}={v!r}" in name for k, v in p.parameters))
            assert error == pytest.approx(errors_by_hand(layer, plan, per_head)[0], rel=1e-3, abs=2e-6)
        assert found.rejected
    # Rounding of the inputs is in both, so that the error is the pattern's alone.
    low = tuple(t.bfloat16() for t in layer)
    found = plans.search([low], CANDIDATES, 0.1).layers[0]
    assert found.error == pytest.approx(errors_by_hand(low, found.plan)[0], rel=1e-3, abs=2e-6)
    calls = []

    def largest(out, exact):
        calls.append(out.shape)
        assert torch.allclose(
            exact, F.scaled_dot_product_attention(*layer)[:, : exact.shape[1]], atol=1e-5
        )
        return (out - exact).abs().max()

    found = plans.search([layer], CANDIDATES, 0.5, metric=largest).layers[0]
    assert found.error <= 0.5 and isinstance(found.error, float) and calls[0] == (1, 2, 32, 64)
    with pytest.raises(AssertionError):  # the second head's dense output is not the first's
        plans.search([layer], CANDIDATES, -0.0, metric=largest, per_head=True)


def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 9.0]), exact) == 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_measured(monkeypatch):
    """By seconds, not by pairs: here the sparser plan is the slower one."""
    import importlib

    module = importlib.import_module("pydiffuse.search")
    seconds = {CANDIDATES[1]: 5.0, CANDIDATES[2]: 2.0, CANDIDATES[0]: 9.0, plans.dense(32): 8.0}
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    tiles = module._Search._tiles

    def timed(self, layer, plan):
        clock[0] += seconds.get(plan, 1.0)
        return tiles(self, layer, plan)

    monkeypatch.setattr(module._Search, "_tiles", timed)
    layer = layer_for(CANDIDATES[1])
    found = plans.search([layer], CANDIDATES[:3], 10.0, measure=True).layers[0]
    assert found.plan is CANDIDATES[2]
    assert (found.seconds, found.dense_seconds, found.speedup) == (2.0, 8.0, 4.0)
    # What is slower than dense is not worth its error.
    only = plans.search([layer], CANDIDATES[:1], 10.0, measure=True)
    assert only.plans == [plans.dense(32)] and only.layers[0].error == 0 and only.speedup == 1
    heads = plans.search([layer], CANDIDATES[:3], 10.0, measure=True, per_head=True)
    assert heads.plans == [CANDIDATES[2]] and heads.layers[0].seconds == 2.0
    assert "2000.00" in str(heads) and "4.00x" in str(heads)


def test_heads_together_slower_than_dense(monkeypatch):
    """Each head's plan is faster than dense by itself, both in one plan are not."""
    import importlib

    module = importlib.import_module("pydiffuse.search")
    whole = plans.dense(32)
    cost = {whole: 8.0, CANDIDATES[1]: 4.0, CANDIDATES[3]: 5.0}
    monkeypatch.setattr(module._Search, "_cost", lambda self, plan, layer: cost.get(plan, together))
    a, b = layer_for(CANDIDATES[1]), layer_for(CANDIDATES[3])
    mixed = tuple(torch.cat([x[:, :1], y[:, :1]], 1) for x, y in zip(a, b, strict=True))
    for together, expected in (
        (7.0, plans.per_head([CANDIDATES[1], CANDIDATES[3]])),
        (9.0, whole),
    ):
        some = [CANDIDATES[1], CANDIDATES[3]]
        found = plans.search([mixed], some, 0.005, per_head=True, measure=True).layers[0]
        assert found.plan is expected
        assert (found.seconds, found.dense_seconds) == (min(together, 8.0), 8.0)
        assert (found.error == 0) == (expected is whole)


def test_real_clock():
    layer = layer_for(CANDIDATES[1])
    found = plans.search([layer], CANDIDATES, 10.0, measure=True).layers[0]
    assert found.seconds > 0 and found.dense_seconds > 0


def test_table_and_files(tmp_path):
    layers = [layer_for(CANDIDATES[i], seed=i) for i in range(4)] + [layer_for(CANDIDATES[1], 0.3)]
    found = plans.search(layers, CANDIDATES, 0.1)
    table = str(found).splitlines()
    assert len(table) == 2 + len(layers) and table[0].split() == [
        "layer",
        "error",
        "density",
        "speed-up",
        "ms",
        "plan",
    ]
    assert "frames(num_frames=8, tokens_per_frame=4, references=1, text=0)" in table[2]
    assert f"{found.speedup:.2f}x" in table[-1] and f"{found.density:.1%}" in table[-1]
    path = tmp_path / "plans.json"
    found.save(path)
    loaded = SearchResult.load(path)
    assert loaded == found and all(a is b for a, b in zip(loaded.plans, found.plans, strict=True))
    content = json.loads(path.read_text())
    assert len(content["plans"]) == len(set(found.plans)) < len(content["layers"])
    heads = plans.search(layers, CANDIDATES, 0.1, per_head=True, measure=True)
    heads.save(path)
    assert SearchResult.load(path) == heads

    def refused(words, text):
        path.write_text(text)
        check_refused(lambda: SearchResult.load(path), ValueError, ["plans.json", *words])

    refused(["not JSON"], "nothing")
    refused(["format 'pydiffuse.plan'", "pydiffuse.search"], '{"format": "pydiffuse.plan", "version": 1}')
    refused(["version 7", "reads 1"], json.dumps({**content, "version": 7}))
    refused(["holds no result"], json.dumps({**content, "plans": []}))
    refused(["holds no result"], json.dumps({**content, "layers": [{}]}))
    for threshold in ("0.1", -1, True):
        refused(["threshold is"], json.dumps({**content, "threshold": threshold}))
    refused(["layers is empty"], json.dumps({**content, "layers": []}))

    def changed(**values):
        return json.dumps({**content, "layers": [{**content["layers"][0], **values}]})

    for plan in (-1, len(content["plans"]), True, 0.0, None):
        refused(["plan is", "an int, 0 to"], changed(plan=plan))
    for seconds in ("x", -1.0, True, [1]):
        refused(["seconds is"], changed(seconds=seconds))
        refused(["dense_seconds is"], changed(dense_seconds=seconds))
    refused(["error is"], changed(error="0.1"))
    refused(["error is"], changed(rejected=[["name", "x"]]))
    refused(["not JSON", "Infinity"], json.dumps({**content, "threshold": float("inf")}))
    refused(["not JSON"], "[" * 100_000)


def test_infinite_errors_are_saved(tmp_path):
    layer = layer_for(CANDIDATES[1])
    zero = layer[0], layer[1], torch.zeros_like(layer[2])
    found = plans.search([zero], CANDIDATES, 0.1, metric=lambda out, exact: float("inf"))
    assert found.layers[0].rejected[0][1] == float("inf")
    everything = plans.search([layer], CANDIDATES, float("inf"))
    for result in (found, everything):
        result.save(tmp_path / "plans.json")

        def refuse(name):
            raise AssertionError(f"{name} is no JSON")

        json.loads((tmp_path / "plans.json").read_text(), parse_constant=refuse)
        assert SearchResult.load(tmp_path / "plans.json") == result


def test_bad_input():
    layer = layer_for(CANDIDATES[1])
    q, k, v = layer
    for call, error, words in (
        (lambda: plans.search([layer], [], 0.1), ValueError, ["search: candidates is []"]),
        (
            lambda: plans.search([layer], CANDIDATES[0], 0.1),
            ValueError,
            ["search: candidates is TilePlan"],
        ),
        (lambda: plans.search([layer], [3], 0.1), TypeError, ["candidates hold a int"]),
        (lambda: plans.search([layer], CANDIDATES, -1), ValueError, ["search: threshold is -1"]),
        (lambda: plans.search([layer], CANDIDATES, "0.1"), ValueError, ["search: threshold is '0.1'"]),
        (lambda: plans.search([layer], CANDIDATES, float("nan")), ValueError, ["threshold is nan"]),
        (lambda: plans.search([layer], CANDIDATES, 0.1, per_head=1), TypeError, ["per_head is 1"]),
        (lambda: plans.search([layer], CANDIDATES, 0.1, measure=None), TypeError, ["measure is None"]),
        (lambda: plans.search([], CANDIDATES, 0.1), ValueError, ["search: layers is empty"]),
        (lambda: plans.search([q], CANDIDATES, 0.1), TypeError, ["search: layer 0 is", "(q, k, v)"]),
        (lambda: plans.search([layer, None], CANDIDATES, 0.1), TypeError, ["layer 1 is a NoneType"]),
        (lambda: plans.search([None], CANDIDATES, 0.1), TypeError, ["search: layer 0 is a NoneType"]),
        (lambda: plans.search([layer, (q, k)], CANDIDATES, 0.1), TypeError, ["search: layer 1"]),
        (lambda: plans.search([(q, k, v[0])], CANDIDATES, 0.1), ValueError, ["search: layer 0", "v is"]),
        (
            lambda: plans.search([(q[:0], k[:0], v[:0])], CANDIDATES, 0.1),
            ValueError,
            ["one element or more"],
        ),
        (
            lambda: plans.search([layer], [plans.dense(31)], 0.1),
            ValueError,
            ["search: layer 0", "32 tokens", "for 31"],
        ),
        (
            lambda: plans.search([layer], [plans.per_head(CANDIDATES[:2])], 0.1, per_head=True),
            ValueError,
            ["per_head and a candidate is", "for one head"],
        ),
        (
            lambda: plans.search([(q, k, v * float("nan"))], CANDIDATES, 0.1),
            ValueError,
            ["search: layer 0", "not finite"],
        ),
    ):
        check_refused(call, error, words)
