"""Plans against masks written down token by token, and what kernels rely on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pydiffuse import plans, tile_attention
from pydiffuse.plans.combine import without_keys
from tests.cases.attention import TOLERANCE
from tests.cases.plans import EXAMPLES, KINDS, check_sense, dense_of, draws
from tests.helpers import BACKENDS, DEVICE, check
from tests.table import Case


def test_dense():
    check_sense(plans.dense(5), torch.ones(5, 5, dtype=torch.bool))
    check_sense(plans.dense(300, 7), torch.ones(300, 7, dtype=torch.bool))


def test_frames():
    for draw in draws("frames", 20):
        N, n = draw(1, 6), draw(1, 7)
        k, text = draw(0, N), draw(0, 3)
        R = {i * N // k for i in range(k)}

        def rule(i, j, N=N, n=n, R=R):
            a, b = i // n, j // n
            return a >= N or b >= N or a == b or a in R or b in R

        check_sense(plans.frames(N, n, k, text), dense_of(rule, N * n + text))


def test_groups():
    for draw in draws("groups", 20):
        lengths = [draw(0, 4) for _ in range(draw(1, 5))]
        keys = [draw(0, 4) for _ in lengths]
        lengths[0], keys[0] = draw(1, 4), draw(1, 4)  # something is kept
        q, k = (np.repeat(np.arange(len(n)), n) for n in (lengths, keys))
        check_sense(plans.groups(lengths, keys), torch.from_numpy(q[:, None] == k))
        check_sense(plans.groups(lengths), torch.from_numpy(q[:, None] == q))


def test_block_causal():
    for draw in draws("block_causal", 30):
        n = draw(1, 6)
        lengths = [draw(1, 4) for _ in range(n)]
        window, sinks = (None, 0) if draw(0, 1) else (draw(0, 3), draw(0, 2))
        block = np.repeat(np.arange(n), lengths)

        def past(a, b, window=window, sinks=sinks):
            return b < a and (window is None or a - b <= window or b < sinks)

        def rule(i, j, block=block):
            return block[i] == block[j] or past(block[i], block[j])

        S = len(block)
        check_sense(plans.block_causal(n, lengths, window=window, sinks=sinks), dense_of(rule, S))

        def trained(i, j, block=block, S=S):
            a, b = block[i % S], block[j % S]
            if j < S:  # a noisy key
                return i < S and a == b
            return past(a, b) or (i >= S and a == b)

        plan = plans.block_causal(n, lengths, window=window, sinks=sinks, clean=True)
        check_sense(plan, dense_of(trained, 2 * S))
    assert plans.block_causal(3, [4, 4, 4]) is plans.block_causal(3, 4)


def test_local():
    for draw in draws("local", 40):
        n, tile, causal = draw(1, 40), draw(1, 14), bool(draw(0, 1))
        window = draw(0, 45)

        def rule(i, j, window=window, causal=causal):
            return abs(i - j) <= window and (j <= i or not causal)

        check_sense(plans.local(n, window, causal=causal, tile=tile), dense_of(rule, n))
    few = plans.local(4000, 700, tile=64)
    assert len(few.rows.bits) <= 8, "tiles share their masks"


def test_causal():
    check_sense(plans.causal(21, 8), torch.ones(21, 21, dtype=torch.bool).tril())
    assert plans.causal(300) is plans.local(300, 300, causal=True) is plans.causal(300, tile=128)


def test_more_keys_than_queries():
    """And fewer: queries and keys end together."""
    for draw in draws("k_length", 60):
        n, keys, tile, window = draw(1, 40), draw(1, 40), draw(1, 14), draw(0, 45)
        causal, behind = bool(draw(0, 1)), keys - n

        def rule(i, j, window=window, causal=causal, behind=behind):
            return abs(i + behind - j) <= window and (j <= i + behind or not causal)

        plan = plans.local(n, window, causal=causal, tile=tile, k_length=keys)
        check_sense(plan, dense_of(rule, n, keys))
        check_sense(plan.transpose(), dense_of(rule, n, keys).T)
    check_sense(plans.causal(3, k_length=5), torch.ones(3, 5, dtype=torch.bool).tril(2))
    check_sense(plans.causal(5, 2, k_length=3), torch.ones(5, 3, dtype=torch.bool).tril(-2))
    assert plans.causal(7, k_length=7) is plans.causal(7)
    assert plans.local(9, 2, k_length=9) is plans.local(9, 2)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_sliding_tile(axes):
    for draw in draws("sliding", 15):
        grid = [draw(1, (40, 9, 5)[axes - 1]) for _ in range(axes)]
        tile = [draw(1, 4) for _ in grid]
        window = [t * draw(1, 4) for t in tile]
        if draw(0, 3) == 0:
            window[0] = max(grid[0], tile[0])  # all of an axis, a multiple or not
        text = draw(0, 2)
        places = list(itertools.product(*(range(n) for n in grid)))

        def seen(at, other, axis, grid=grid, tile=tile, window=window):
            """Along one axis: in the window of tiles that the query's tile has."""
            number = -(-grid[axis] // tile[axis])
            width = min(-(-window[axis] // tile[axis]), number)
            first = at // tile[axis] - width // 2
            first = min(max(first, 0), number - width)
            return first <= other // tile[axis] < first + width

        def rule(i, j, places=places, seen=seen):
            if max(i, j) >= len(places):
                return True
            return all(
                seen(a, b, axis) for axis, (a, b) in enumerate(zip(places[i], places[j], strict=True))
            )

        plan = plans.sliding_tile(grid, tile, window, text=text)
        check_sense(plan, dense_of(rule, len(places) + text))
        counts = np.diff(plan.rows.starts[0])[: len(plan.q_bounds) - 1 - (text > 0)]
        assert len(set(counts)) == 1, "every tile sees the same number of tiles"
    # The paper's video: a window of 3 x 3 x 3 tiles of 6 x 8 x 8.
    video = plans.sliding_tile((30, 48, 80), (6, 8, 8), (18, 24, 24))
    assert video.q_length == 115200 and np.diff(video.q_bounds).tolist() == [384] * 300
    assert video.density == pytest.approx(27 / 300)
    assert plans.sliding_tile((6, 8), (2, 8), (6, 8)).order is None, "rows of a grid are tiles already"


def test_sliding_tile_centres_odd_windows():
    plan = plans.sliding_tile((5,), (1,), (3,))
    expected = ["11100", "11100", "01110", "00111", "00111"]
    assert plan.to_dense()[0].int().tolist() == [[int(c) for c in row] for row in expected]


def test_joint():
    names = ["video", "audio", "text", "pose"]
    for draw in draws("joint", 30):
        used = names[: draw(1, 4)]
        steps = draw(1, 4)
        given, inner = {}, {}
        for name in used:
            n = draw(1, 3)
            given[name] = plans.frames(n, 4, draw(0, n)) if draw(0, 1) else draw(steps, 9)
            length = given[name] if isinstance(given[name], int) else given[name].q_length
            inner[name] = torch.ones(length, length, dtype=torch.bool)
            if not isinstance(given[name], int):
                inner[name] = given[name].to_dense()[0]
        sees = {a: [b for b in used if b != a and draw(0, 2)] for a in used if draw(0, 1)}
        seen = {a: sees.get(a, used) for a in used}
        local = {}
        for a, b in itertools.combinations_with_replacement(used, 2):
            known = b in seen[a] or a in seen[b]
            own = a == b and isinstance(given[a], int)
            if draw(0, 1) and (own or (a != b and known)) and min(len(inner[a]), len(inner[b])) >= steps:
                local[(a, b) if draw(0, 1) else (b, a)] = draw(0, 2)
        owner = [(a, i) for a in used for i in range(len(inner[a]))]

        def step(name, i, inner=inner, steps=steps):
            """The step s with floor(s n / steps) <= i < floor((s + 1) n / steps)."""
            n = len(inner[name])
            return next(s for s in range(steps) if s * n // steps <= i < (s + 1) * n // steps)

        def rule(i, j, owner=owner, seen=seen, inner=inner, local=local, step=step):
            (a, i), (b, j) = owner[i], owner[j]
            window = local.get((a, b), local.get((b, a)))
            if a == b:
                ok = inner[a][i, j]
            else:
                ok = b in seen[a]
            return ok and (window is None or abs(step(a, i) - step(b, j)) <= window)

        plan = plans.joint(given, sees, local=local, steps=steps if local else None)
        check_sense(plan, dense_of(rule, len(owner)))


def test_joint_with_orders_heads_and_masks():
    tiled = plans.sliding_tile((4, 6), (2, 3), (2, 3))
    both = plans.joint({"text": 3, "image": tiled}, {"text": ()})
    mask = torch.ones(27, 27, dtype=torch.bool)
    mask[3:, 3:] = tiled.to_dense()[0]
    mask[:3, 3:] = False
    check_sense(both, mask)
    heads = plans.per_head([plans.local(10, 2, tile=4), plans.dense(10)])
    plan = plans.joint(
        {"a": heads, "b": 6, "c": plans.local(7, 1, tile=3)}, {"b": "ac", "c": ["b"]} | {"b": ["c"]}
    )
    mask = torch.ones(2, 23, 23, dtype=torch.bool)
    mask[:, :10, :10] = heads.to_dense()
    mask[:, 16:, 16:] = plans.local(7, 1, tile=3).to_dense()
    mask[:, 10:16, :10] = mask[:, 16:, :10] = False
    check_sense(plan, mask)


def test_per_head():
    for draw in draws("per_head", 15):
        n, m = draw(1, 5), draw(1, 6)
        S = n * m
        some = [
            plans.frames(n, m, draw(0, n)), plans.local(S, draw(0, S), tile=draw(1, S), causal=bool(draw(0, 1))),
            plans.dense(S), plans.block_causal(n, m, window=draw(0, 2)),
        ]  # fmt: skip
        chosen = [some[draw(0, 3)] for _ in range(draw(1, 4))]
        plan = plans.per_head(chosen)
        if len(set(chosen)) == 1:
            assert plan is chosen[0]
        else:
            check_sense(plan, torch.cat([p.to_dense() for p in chosen]))
    tiled = plans.sliding_tile((4, 6), (2, 3), (2, 3))
    check_sense(
        plans.per_head([tiled, plans.dense(24)]),
        torch.cat([tiled.to_dense(), torch.ones(1, 24, 24, dtype=torch.bool)]),
    )
    cross = [plans.dense(6, 9), plans.groups([2, 4], [5, 4])]
    check_sense(plans.per_head(cross), torch.cat([p.to_dense() for p in cross]))


def test_union():
    for draw in draws("union", 15):
        n, m = draw(1, 4), draw(1, 6)
        S = n * m
        parts = [
            plans.frames(n, m, draw(0, n)),
            plans.local(S, draw(0, 4), tile=draw(1, S)),
            plans.local(S, draw(0, 4), tile=draw(1, S), causal=True),
            plans.groups([S // 2, S - S // 2]),
        ]
        chosen = [parts[draw(0, 3)] for _ in range(draw(1, 4))]
        check_sense(plans.union(chosen), torch.stack([p.to_dense() for p in chosen]).any(0))
    heads = plans.per_head([plans.local(12, 1, tile=5), plans.frames(3, 4, 1)])
    plan = plans.union([plans.local(12, 2, tile=3), heads])
    check_sense(plan, heads.to_dense() | plans.local(12, 2, tile=3).to_dense())


def test_without_keys():
    for draw in draws("without_keys", 40):
        n, m = draw(1, 4), draw(1, 6)
        S = n * m
        plan = [
            plans.frames(n, m, draw(0, n)),
            plans.local(S, draw(0, 4), tile=draw(1, S), causal=True),
            plans.sliding_tile((n, m), (2, 2), (2, 4)),
            plans.per_head([plans.local(S, 1, tile=3), plans.dense(S)]),
        ][draw(0, 3)]
        keys = np.array([draw(0, 4) > 0 for _ in range(S)])
        keys[draw(0, S - 1) :] &= draw(0, 1) > 0
        check_sense(without_keys(plan, keys), plan.to_dense() & torch.from_numpy(keys))


def test_from_mask():
    for draw in draws("from_mask", 15):
        generator = torch.Generator().manual_seed(draw(0, 99))
        shape = draw(1, 3), draw(1, 30), draw(1, 50)
        mask = torch.rand(shape, generator=generator) < (0.05, 0.5, 0.98)[draw(0, 2)]
        mask[0, 0, 0] = True
        check_sense(plans.from_mask(mask, draw(1, 12), draw(1, 40)), mask)
    assert plans.from_mask(mask, 4) is plans.from_mask(
        mask.numpy(), [4] * (shape[1] // 4) + [shape[1] % 4] * (shape[1] % 4 > 0), 4
    )
    assert plans.from_mask(mask, 4) != plans.from_mask(mask, 5)


def test_from_mask_of_a_batch():
    mask = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = plans.from_mask(mask, 4)
    for batch in (mask[None], mask[None].expand(3, -1, -1, -1), mask[None].numpy()):
        assert plans.from_mask(batch, 4) is plan


def test_from_blocks():
    for draw in draws("from_blocks", 20):
        generator = torch.Generator().manual_seed(draw(0, 99))
        heads, q, k = draw(1, 3), draw(1, 6), draw(1, 6)
        blocks = torch.rand(heads, q, k, generator=generator) < (0.1, 0.5, 0.95)[draw(0, 2)]
        q_lengths, k_lengths = [draw(1, 5) for _ in range(q)], [draw(1, 5) for _ in range(k)]
        mask = blocks.repeat_interleave(torch.tensor(q_lengths), 1)
        mask = mask.repeat_interleave(torch.tensor(k_lengths), 2)
        plan = plans.from_blocks(blocks, q_lengths, k_lengths)
        check_sense(plan, mask)
        assert not plan.runs.bits and plan.q_bounds.tolist() == [0, *np.cumsum(q_lengths)]
        assert plans.from_blocks(blocks[None].numpy(), tuple(q_lengths), np.array(k_lengths)) is plan
    square = torch.eye(3, dtype=torch.bool)
    assert torch.equal(
        plans.from_blocks(square, [4, 2, 3]).to_dense(), plans.groups([4, 2, 3]).to_dense()
    )


EMPTY = {
    "from_mask": lambda: plans.from_mask(torch.zeros(2, 150, 9, dtype=torch.bool), 64, 4),
    "from_blocks": lambda: plans.from_blocks(torch.zeros(2, 3, dtype=torch.bool), [150, 2], [1, 4, 3]),
    "groups": lambda: plans.groups([150, 0], [0, 9]),
    "causal": lambda: plans.causal(150, k_length=9),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_queries_that_see_nothing(kind, tmp_path):
    plan = EMPTY[kind]()
    check_sense(plan, plan.to_dense())
    assert plan.density == pytest.approx(0.0 if kind != "causal" else 45 / 1350)
    assert "speed-up" in plan.summary() and plan.picture(30).shape[2] == 3
    plan.save(tmp_path / "plan.json")
    assert plans.TilePlan.load(tmp_path / "plan.json") is plan.transpose().transpose() is plan
    if plan.heads == 1:
        assert torch.equal(plans.union([plan, plan.transpose().transpose()]).to_dense(), plan.to_dense())
        other = plans.dense(plan.q_length, plan.k_length)
        assert plans.union([plan, other]).density == 1
        assert plans.per_head([plan, other]).kept.tolist() == [plan.kept[0], other.kept[0]]
    torch.manual_seed(0)
    q = torch.randn(2, 2, plan.q_length, 8, device=DEVICE)
    k, v = torch.randn(2, 2, 2, plan.k_length, 8, device=DEVICE)
    case = Case("tile_attention", kind, None)
    for backend in BACKENDS:
        check(case, ((q, k, v, plan), {}), backend, TOLERANCE)
    lone = ~plan.to_dense().any(-1)
    out, lse = tile_attention(q, k, v, plan, return_lse=True)
    blind = lone.to(DEVICE).expand(2, 2, -1)
    assert not out[blind].any() and (lse[blind] == -torch.inf).all() and out.isfinite().all()


DOCUMENT = torch.tensor([0] * 70 + [1] * 3 + [2] * 127)


@pytest.mark.parametrize(
    "rule, heads",
    [
        (lambda b, h, q, k: q >= k, None),
        (lambda b, h, q, k: (q - k).abs() <= 10 * h, 3),
        (lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k), None),
        (lambda b, h, q, k: q + k >= 0, None),
    ],
    ids=["causal", "heads", "documents", "all"],
)
def test_from_block_mask(rule, heads):
    block_mask = create_block_mask(rule, None, heads, 200, 200, device="cpu", BLOCK_SIZE=(32, 64))
    plan = plans.from_block_mask(block_mask)
    one = torch.zeros((), dtype=torch.long)
    mask = torch.stack(
        [dense_of(lambda i, j, h=h: rule(one, one + h, one + i, one + j), 200) for h in range(heads or 1)]
    )
    check_sense(plan, mask)
    assert np.diff(plan.q_bounds).tolist() == [32] * 6 + [8]
    again = create_block_mask(rule, 2, heads, 200, 200, device="cpu", BLOCK_SIZE=(32, 64))
    assert plans.from_block_mask(again) is plan, "samples with one mask share its plan"


def test_from_block_mask_of_whole_blocks():
    def rule(b, h, q, k):
        return q // 16 >= k // 16

    block_mask = create_block_mask(rule, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    plan = plans.from_block_mask(block_mask)
    check_sense(plan, dense_of(lambda i, j: i // 16 >= j // 16, 48))
    assert not plan.rows.bits


def test_from_block_mask_looks_at_partial_blocks_only():
    asked = []

    def rule(b, h, q, k):
        return q // 16 >= k // 16

    block_mask = create_block_mask(rule, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)

    def seen(b, h, q, k):
        asked.append(1)
        return rule(b, h, q, k)

    block_mask.mask_mod = seen
    check_sense(plans.from_block_mask(block_mask), dense_of(lambda i, j: i // 16 >= j // 16, 64))
    assert len(asked) == 1, "all partial blocks in one go"


def test_integers_of_any_kind():
    assert plans.frames(np.int64(3), torch.tensor(4), 1) is plans.frames(3, 4, 1)
    assert plans.groups(np.array([3, 4])) is plans.groups((3, 4)) is plans.groups(torch.tensor([3, 4]))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_every_kind(kind):
    plan = EXAMPLES[kind]()
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, n, 8, device=DEVICE) for n in (plan.q_length, plan.k_length, plan.k_length)
    )
    case = Case("tile_attention", kind, None)
    check(case, ((q, k, v, plan), {"return_lse": True}), BACKENDS[0], TOLERANCE)
