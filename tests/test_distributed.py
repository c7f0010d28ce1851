"""The ops over several ranks: values and gradients are those of one process, bytes those of the formula."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydiffuse import distributed, plans
from pydiffuse.distributed import scale, slices
from tests.cases import ranks
from tests.helpers import check_refused
from tests.ranks import Processes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def processes():
    found = Processes()
    yield found
    found.stop()


def test_the_example_trains_as_one_process(processes):
    one, *_ = processes.run(1, ranks.train, 6)
    assert one[-1] < one[0]
    for size in (2, 4):
        for losses in processes.run(size, ranks.train, 6):
            torch.testing.assert_close(losses, one, rtol=2e-5, atol=0)
    for losses in processes.run(2, ranks.train, 6, True):
        torch.testing.assert_close(losses, one, rtol=2e-5, atol=0)


def test_the_example_goes_on_after_a_rank_was_lost(processes, tmp_path):
    """torchrun starts the ranks again, which go on from the last checkpoint: the same losses."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone",
        ROOT / "examples" / "distributed" / "train.py", "--steps=6", "--every=2", "--fail-at=5", "--folder", tmp_path,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = next(line for line in done.stdout.splitlines() if "losses:" in line).split()[3:]
    whole, _ = processes.run(2, ranks.train, 6)
    assert losses == [f"{loss:.6f}" for loss in whole[4:]]


@pytest.mark.parametrize("size", [2, 4])
def test_guidance(processes, size):
    processes.run(size, ranks.every_guidance_case)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_guidance_in_detail(processes, size):
    if size > 1:
        processes.run(size, ranks.guidance_bytes)
    processes.run(size, ranks.one_element_on_one_rank)
    processes.run(size, ranks.with_out)


@pytest.mark.parametrize("size", [2, 4])
def test_faults(processes, size):
    processes.run(size, ranks.faults)
    processes.run(size, ranks.missing)


def test_errors_of_one_process():
    t = torch.randn(2, 8)
    check_refused(lambda: distributed.tcfg(t, t, 3.0), RuntimeError, ["tcfg", "init_process_group"])
    check_refused(lambda: distributed.set_timeout(0), ValueError, ["set_timeout", "0"])


@pytest.mark.parametrize("size", [2, 4])
def test_dtensors(processes, size):
    processes.run(size, ranks.dtensors)


def test_attention_over_a_mesh(processes):
    processes.run(4, ranks.attention_over_a_mesh)


@pytest.mark.parametrize("size", [2, 4])
def test_a_condition_for_each_rank(processes, size):
    processes.run(size, ranks.conditions)


def test_the_cost_model(processes, capsys):
    for size in (2, 4):
        processes.run(size, ranks.formulas)
    scale.main([1, 8, 64])
    text = capsys.readouterr().out
    assert "Computed, not measured" in text and all(name in text for name in scale.MODELS)
    for model in (scale.Video(), scale.Video(references=2)):
        times = [model.row(n, scale.H100).time for n in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True)  # more GPUs of a node are faster
        assert times[0] / times[3] <= 8


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "cases", ["conv_cases", "scan_cases", "inner_case", "attention_cases", "reorder_case", "arrival"]
)
def test_tokens(processes, size, cases):
    processes.run(size, getattr(ranks, cases))


@pytest.mark.parametrize(
    "plan",
    [
        plans.causal(100),
        plans.block_causal(5, 20),
        plans.frames(5, 20, 2),
        plans.local(100, 9),
        plans.per_head([plans.causal(100), plans.local(100, 30)]),
        plans.sliding_tile((10, 10), (5, 2), (5, 6)),
    ],
    ids=lambda plan: plan.name,
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_split_gives_equal_work(plan, ranks):
    each = distributed.split(plan, ranks)
    assert len(each) == ranks and sum(each) == 100 and min(each) > 0
    rows = slices.without_order(plan).to_dense().double().sum((0, 2))
    work = [part.sum().item() for part in rows.split(each)]
    assert max(work) <= rows.sum() / ranks + rows.max()


def test_parts_of_a_plan():
    """What is cut out of a plan is what it says, on the keys that are seen."""
    plan = plans.per_head([plans.causal(60), plans.local(60, 9)])
    dense = plan.to_dense()
    for queries in ((0, 60), (7, 31), (31, 60)):
        for keys in ((0, 60), (0, 5), (13, 44)):
            want = dense[:, slice(*queries), slice(*keys)]
            seen = want.any((0, 1))
            found = slices.part(plan, queries, keys)
            if found is None:
                assert not seen.any()
                continue
            which = torch.arange(keys[1] - keys[0]) if found.keys is None else found.keys
            assert torch.equal(which, seen.nonzero()[:, 0]) and found.number == len(which)
            assert torch.equal(found.plan.to_dense().expand(2, -1, -1), want[:, :, which])
    assert slices.part(plan, (0, 5), (5, 60)) is not None  # the window of the second head
    assert slices.part(plans.causal(60), (0, 5), (5, 60)) is None


def test_split_refuses(processes):
    check_refused(lambda: distributed.split(3, 2), TypeError, ["split", "plan", "TilePlan"])
    check_refused(lambda: distributed.split(plans.causal(8), 0), ValueError, ["split", "ranks", "0"])
    processes.run(2, ranks.token_errors)
