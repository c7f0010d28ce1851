"""The ops over several ranks: values and gradients are those of one process, bytes those of the formula."""

from __future__ import annotations

import pytest
import torch

from pydiffuse import distributed
from tests.cases import ranks
from tests.helpers import check_refused
from tests.ranks import Processes


@pytest.fixture(scope="module")
def processes():
    found = Processes()
    yield found
    found.stop()


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
