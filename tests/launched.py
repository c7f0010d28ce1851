"""Compiles what the public API launches on a GPU, with Triton's own specialisation, where there is none.

    python -m tests.launched [--capability 90] [--every] [--json PATH] [stem ...]

A stand-in driver names the target. Every case of the table is called, forward and backward; instead of
launching, `JITFunction.warmup` binds the call's own arguments, as a launch does (it specialises 1 and
multiples of 16, tuples entry by entry), and compiles to machine code. Nothing runs: outputs keep what they
are made with, so this says nothing of values. Without --every a stem's cases share a few sizes and dtypes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

STEMS = ("guidance", "scan", "conv", "attention", "patch", "adaln", "routing")
# Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, 16.2).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class StandIn:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Build(NamedTuple):
    kernel: str
    of: str  # the case that was first to launch it
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


class Launches:
    """Stands where kernels are launched; keeps what was compiled, by its hash."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[str, str, Any]] = {}
        self.launched = 0
        self.case = ""

    def run(self, launches: Any, like: Any) -> None:
        for each in launches:
            self.launched += 1
            kernel = each.kernel.warmup(
                *each.args, grid=(each.programs,), **each.constants, **each.options
            )
            self.built.setdefault(kernel.hash, (each.kernel.fn.__name__, self.case, kernel))

    def builds(self) -> Iterator[Build]:
        for name, case, kernel in self.built.values():
            registers, stack = resources(kernel)
            spilled = spills(kernel) if stack else 0  # some functions of math.h have a stack, too
            yield Build(name, case, registers, spilled, kernel.metadata.shared)


BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


def resources(kernel: Any) -> tuple[int, int]:
    """Registers, and bytes of a thread's stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", file.name]
        told = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return int(used["REG"]), int(used["STACK"])


def spills(kernel: Any) -> int:
    """Bytes, loads and stores, as ptxas tells when it compiles once more."""
    target = re.search(r"[.]target (sm_\w+)", kernel.asm["ptx"])
    assert target
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        for ptxas in sorted(BINARIES.glob("ptxas*")):  # which of them Triton takes depends on its version
            command = [ptxas, "-v", "--gpu-name", target[1], ptx, "-o", f"{folder}/out"]
            done = subprocess.run(command, text=True, capture_output=True)
            if not done.returncode:
                break
        else:
            raise AssertionError(done.stdout + done.stderr)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stdout + done.stderr)))


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[Launches]:
    """Within it `use_backend("triton")` takes CPU tensors and compiles for a GPU of this capability."""
    driver.set_active(StandIn(capability))
    from pydiffuse._core import dispatch
    from pydiffuse._core.schemas import STEMS as STEM_OF
    from pydiffuse.kernels import common

    assert not common.INTERPRETED, "unset TRITON_INTERPRET"
    dispatch._interpreted = lambda: True  # as in the interpreter, CPU tensors pass
    for name, stem in STEM_OF.items():
        dispatch._libraries["pydiffuse_triton"].impl(name, dispatch._launcher(name, stem), "CPU")
    launches = Launches()
    common.compiled_for = capability
    for path in sorted(Path(common.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"pydiffuse.kernels.{path.stem}")
        if hasattr(module, "run"):
            module.run = launches.run  # type: ignore[attr-defined]
    yield launches


def made(stem: str, every: bool) -> Iterator[tuple[str, Any, Any, Callable[[Any, Any], bool]]]:
    """(label, case, arguments, which tensors want a gradient) of every case of a stem."""
    cases = importlib.import_module(f"tests.cases.{stem}")
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    wants: Callable[[Any, Any], bool] = lambda case, t: True  # noqa: E731
    if stem == "guidance":
        few = [((3, 5000), f32), ((2, 8192), bf16)]
        sizes = [(s, d) for s in ((3, 5000), (2, 7), (1, 65536)) for d in (f32, bf16, f16)]
        makers = [cases.Maker(s, d) for s, d in (sizes if every else few)]
    elif stem in ("scan", "conv"):
        from tests.cases.scan import ScanMaker, Size

        few = [(Size(2, 96, 200, 16), f32, "bld")]
        sizes = [
            (s, d, layout)
            for s in (Size(2, 96, 200, 16), Size(1, 21, 37, 5), Size(2, 66, 130, 40))
            for d in (f32, bf16)
            for layout in ("bdl", "bld")
        ]
        makers = [ScanMaker(s, d, layout=layout) for s, d, layout in (sizes if every else few)]
    elif stem == "attention":
        few = [(64, bf16), (128, bf16), (64, f32)]
        sizes = [(D, d) for D in (8, 40, 64, 96, 128, 256) for d in (f32, bf16, f16)]
        wants = lambda case, t: t.dim() == 4  # noqa: E731
        makers = [cases.Maker(cases.Size(2, 4, 2, D), d) for D, d in (sizes if every else few)]
    elif stem == "patch":
        wants = cases.takes_gradient
        few = [("image", bf16)]
        sizes = [(s, d) for s in cases.SHAPES for d in (f32, bf16) if s != "empty"]
        makers = [cases.Maker(*cases.SHAPES[s], d) for s, d in (sizes if every else few)]
    elif stem == "adaln":
        few = [((2, 40, 1152), bf16)]
        sizes = [((2, 40, D), d) for D in (100, 1152, 5120, 8192) for d in (f32, bf16, f16)]
        makers = [cases.Maker(s, d) for s, d in (sizes if every else few)]
    else:
        few = [((2, 64, 128), bf16)]
        sizes = [((2, 64, D), d) for D in (20, 128, 1152) for d in (f32, bf16)]
        makers = [cases.Maker(s, d) for s, d in (sizes if every else few)]
    for maker in makers:
        for case in [*cases.CASES, *(getattr(cases, "STEPS", []) if stem == "scan" else [])]:
            label = (
                f"{case.id} {getattr(maker, 'size', None) or getattr(maker, 'shape', '')} {maker.dtype}"
            )
            yield label, case, case.make(maker), wants


# 20 batches and lengths: 1, multiples of 16 and others, above and below what a kernel takes at once.
LENGTHS = (1, 2, 3, 16, 17, 31, 48, 64, 65, 100, 127, 128, 160, 200, 255, 256, 300, 512, 515, 1024)
BATCHES = (1, 2, 16, 3, 5)


def sized(stem: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One call of every family, forward and backward, at 20 sizes."""
    import pydiffuse as pd
    from pydiffuse import plans

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    for i, L in enumerate(LENGTHS):
        B = BATCHES[i % len(BATCHES)]
        calls: dict[str, Callable[[], Any]] = {
            "guidance": lambda B=B, L=L: pd.tcfg(randn(B, 16 * L), randn(B, 16 * L), 7.5),
            "scan": lambda B=B, L=L: pd.selective_scan(
                *(randn(B, L, 32) for _ in range(2)), -torch.rand(32, 16), *(randn(B, 16, L).mT for _ in range(2)),
                layout="bld",
            ),
            "conv": lambda B=B, L=L: pd.causal_conv1d(randn(B, L, 32), randn(32, 4), layout="bld"),
            "attention": lambda B=B, L=L: pd.tile_attention(
                *(randn(B, 1 + L % 3, 4 * L, 64) for _ in range(3)), plans.frames(4, L, 1)
            ),
            "patch": lambda B=B, L=L: pd.noise_patches(randn(B, 4, 2 * L, 4), torch.rand(B, 2 * L), 2)[0],
            "adaln": lambda B=B, L=L: pd.modulate(
                randn(B, L, 256), randn(B, 2, 256), torch.zeros(B, L, dtype=torch.int64)
            ),
            "routing": lambda B=B, L=L: pd.gather_tokens(randn(B, L, 64), torch.zeros(B, 1, dtype=torch.int64)),
        }  # fmt: skip
        yield f"{stem} B={B} L={L}", calls[stem]


