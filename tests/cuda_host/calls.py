"""A few calls that launch every CUDA kernel, and all that they give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import pydiffuse
from tests.cases import conv, scan
from tests.cases.guidance import Maker
from tests.cases.scan import ScanMaker, Size
from tests.helpers import values_and_gradients

DTYPES = (torch.float32, torch.bfloat16)
CHUNKS = (2, 13 * 4096 - 8)  # 13 chunks a sample, the last one short
SCANS = [c for c in scan.CASES if c.name in ("mamba", "sequences", "constants")]


def guidance() -> Iterator[list[Tensor]]:
    for dtype in DTYPES:
        t = Maker((2, 1003), dtype)
        for k in range(1, 8):
            yield [*pydiffuse.gram(t.preds(k), sums=True)]
            yield [pydiffuse.combine(t.preds(k), torch.linspace(-1, 1, k))]
        for k in (2, 3, 4):  # in one launch, a block for each sample, or a cooperative one
            for shape in ((3, 4, 9, 8), CHUNKS):
                preds = Maker(shape, dtype).preds(k)
                inputs = [p.requires_grad_() for p in preds]
                out = pydiffuse.tcfg(inputs[:-1], inputs[-1], [2.0] * (k - 1), rescale=0.3)
                yield [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


def scans(states: int) -> Iterator[list[Tensor]]:
    size = Size(2, 69, 131, states)  # three chunks of steps, two blocks of channels
    for i, case in enumerate([*SCANS, conv.CASES[1]]):
        given = case.make(ScanMaker(size, layout=("bdl", "bld")[i % 2]))
        results, gradients = values_and_gradients(case, given, "cuda")
        yield [*results, *gradients]


def everything() -> list[Tensor]:
    with pydiffuse.use_backend("cuda"):
        found = [*guidance(), *scans(5), *scans(16)]
    return [t.detach() for tensors in found for t in tensors]
