"""Microbenchmarks for pytest-benchmark: every case of the table on a latent of one image.

python -m pytest benchmarks/micro.py --benchmark-only [--benchmark-autosave, --benchmark-compare]
"""

from __future__ import annotations

import pytest
import torch

import pydiffuse
from tests.cases.guidance import CASES, Maker

SHAPE = (4, 4, 64, 64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_call(benchmark, case, backend):
    args, kwargs = case.make(Maker(SHAPE, torch.float32))
    benchmark.group = case.id
    with pydiffuse.use_backend(backend), torch.inference_mode():
        benchmark(getattr(pydiffuse, case.op), *args, **kwargs)
