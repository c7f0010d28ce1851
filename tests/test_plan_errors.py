"""Bad input of every constructor of plans."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pydiffuse import plans
from tests.helpers import check_refused

LOCAL, FRAMES = plans.local(12, 3), plans.frames(3, 4, 1)
TILED = plans.sliding_tile((4, 6), (2, 3), (2, 3))
BAD = [
    (lambda: plans.dense(0), ["dense: length is 0", "1 or more"]),
    (lambda: plans.dense(4, 2.5), ["dense: k_length is 2.5"]),
    (lambda: plans.frames(0, 4, 1), ["frames: num_frames is 0"]),
    (lambda: plans.frames(3, 4, 4), ["frames: references is 4", "0 to 3"]),
    (lambda: plans.frames(3, 4, 1, text=-1), ["frames: text is -1"]),
    (lambda: plans.frames(3, True, 1), ["frames: tokens_per_frame is True"]),
    (lambda: plans.frames(2**16, 2**16, 0), ["frames: 4294967296 tokens", "2^31"]),
    (lambda: plans.groups([]), ["groups: lengths is []"]),
    (lambda: plans.groups(5), ["groups: lengths is 5"]),
    (lambda: plans.groups("ab"), ["groups: lengths is 'ab'"]),
    (lambda: plans.groups([3, -1]), ["groups: lengths is [3, -1]", "0 or more"]),
    (lambda: plans.groups([3, 1], [2]), ["groups: k_lengths is [2]", "2 ints"]),
    (lambda: plans.groups([0, 0]), ["groups: tiles have lengths []"]),
    (lambda: plans.block_causal(0, 4), ["block_causal: num_blocks is 0"]),
    (lambda: plans.block_causal(3, [4, 4]), ["block_causal: block is [4, 4]", "3 ints"]),
    (lambda: plans.block_causal(3, 0), ["block_causal: block is 0"]),
    (lambda: plans.block_causal(3, 4, window=-1), ["block_causal: window is -1"]),
    (lambda: plans.block_causal(3, 4, sinks=-1), ["block_causal: sinks is -1"]),
    (lambda: plans.local(12, -1), ["local: window is -1"]),
    (lambda: plans.local(12, 3, tile=0), ["local: tile is 0"]),
    (lambda: plans.local("12", 3), ["local: length is '12'"]),
    (lambda: plans.sliding_tile((4, 6, 2, 2), (2, 3), (2, 3)), ["sliding_tile: grid", "1 or 2 or 3 ints"]),
    (lambda: plans.sliding_tile((4, 6), (2,), (2, 3)), ["sliding_tile: tile is (2,)", "2 ints"]),
    (lambda: plans.sliding_tile((4, 6), (2, 3), 3), ["sliding_tile: window is 3"]),
    (lambda: plans.sliding_tile((4, 6), (2, 3), (3, 3)), ["window is (3, 3)", "a multiple of the tile"]),
    (lambda: plans.sliding_tile((4, 6), (2, 3), (2, 3), text=-1), ["sliding_tile: text is -1"]),
    (lambda: plans.sliding_tile((2**16, 2**16), (2, 3), (2, 3)), ["sliding_tile: 4294967296", "2^31"]),
    (lambda: plans.local(2**31, 3), ["local: 2147483648 tokens", "2^31"]),
    (lambda: plans.block_causal(2**10, 2**20, clean=True), ["block_causal: 2147483648 tokens", "2^31"]),
    (lambda: plans.causal(0), ["causal: length is 0"]),
    (lambda: plans.causal(2**31), ["causal: 2147483648 tokens", "2^31"]),
    (lambda: plans.causal(4, 0), ["causal: tile is 0"]),
    (lambda: plans.dense(2**70), ["dense: 1180591620717411303424 tokens", "2^31"]),
    (lambda: plans.groups([2**70]), ["groups: 1180591620717411303424 tokens", "2^31"]),
    (lambda: plans.groups([1], [2**70]), ["groups: 1180591620717411303424 tokens", "2^31"]),
    (lambda: plans.joint({"a": 2**70}), ["joint: 1180591620717411303424 tokens", "2^31"]),
    (lambda: plans.frames(2**20, 1, 2**19), ["frames: the plan would keep 8246", "2^27", "fewer references"]),
    (lambda: plans.frames(2**31 - 1, 1, 2**30), ["frames: the plan would keep", "2^27"]),
    (lambda: plans.block_causal(2**15, 1), ["block_causal: the plan would keep 536887296 tiles", "a window"]),
    (lambda: plans.block_causal(2**40, 1), ["block_causal: the plan would keep", "2^27"]),
    (lambda: plans.local(2**18, 2**18, tile=1), ["local: the plan would keep 68719476736 tiles", "2^27"]),
    (lambda: plans.local(2**31 - 1, 0, tile=1), ["local: the plan would keep", "larger tiles"]),
    (
        lambda: plans.sliding_tile((512, 512), (1, 1), (512, 512)),
        ["sliding_tile: the plan would keep 68719476736 tiles", "2^27"],
    ),
    (
        lambda: plans.joint({"a": 2**16}, local={("a", "a"): 2**70}, steps=2**16),
        ["joint: the plan would keep 4294967296 tiles", "2^27"],
    ),
    (lambda: plans.joint({"a": 2**30}, local={("a", "a"): 1}, steps=2**30), ["joint: the plan would keep"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local=[1], steps=2), ["joint: local is [1]", "by pair of names"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local=5, steps=2), ["joint: local is 5"]),
    (lambda: plans.joint({"a": 3}, local=[([1], [2], 3)], steps=2), ["joint: local is"]),
    (lambda: plans.dense(2**31), ["dense: 2147483648 tokens", "2^31"]),
    (lambda: plans.groups([2**31, 3]), ["groups: 2147483651 tokens", "2^31"]),
    (lambda: plans.joint({"a": 2**30, "b": 2**30}), ["joint: 2147483648 tokens", "2^31"]),
    (lambda: plans.joint({}), ["joint: modalities is {}"]),
    (lambda: plans.joint(5), ["joint: modalities is 5"]),
    (lambda: plans.joint({"a": 0}), ["joint: the length of 'a' is 0"]),
    (lambda: plans.joint({1: 4}), ["joint: modalities is {1: 4}"]),
    (lambda: plans.joint({"a": plans.dense(3, 4)}), ["joint: 'a' is", "as many keys as queries"]),
    (lambda: plans.joint({"a": 3}, {"b": ()}), ["joint: sees is {'b': ()}", "names being a"]),
    (lambda: plans.joint({"a": 3, "b": 2}, {"a": "b"}), ["joint: sees is {'a': 'b'}", "a list of names"]),
    (lambda: plans.joint({"a": 3, "b": 2}, {"a": ["c"]}), ["joint: sees", "names being a, b"]),
    (lambda: plans.joint({"a": 3, "b": 2}, steps=2), ["joint: steps is 2 and local is empty"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local={("a", "b"): 1}), ["joint: steps is None"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local={("a", "b"): 1}, steps=3), ["'b' has 2 tokens", "1 to 2"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local={("a", "c"): 1}, steps=2), ["joint: local is"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local={"a": 1}, steps=2), ["joint: local is"]),
    (lambda: plans.joint({"a": 3, "b": 2}, local={("a", "b"): -1}, steps=2), ["window of ('a', 'b') is -1"]),
    (
        lambda: plans.joint({"a": 3, "b": 2}, local={("a", "b"): 1, ("b", "a"): 2}, steps=2),
        ["('a', 'b') twice"],
    ),
    (
        lambda: plans.joint({"a": 3, "b": 2}, {"a": (), "b": ()}, local={("a", "b"): 1}, steps=2),
        ["do not see each other"],
    ),
    (lambda: plans.joint({"a": LOCAL}, local={("a", "a"): 1}, steps=2), ["'a' has a plan"]),
    (lambda: plans.joint({"a": TILED, "b": 4}, local={("a", "b"): 1}, steps=2), ["has an order"]),
    (
        lambda: plans.joint(
            {
                "a": plans.per_head([LOCAL, FRAMES]),
                "b": plans.per_head([LOCAL, FRAMES, LOCAL]),
            }
        ),
        ["joint: modalities are for [2, 3] heads"],
    ),
    (lambda: plans.per_head([]), ["per_head: plans is []"]),
    (lambda: plans.per_head(LOCAL), ["per_head: plans is TilePlan"]),
    (lambda: plans.per_head([LOCAL, plans.local(13, 3)]), ["per_head: plan 1", "equal lengths"]),
    (lambda: plans.per_head([plans.per_head([LOCAL, FRAMES]), LOCAL]), ["plan 0", "for one head"]),
    (lambda: plans.per_head([TILED, plans.local(24, 3)]), ["per_head", "different orders"]),
    (lambda: plans.union([]), ["union: plans is []"]),
    (lambda: plans.union([TILED, plans.local(24, 3)]), ["union", "different orders"]),
    (
        lambda: plans.union([plans.per_head([LOCAL, FRAMES]), plans.per_head([LOCAL, FRAMES, FRAMES])]),
        ["union: plans are for [2, 3] heads"],
    ),
    (lambda: plans.from_mask(torch.ones(3, 3)), ["from_mask: mask is", "bool"]),
    (lambda: plans.from_mask(torch.zeros(3, 3, dtype=torch.bool)[None, None, None]), ["from_mask: mask is"]),
    (
        lambda: plans.from_mask(torch.eye(4).bool().reshape(4, 1, 2, 2)),
        ["from_mask: mask is for 4 samples", "[from_mask(m, ...) for m in mask]", "sample by sample"],
    ),
    (lambda: plans.from_blocks(torch.eye(3), [1, 2, 3]), ["from_blocks: mask is a torch.float32", "[Tq, Tk]"]),
    (lambda: plans.from_blocks(torch.eye(3).bool(), [1, 2]), ["from_blocks: q_lengths is [1, 2]", "3 ints"]),
    (lambda: plans.from_blocks(torch.eye(3).bool(), [1, 2, 0]), ["from_blocks: q_lengths", "1 or more"]),
    (lambda: plans.from_blocks(torch.eye(3).bool(), 64), ["from_blocks: q_lengths is 64"]),
    (lambda: plans.from_blocks(torch.ones(2, 3).bool(), [1, 2]), ["from_blocks: k_lengths is None", "3 ints"]),
    (
        lambda: plans.from_blocks(torch.eye(4).bool().reshape(4, 1, 2, 2), [1, 2]),
        ["from_blocks: mask is for 4 samples", "[from_blocks(m, ...) for m in mask]"],
    ),
    (lambda: plans.causal(4, k_length=0), ["causal: k_length is 0"]),
    (lambda: plans.local(4, 2, k_length=True), ["local: k_length is True"]),
    (lambda: plans.causal(4, k_length=2**31), ["causal: 2147483648 tokens"]),
    (lambda: plans.from_mask(torch.ones(3, 3, dtype=torch.bool), 0), ["from_mask: q_tiles is 0"]),
    (lambda: plans.from_mask(torch.ones(3, 3, dtype=torch.bool), [2, 2]), ["q_tiles add up to 4", "of 3 in all"]),
    (lambda: plans.from_mask(torch.ones(3, 3, dtype=torch.bool), 2, [3, 0]), ["k_tiles is [3, 0]"]),
]  # fmt: skip


@pytest.mark.parametrize("call, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(call, words):
    check_refused(call, ValueError, words)


def test_bad_kinds():
    check_refused(lambda: plans.block_causal(3, 4, clean=1), TypeError, ["block_causal: clean is 1"])
    check_refused(lambda: plans.local(12, 3, causal=None), TypeError, ["local: causal is None"])
    check_refused(lambda: plans.per_head([LOCAL, 3]), TypeError, ["per_head: plan 1 is a int"])
    check_refused(
        lambda: plans.from_block_mask(LOCAL), TypeError, ["block_mask is a TilePlan", "BlockMask"]
    )

    def lengths(b, h, q, k):
        return k < 40 + 20 * b

    other = create_block_mask(lengths, 2, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    check_refused(lambda: plans.from_block_mask(other), ValueError, ["2 samples with different masks"])
