"""Builds the Hub kernel for this machine and times a layer of diffusers before and after `kernelize`.

pip install kernels; python examples/hub_kernel.py --tokens 4096 --width 1536
"""

from __future__ import annotations

import argparse
import runpy
import timeit
from pathlib import Path

import torch
from diffusers.models.normalization import AdaLayerNormZero

import kernels

ROOT = Path(__file__).resolve().parent.parent
NAME = "AdaLayerNormZero"


def milliseconds(model: torch.nn.Module, x: torch.Tensor, emb: torch.Tensor, runs: int) -> list[float]:
    """Forward, forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            model(x, emb=emb)

    def both() -> None:
        model(x, emb=emb)[0].sum().backward()

    return [1e3 * min(timeit.repeat(call, number=1, repeat=runs)) for call in (forward, both)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("tokens", 4096), ("width", 1536), ("runs", 10)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--kernel", type=Path, default=ROOT / "build" / "hub")
    args = parser.parse_args(argv)
    if not args.kernel.exists():
        print("building, in about a minute")
        runpy.run_path(str(ROOT / "torch-ext" / "build.py"))["build"](args.kernel)
    torch.manual_seed(0)
    model = AdaLayerNormZero(args.width)
    x, emb = torch.randn(2, args.tokens, args.width, requires_grad=True), torch.randn(2, args.width)
    expected, before = model(x, emb=emb)[0], milliseconds(model, x, emb, args.runs)
    kernels.replace_kernel_forward_from_hub(AdaLayerNormZero, NAME)
    mapping = {NAME: {"cpu": kernels.LocalLayerRepository(args.kernel, layer_name=NAME)}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    found, after = model(x, emb=emb)[0], milliseconds(model, x, emb, args.runs)
    for name, old, new in zip(("forward", "forward and backward"), before, after, strict=True):
        print(f"{name:22} {old:8.1f} ms before {new:8.1f} ms after")
    print(f"apart by {(found - expected).abs().max():.1e} at most")


if __name__ == "__main__":
    main()
