"""DTensors in the guidance functions: what torch.distributed.tensor spreads over a mesh goes in and comes out.

torch's rules of sharding (`register_sharding`) place one op; a rule is a Gram matrix, a sum over the ranks and a
combination, so the functions themselves look at the placements: samples that are sharded are guided where they
are, elements that are sharded as `pydiffuse.distributed` does it, with the mesh's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from pydiffuse import guidance as on_one_rank
from pydiffuse._core.checks import describe
from pydiffuse.distributed import guidance
from pydiffuse.guidance import apply


class Spread:
    """How the tensors of a call lie on a mesh: as the first of them, sharded by samples, elements, or not."""

    def __init__(self, op: str, tensors: Sequence[Any]) -> None:
        first = next(t for t in tensors if isinstance(t, DTensor))
        self.op, self.mesh, self.shape, self.stride = op, first.device_mesh, first.shape, first.stride()
        # Sums that are not yet taken are taken first.
        self.placements: list[Placement] = [
            p if isinstance(p, Shard) else Replicate() for p in first.placements
        ]
        split = [i for i, p in enumerate(self.placements) if isinstance(p, Shard) and p.dim > 0]
        if len(split) > 1:
            raise ValueError(
                f"{op}: elements are sharded along {len(split)} dimensions of the mesh, {self.placements};"
                " accepted: one"
            )
        self.group = self.mesh.get_group(split[0]) if split else None
        self.of_samples = [
            p if isinstance(p, Shard) and p.dim == 0 else Replicate() for p in self.placements
        ]

    def local(self, t: Any) -> Any:
        """This rank's part of a prediction."""
        if t is None:
            return None
        if not isinstance(t, DTensor) or t.device_mesh != self.mesh or t.shape != self.shape:
            raise ValueError(
                f"{self.op}: {describe(t)} beside a DTensor {tuple(self.shape)}; accepted: DTensors of one shape"
                " on one mesh"
            )
        if list(t.placements) != self.placements:
            t = t.redistribute(self.mesh, self.placements)
        return t.to_local().contiguous()

    def value(self, v: Any) -> Any:
        """A number, or this rank's part of a value for each sample."""
        if not isinstance(v, Tensor) or (v.dim() == 0 and not isinstance(v, DTensor)):
            return v
        if not isinstance(v, DTensor):
            v = DTensor.from_local(v, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return v.redistribute(self.mesh, self.of_samples).to_local()

    def whole(self, t: Tensor) -> DTensor:
        """A result like the predictions."""
        return DTensor.from_local(
            t, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def per_sample(self, t: Tensor) -> DTensor:
        """A result (B, ...) that every rank of a sample has."""
        shape = torch.Size((self.shape[0], *t.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            t, self.mesh, self.of_samples, run_check=False, shape=shape, stride=stride
        )

    def over(self, here: Any, there: Any) -> tuple[Any, dict[str, Any]]:
        """The function for parts of samples, or the one for whole ones, and what it takes beside."""
        return (here, {}) if self.group is None else (there, {"group": self.group})

    def results(self, found: Any, out: Any) -> Any:
        each = found if isinstance(found, tuple) else (found,)
        if out is not None:
            outs = (out,) if isinstance(out, Tensor) else tuple(out)
            for o, r in zip(outs, each, strict=True):
                self.local(o).copy_(r)
            return out
        wholes = tuple(map(self.whole, each))
        return wholes if isinstance(found, tuple) else wholes[0]


def value_of(
    rule: str, preds: Sequence[Tensor], values: Sequence[Any], original: bool, rescale: Any, out: Any, emit: int
) -> Any:  # fmt: skip
    """`pydiffuse.guidance.apply.value_of` of DTensors."""
    on = Spread(rule, preds)
    given = tuple(map(on.local, preds)), tuple(map(on.value, values)), original, on.value(rescale), None
    if on.group is None:
        return on.results(apply.value_of(rule, *given, emit), out)
    return on.results(guidance.value_over(rule, *given, on.group, emit), out)


def guide(
    preds: Sequence[Tensor], rule: str, *, x: Any, history: Any, noise: Any, out: Any, **options: Any
) -> Any:
    """`pydiffuse.guide` of DTensors."""
    on = Spread("guide", [*preds, x])
    options = {
        n: tuple(map(on.value, v)) if isinstance(v, tuple | list) else on.value(v)
        for n, v in options.items()
    }
    call, more = on.over(on_one_rank.guide, guidance.guide)
    found = call(
        [on.local(p) for p in preds], rule, x=on.local(x), history=on.local(history), noise=on.local(noise),
        **options, **more,
    )  # fmt: skip
    return on.results(found, out)


def tcfg(
    conds: Sequence[Tensor], uncond: Tensor, scale: Any, original: bool, rescale: Any, out: Any
) -> Any:
    """`pydiffuse.tcfg` of several conditions that are DTensors."""
    on = Spread("tcfg", [*conds, uncond])
    scale = [on.value(v) for v in scale] if isinstance(scale, list | tuple) else on.value(scale)
    call, options = on.over(on_one_rank.tcfg, guidance.tcfg)
    given = [on.local(c) for c in conds], on.local(uncond), scale
    return on.results(call(*given, original=original, rescale=on.value(rescale), **options), out)


def superpose(
    preds: Sequence[Tensor], log_density: Any, step: Any, *, noise: Any, uncond: Any, scale: Any, **options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pydiffuse.superpose` of DTensors: the new log-densities are sharded by samples as the predictions are."""
    on = Spread("superpose", preds)
    if isinstance(log_density, Tensor) and log_density.dim() == 2:
        log_density = on.value(log_density)
    call, more = on.over(on_one_rank.superpose, guidance.superpose)
    mixed, new = call(
        [on.local(p) for p in preds], log_density, on.value(step), noise=on.local(noise),
        uncond=on.local(uncond), scale=on.value(scale), **options, **more,
    )  # fmt: skip
    return on.whole(mixed), on.per_sample(new)


def gram(preds: Sequence[Tensor], sums: bool) -> Any:
    """`pydiffuse.gram` of DTensors: (B, k, k), sharded by samples as they are."""
    on = Spread("gram", preds)
    call, options = on.over(on_one_rank.gram, guidance.gram)
    found = call([on.local(p) for p in preds], sums=sums, **options)
    return tuple(map(on.per_sample, found)) if isinstance(found, tuple) else on.per_sample(found)


def combine(preds: Sequence[Tensor], coefficients: Any, out: Any) -> Any:
    """`pydiffuse.combine` of DTensors."""
    on = Spread("combine", preds)
    if isinstance(coefficients, Tensor) and coefficients.dim() == 2:
        coefficients = on.value(coefficients)
    return on.results(on_one_rank.combine([on.local(p) for p in preds], coefficients), out)
