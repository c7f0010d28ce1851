"""Tiles of the attention kernels on this machine's GPU: milliseconds and TFLOP/s of every candidate.

    python -m benchmarks.attention_tiles [--out PATH]

kernels/attention_tile.py takes its tables from what this prints. Candidates are compiled side by side and
then timed one by one, on 8 frames of 1,200 tokens with 2 references (53% of the pairs), 24 heads, bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from pydiffuse.kernels import attention, attention_backward
from pydiffuse.kernels.attention_tile import Arguments, Tile
from pydiffuse.kernels.common import Launch
from pydiffuse.plans import frames

HEADS, PLAN = 24, (8, 1200, 2)
HEAD_DIMS = (64, 96, 128)
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of head_dim for each pair of query and key
TILES = {  # rows, step, warps, stages
    "forward": (
        (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 4),
        (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 4),
    ),
    "dq": (
        (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (64, 128, 8, 2), (128, 32, 8, 3),
        (64, 32, 4, 3),
    ),
    "dkv": (
        (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 3),
        (64, 64, 4, 3), (128, 64, 8, 1),
    ),
}  # fmt: skip


class Candidate(NamedTuple):
    kernel: str
    head_dim: int
    tile: tuple[int, int, int, int]


@functools.cache
def tensors(head_dim: int) -> tuple[Any, ...]:
    plan = frames(*PLAN)
    S = plan.q_length
    q, k, v, dout = (
        torch.randn(1, HEADS, S, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    lse = torch.full((1, HEADS, S), 8.0, device="cuda")
    return Arguments(q, k, v, None, head_dim**-0.5, plan.to("cuda").tensors), dout, lse


def launch_of(candidate: Candidate) -> Launch:
    a, dout, lse = tensors(candidate.head_dim)
    tile = Tile(*candidate.tile)
    out, dk, dv = (torch.empty_like(t) for t in (a.q, a.k, a.v))
    if candidate.kernel == "forward":
        with mock.patch.object(attention, "tile_of", lambda name, a: tile):
            return attention.forward_launches(out, torch.empty_like(lse), a)[0]
    with mock.patch.object(attention_backward, "tile_of", lambda name, a: tile):
        launches = attention_backward.backward_launches(
            torch.empty_like(a.q), dk, dv, dout, None, out, lse, a
        )
    return next(each for each in launches if each.kernel.fn.__name__ == f"{candidate.kernel}_kernel")


def compiled(candidate: Candidate) -> str | None:
    """Into Triton's cache; what went wrong, if anything."""
    try:
        each = launch_of(candidate)
        each.kernel.warmup(*each.args, grid=(each.programs,), **each.constants, **each.options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def median_ms(call: Any) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_tiles", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    args = parser.parse_args()
    candidates = [
        Candidate(kernel, D, tile) for kernel in TILES for D in HEAD_DIMS for tile in TILES[kernel]
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn) as pool:
        refused = dict(zip(candidates, pool.map(compiled, candidates), strict=True))
    density, S = frames(*PLAN).density, PLAN[0] * PLAN[1]
    rows = []
    for c in candidates:
        if refused[c]:
            print(f"{c}: {refused[c]}")
            continue
        each = launch_of(c)

        def call(each: Launch = each) -> None:
            each.kernel[(each.programs,)](*each.args, **each.constants, **each.options)

        ms = median_ms(call)
        flops = 2 * PRODUCTS[c.kernel] * c.head_dim * HEADS * S * S * density
        rows.append({**c._asdict(), "ms": ms, "tflops": flops / ms / 1e9})
    for kernel in TILES:
        for D in HEAD_DIMS:
            mine = [r for r in rows if r["kernel"] == kernel and r["head_dim"] == D]
            for r in sorted(mine, key=lambda r: r["ms"]):
                print(f"{kernel:8} {D:4} {r['tile']!s:18} {r['ms']:8.3f} ms {r['tflops']:6.0f} TFLOP/s")
    for D in HEAD_DIMS:
        a, *_ = tensors(D)
        ms = median_ms(functools.partial(F.scaled_dot_product_attention, a.q, a.k, a.v))
        flops = 4 * D * HEADS * S * S
        print(f"SDPA     {D:4} {'dense':18} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s")
        rows.append({"kernel": "SDPA", "head_dim": D, "ms": ms, "tflops": flops / ms / 1e9})
    if args.out:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.write_text(
            json.dumps({"machine": machine, "density": density, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