def compile_sizes(stem: str, capability: int) -> tuple[list[Build], int]:
    """What the same call launches at 20 sizes."""
    with compiling(capability) as launches:
        import pydiffuse

        for label, call in sized(stem):
            launches.case = label
            with pydiffuse.use_backend("triton"):
                call().sum().backward()
    return list(launches.builds()), launches.launched


def compile_stem(stem: str, capability: int, every: bool) -> tuple[list[Build], int]:
    """What a stem's cases launch, compiled, and how many launches there were."""
    with compiling(capability) as launches:
        from tests.helpers import values_and_gradients

        for label, case, given, wants in made(stem, every):
            launches.case = label
            step = case.op == "selective_state_update"  # takes no gradient
            with torch.no_grad() if step else contextlib.nullcontext():
                values_and_gradients(case, given, "triton", wants=functools.partial(wants, case))
    return list(launches.builds()), launches.launched


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.launched", description=__doc__)
    parser.add_argument("stems", nargs="*", default=STEMS)
    parser.add_argument("--capability", type=int, default=90, choices=SHARED)
    parser.add_argument("--every", action="store_true", help="every size and dtype, not a few")
    parser.add_argument("--sizes", action="store_true", help="one call a stem, at 20 sizes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record = []
    for stem in args.stems:
        if args.sizes:
            builds, launched = compile_sizes(stem, args.capability)
        else:
            builds, launched = compile_stem(stem, args.capability, args.every)
        record.append({"stem": stem, "launched": launched, "builds": [b._asdict() for b in builds]})
        print(f"{stem}: {launched} launches, {len(builds)} kernels compiled", file=sys.stderr)
    told = {"triton": triton.__version__, "capability": args.capability, "stems": record}
    text = json.dumps(told)
    args.json.write_text(text + "\n") if args.json else print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
