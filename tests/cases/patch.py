"""The cases of patches: images and what is predicted for them, with a level for every patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pydiffuse._core.grids import PatchSize, count_patches, patch_sizes
from tests.table import Case, Draws, Tolerance

TOLERANCE = {
    # float32 products of float32 coefficients, some of them quotients: a few roundings of 6e-8.
    torch.float32: Tolerance(1e-6, 1e-6),
    # The output's rounding alone, 2^-9 relative in the mean: accumulation is in float32 and better.
    torch.bfloat16: Tolerance(4e-3, 8e-3),
    torch.float16: Tolerance(5e-4, 1e-3),
}

SHAPES: dict[str, tuple[tuple[int, ...], PatchSize]] = {
    "image": ((2, 3, 10, 14), 2),
    "pixels": ((2, 2, 5, 7), 1),
    "oblong": ((3, 2, 9, 20), (3, 5)),
    "video": ((2, 3, 4, 6, 10), (2, 3, 5)),
    "frames": ((2, 2, 3, 4, 6), (1, 4, 6)),
    "sample": ((2, 3, 5, 7), None),
    "signal": ((2, 3, 30), (5,)),
    "tokens": ((2, 1, 7, 33), (1, 33)),
    "wide": ((1, 1, 2, 1200), (2, 600)),  # a patch wider than the kernels' tiles
    "empty": ((0, 3, 4, 4), 2),
    "hollow": ((2, 0, 4, 4), 2),  # images without elements still have patches
}


@dataclass
class Maker(Draws):
    """Draws a case's tensors, all for one shape and patch size."""

    shape: tuple[int, ...]
    patch_size: PatchSize = 2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    layout: Callable[[Tensor], Tensor] = lambda t: t

    def __post_init__(self) -> None:
        super().__post_init__()
        self.patches = count_patches(self.shape, patch_sizes("case", self.shape, self.patch_size))

    def image(self, dtype: torch.dtype | None = None) -> Tensor:
        t = self._randn(*self.shape)
        return self.layout(t.to(dtype or self.dtype).to(self.device))

    def wide(self) -> Tensor:
        """An image that stays float32 beside low-precision predictions."""
        return self.image(torch.float32 if self.dtype != torch.float64 else None)

    def table(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        t = torch.rand(self.shape[0], self.patches, generator=self.generator)
        return (low + (high - low) * t).to(self.device)

    def level(self) -> Tensor:
        """Away from 0 and 1, where some kinds of prediction say nothing."""
        return self.table(0.1, 0.9)

    def mask(self) -> Tensor:
        return self.table() > 0.3

    def per_sample(self, low: float, high: float) -> Tensor:
        t = torch.rand(self.shape[0], generator=self.generator)
        return (low + (high - low) * t).to(self.device)


def _step(name: str, reads: int, writes: int = 1, **options: Any) -> Case:
    """A step; options are values, or take the maker and give one."""

    def make(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = (m.wide(), m.image(), m.level(), m.level(), m.patch_size)
        return args, {k: v(m) if callable(v) else v for k, v in options.items()}

    return Case("patch_step", name, make, reads, writes)


def _history(m: Maker) -> tuple[Tensor, Tensor]:
    return m.wide(), m.table(0.0, 0.3)


GUIDED = {"uncond": Maker.image, "scale": 3.0, "mask": Maker.mask}

CASES = [
    Case("noise_patches", "linear", lambda m: ((m.image(), m.level(), m.patch_size), {"noise": m.image()}), 2, 2),
    Case("noise_patches", "vp", lambda m: ((m.image(), m.level(), m.patch_size, "vp"), {"noise": m.image()}), 2, 2),
    Case("noise_patches", "trig", lambda m: ((m.image(), m.level(), m.patch_size, "trig"), {"noise": m.image()}), 2, 2),
    Case(
        "noise_patches",
        "to_eps",
        lambda m: ((m.image(), m.per_sample(0.1, 0.9), m.patch_size), {"noise": m.image(), "target": "eps"}),
        2,
        2,
    ),
    Case("noise_patches", "number", lambda m: ((m.image(), 0.3, m.patch_size), {"noise": m.image()}), 2, 2),
    _step("euler", 2),
    _step("guided", 3, **GUIDED),
    _step("scale_per_sample", 3, uncond=Maker.image, scale=lambda m: m.per_sample(1, 5)),
    _step("euler_trig", 2, path="trig", mask=Maker.mask),
    _step("ddim_vp", 3, method="ddim", path="vp", **GUIDED),
    _step("ddim_eps", 2, method="ddim", predicts="eps"),
    _step("ancestral", 3, method="ancestral", noise=Maker.image, eta=0.7, mask=Maker.mask),
    _step("ancestral_trig", 3, method="ancestral", path="trig", noise=Maker.image, predicts="eps"),
    _step("ancestral_vp", 3, method="ancestral", path="vp", noise=Maker.image),
    _step("first", 3, 2, method="multistep", **GUIDED),
    _step("multistep", 4, 2, method="multistep", history=_history, **GUIDED),
    _step("multistep_vp", 3, 2, method="multistep", history=_history, path="vp", predicts="x1"),
    *(
        Case(
            "convert",
            f"{source}_to_{target}",
            lambda m, s=source, t=target: ((m.wide(), m.image(), m.level(), s, t, m.patch_size), {}),
            2,
        )
        for source, target in (("v", "flow"), ("eps", "flow"), ("flow", "v"), ("x1", "eps"))
    ),
    Case(
        "convert",
        "trig",
        lambda m: ((m.image(), m.image(), m.level(), "v", "x1", m.patch_size), {"path": "trig"}),
        2,
    ),
    Case("patch_loss", "mse", lambda m: ((m.image(), m.image(), None, None, m.patch_size), {}), 2, 0),
    Case("patch_loss", "weighted", lambda m: ((m.image(), m.image(), None, m.table(), m.patch_size), {}), 2, 0),
    Case(
        "patch_loss",
        "difficulty",
        lambda m: ((m.image(), m.image(), m.table(-2, 1), m.table(), m.patch_size), {"nll": 0.5}),
        2,
        0,
    ),
    Case("select_patches", "some", lambda m: ((m.table(), m.patches // 3), {}), 0, 0),
    Case("select_patches", "as_mask", lambda m: ((m.table(), m.patches // 3), {"as_mask": True}), 0, 0),
    Case(
        "dual_loop_t",
        "some",
        lambda m: ((m.table(), m.patches // 3, m.level()), {"dt": 0.2, "steps": 3}),
        0,
        0,
    ),
    Case("next_t", "uniform", lambda m: ((m.level(),), {"dt": 0.2}), 0, 0),
    Case(
        "next_t",
        "dual_loop",
        lambda m: ((m.level(), "dual_loop"), {"dt": 0.2, "mask": m.mask(), "index": 1, "steps": 3}),
        0,
        0,
    ),
    Case("next_t", "look_ahead", lambda m: ((m.level(), "look_ahead"), {"mask": m.mask()}), 0, 0),
    *(
        Case("sample_t", kind, lambda m, k=kind: ((m.shape[0], m.patches, k), {"generator": m.generator}), 0, 0)
        for kind in ("uniform", "logit_normal", "mode", "ltg", "nondecreasing")
    ),
]  # fmt: skip
MIXES = [case for case in CASES if case.op in ("noise_patches", "patch_step", "convert")]
DIFFERENTIABLE = [*MIXES, *(case for case in CASES if case.op == "patch_loss")]


def takes_gradient(case: Case, t: Tensor) -> bool:
    """Images do, tables of levels do not; the loss's tables do."""
    return t.is_floating_point() and (t.dim() >= 3 or case.op == "patch_loss")


def with_gradients(case: Case, given: Any) -> Any:
    def copy(t: Any) -> Any:
        return t.detach().requires_grad_(takes_gradient(case, t)) if isinstance(t, Tensor) else t

    return tree_map(copy, given)
