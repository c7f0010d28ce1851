"""The plan of a tile attention: which tiles of keys every tile of queries sees.

Queries and keys are cut into tiles with boundaries of any length (frames, sentences, cubes of a video).
A row of tiles keeps some tiles of keys: whole (full), or the elements that a mask of bits keeps. Heads
share one row of tiles or have their own. Where a plan has an `order`, tiles are of positions and position
p holds token order[p]; the kernels address tokens through it, nothing is gathered.

What kernels walk is derived once (pydiffuse.plans.tensors): full neighbours are one span of keys, long
tiles are blocks of at most BLOCK rows, heavy ones first; and the same from the keys' side, for the
backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pydiffuse._core.modes import compiling, real_tensors, torch_is_there
from pydiffuse._core.spans import PlanTensors, packed
from pydiffuse.plans import files, pictures
from pydiffuse.plans.arguments import check_eager, check_tokens
from pydiffuse.plans.rows import (
    FULL,
    Runs,
    Tiles,
    digest_of,
    row_of,
    runs_of,
    simplified,
    tiles_in,
    transposed,
)
from pydiffuse.plans.tensors import plan_arrays, plan_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRANSPOSED = ("transposed", True)
"""Among a plan's parameters: its queries and keys are swapped."""


@dataclass(frozen=True, repr=False)
class TilePlan:
    """Which query tiles see which key tiles. Equal and hashed by name and parameters.

    The constructors stand in `pydiffuse.plans`. The arrays belong to every user of the plan: read them,
    do not write to them.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...]
    """What beside the name tells plans apart, as (keyword, value) pairs."""
    q_bounds: np.ndarray = field(compare=False)
    """int32 [Tq + 1]: the boundaries of the query tiles."""
    k_bounds: np.ndarray = field(compare=False)
    runs: Runs = field(compare=False)
    """What each tile of queries sees."""
    walk: PlanTensors = field(compare=False)
    """What the kernels walk, as arrays, which need no torch."""
    _tensors: PlanTensors | None = field(default=None, compare=False)
    """The same on one device; None until torch is there."""
    _kin: dict[tuple[bool, torch.device | None], TilePlan] = field(default_factory=dict, compare=False)
    """This plan both ways round on every device it was asked for, by (transposed, device); None is the CPU."""

    # Plain values of what a call looks at: torch.compile takes them for constants, NumPy's for unknowns.
    q_length: int = field(init=False, compare=False)
    k_length: int = field(init=False, compare=False)
    heads: int = field(init=False, compare=False)
    """1 where all heads share the plan, else the number of heads it is for."""
    is_transposed: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("q_length", int(self.q_bounds[-1])),
            ("k_length", int(self.k_bounds[-1])),
            ("heads", self.runs.starts.shape[0]),
            ("is_transposed", TRANSPOSED in self.parameters),
        ):
            object.__setattr__(self, name, value)
        if self._tensors is None and torch_is_there():
            object.__setattr__(self, "_tensors", plan_tensors(self.walk))
        self._kin[self.is_transposed, self._place] = self

    @property
    def tensors(self) -> PlanTensors:
        """What the kernels walk, on one device."""
        if self._tensors is None:
            object.__setattr__(self, "_tensors", plan_tensors(self.walk))
        assert self._tensors is not None
        return self._tensors

    @property
    def device(self) -> torch.device:
        return self.tensors.spans.device

    @property
    def _place(self) -> torch.device | None:
        if self._tensors is None or self._tensors.spans.device.type == "cpu":
            return None
        return self._tensors.spans.device

    @property
    def order(self) -> Tensor | None:
        """int32 [S]: position p of the tiles holds token order[p]; None where they are the same."""
        return self.tensors.order

    def places(self) -> np.ndarray | None:
        """`order` as an array, on whichever device the plan is."""
        return self.walk.order

    @cached_property
    def rows(self) -> Tiles:
        """`runs` tile by tile: in proportion to the tiles that are kept."""
        return tiles_in(self.runs)

    @cached_property
    def packed_array(self) -> np.ndarray:
        """`walk` as one array."""
        return packed(self.walk)

    @cached_property
    def packed(self) -> Tensor:
        """What direct calls on the CPU take."""
        import torch

        with real_tensors():
            return torch.from_numpy(self.packed_array)

    def to(self, device: torch.device | str | int) -> TilePlan:
        """The same plan with its tensors on `device`: copied once, then the same object again."""
        import torch

        device = torch.device(device)
        if device.index is None and device.type != "cpu":
            device = torch.empty(0, device=device).device
        found = self._kin.get((self.is_transposed, None if device.type == "cpu" else device))
        if found is not None:
            return found
        # Dynamo cannot trace real_tensors(). What its graphs make is real; within inference mode it refuses
        # a plan that is elsewhere (torch 2.13).
        with nullcontext() if compiling() else real_tensors():
            moved = (None if t is None else t.to(device) for t in self.tensors)
            tensors = PlanTensors(*moved)  # type: ignore[arg-type]
        return TilePlan(
            self.name,
            self.parameters,
            self.q_bounds,
            self.k_bounds,
            self.runs,
            self.walk,
            tensors,
            self._kin,
        )

    def transpose(self) -> TilePlan:
        """Queries and keys swapped: who is seen by whom. plan.transpose().transpose() is plan."""
        if self._place is not None:
            return self.to("cpu").transpose().to(self._place)
        found = self._kin.get((not self.is_transposed, None))
        if found is None:
            parameters = tuple(p for p in self.parameters if p != TRANSPOSED)
            parameters += () if self.is_transposed else (TRANSPOSED,)
            runs = transposed(self.runs, len(self.k_bounds) - 1)
            walk = plan_arrays(runs, self.k_bounds, self.q_bounds, self.places())
            found = TilePlan(
                self.name, parameters, self.k_bounds, self.q_bounds, runs, walk, None, self._kin
            )
        return found

    @property
    def kept(self) -> np.ndarray:
        """int64 [P]: the pairs of a query and a key that count, for each head."""
        ones = np.array([b.sum() for b in self.runs.bits] + [0], np.int64)
        return self._pairs(ones)

    @property
    def computed(self) -> np.ndarray:
        """int64 [P]: the pairs in the kept tiles, for each head; what masks leave out is computed, too."""
        return self._pairs(np.array([b.size for b in self.runs.bits] + [0], np.int64))

    def _pairs(self, per_mask: np.ndarray) -> np.ndarray:
        """per_mask: int64 [masks + 1], what a tile with each mask adds; the last one is not looked at."""
        starts, begin, end, masks, _ = self.runs
        head, tile_q = row_of(starts)
        whole = np.diff(self.q_bounds)[tile_q].astype(np.int64) * (
            self.k_bounds[end] - self.k_bounds[begin]
        )
        # Integers as float64, which bincount adds up: exact below 2^53.
        pairs = np.bincount(head, np.where(masks == FULL, whole, per_mask[masks]), self.heads)
        return pairs.astype(np.int64)

    @property
    def density(self) -> float:
        """The share of query-key pairs that count, the mean over heads."""
        return float(self.kept.mean()) / (self.q_length * self.k_length)

    def to_dense(self) -> Tensor:
        """bool [P, queries, keys], over tokens: True where a query sees a key. Grows with the square of
        the length; for tests and pictures."""
        import torch

        return torch.from_numpy(self.dense_array())

    def dense_array(self) -> np.ndarray:
        """`to_dense` as an array, without torch."""
        dense = np.zeros((self.heads, self.q_length, self.k_length), bool)
        starts, begin, end, masks, bits = self.runs
        for p in range(self.heads):
            for t, (q0, q1) in enumerate(zip(self.q_bounds, self.q_bounds[1:], strict=False)):
                for i in range(starts[p, t], starts[p, t + 1]):
                    k0, k1 = self.k_bounds[begin[i]], self.k_bounds[end[i]]
                    dense[p, q0:q1, k0:k1] = True if masks[i] == FULL else bits[masks[i]]
        order = self.places()
        if order is not None:
            place = np.empty(self.q_length, np.int64)
            place[order] = np.arange(self.q_length)
            dense = dense[:, place][:, :, place]
        return dense

    @property
    def has_digest(self) -> bool:
        """No parameters describe the plan: its tiles' digest tells it apart."""
        return [key for key, _ in self.parameters] == ["digest"]

    def arrays(self) -> files.Arrays | None:
        """What there is to a plan that is no closed form; None for a closed form."""
        if self.name in FORMS:
            return None
        return files.Arrays(self.q_bounds, self.k_bounds, self.rows, self.places())

    def summary(self) -> str:
        """A few lines of text: tokens, tiles, density, the speed-up it allows, memory."""
        return pictures.summary(self)

    def picture(self, size: int = 512, head: int = 0) -> np.ndarray:
        """uint8 [h, w, 3], the longer side `size` pixels: queries down, keys to the right, by position.

        Dark: whole tiles; orange: elements that masks keep; light orange: those they leave out.
        """
        return pictures.picture(self, size, head)

    def save_picture(self, path: str | PathLike[str], size: int = 512, head: int = 0) -> None:
        """`picture` as a file, of the kind its suffix says. Needs Pillow."""
        pictures.save_picture(self, path, size, head)

    def save(self, path: str | PathLike[str]) -> None:
        """As JSON: a closed form by its name and parameters, another plan with its tiles."""
        files.save_plan(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> TilePlan:
        """What `save` wrote. ValueError where the file is no plan, or damaged."""
        return files.load_plan(path, read_plan)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles find the plan they came from, on the device that torch.load maps to.
        if self.is_transposed:
            return TilePlan.transpose, (self.transpose(),)
        anchor = None
        if torch_is_there():
            import torch

            anchor = torch.empty(0, dtype=torch.int32, device=self.device)
        return _restore, (self.name, self.parameters, anchor, self.arrays())

    def __repr__(self) -> str:
        given = "".join(f", {k}={v!r}" for k, v in self.parameters)
        heads = f", {self.heads} heads" if self.heads > 1 else ""
        return f"TilePlan({self.name!r}{given}, {self.q_length} x {self.k_length}{heads})"


Form = TypeVar("Form", bound=Callable[..., TilePlan])
FORMS: dict[str, Callable[..., TilePlan]] = {}
"""Constructors whose arguments, the plan's parameters, say all."""


def form(constructor: Form) -> Form:
    """A closed form: its plans are saved and copied by name and parameters."""
    FORMS[constructor.__name__] = constructor
    return constructor


def rebuild(name: str, parameters: tuple[tuple[str, Any], ...], arrays: files.Arrays | None) -> TilePlan:
    if arrays is None:
        return FORMS[name](**dict(parameters))
    lengths = np.diff(arrays.q_bounds), np.diff(arrays.k_bounds)
    if [key for key, _ in parameters] == ["digest"]:
        return given_plan(name, *lengths, arrays.rows, arrays.order)
    return make_plan(name, parameters, *lengths, arrays.rows, arrays.order)


def read_plan(name: str, parameters: dict[str, Any], arrays: files.Arrays | None) -> TilePlan:
    """`rebuild` of what a file says. A plan is equal to others of its name and parameters: those must say,
    or be made of, its tiles."""
    if arrays is None and name not in FORMS:
        raise ValueError(f"a plan named {name!r}; this pydiffuse knows {', '.join(sorted(FORMS))}")
    if arrays is not None and (name in FORMS or list(parameters) != ["digest"]):
        raise ValueError(
            f"a plan {name!r} of {', '.join(parameters) or 'no parameters'} with arrays; accepted with them: a"
            " digest, and a name that is no closed form's"
        )
    return rebuild(name, tuple(parameters.items()), arrays)


def _restore(
    name: str, parameters: tuple[tuple[str, Any], ...], anchor: Tensor | None, arrays: files.Arrays | None
) -> TilePlan:
    """For copies and pickles. anchor: an empty tensor on the plan's device."""
    plan = rebuild(name, parameters, arrays)
    return plan if anchor is None else plan.to(anchor.device)


_GIVEN: weakref.WeakValueDictionary[tuple[str, Any], TilePlan] = weakref.WeakValueDictionary()


def make_plan(
    name: str,
    parameters: Sequence[tuple[str, Any]],
    q_lengths: Sequence[int] | np.ndarray,
    k_lengths: Sequence[int] | np.ndarray,
    rows: Tiles | Runs,
    order: np.ndarray | None = None,
) -> TilePlan:
    """A plan from its tiles' lengths (each 1 or more) and its rows of kept tiles.

    Every constructor ends here. Masks that keep all are made full and masks that keep nothing are left out.
    """
    check_eager(name)
    q_bounds, k_bounds = _bounds(name, q_lengths), _bounds(name, k_lengths)
    runs = simplified(rows if isinstance(rows, Runs) else runs_of(rows))
    walk = plan_arrays(runs, q_bounds, k_bounds, order)
    return TilePlan(name, tuple(parameters), q_bounds, k_bounds, runs, walk)


def given_plan(
    name: str,
    q_lengths: Sequence[int] | np.ndarray,
    k_lengths: Sequence[int] | np.ndarray,
    rows: Tiles | Runs,
    order: np.ndarray | None = None,
) -> TilePlan:
    """A plan that no parameters describe: its tiles' digest tells it apart. While it lives, the same tiles
    give the same object."""
    runs = simplified(rows if isinstance(rows, Runs) else runs_of(rows))
    edges = _bounds(name, q_lengths), _bounds(name, k_lengths)
    parameters = (("digest", digest_of(tiles_in(runs), *edges, order)),)
    found = _GIVEN.get((name, parameters))
    if found is None:
        found = _GIVEN[name, parameters] = make_plan(name, parameters, q_lengths, k_lengths, runs, order)
    return found


def _bounds(name: str, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    sizes = np.asarray(lengths, np.int64)
    if sizes.ndim != 1 or not len(sizes) or (sizes < 1).any():
        raise ValueError(f"{name}: tiles have lengths {sizes.tolist()}; accepted: one or more, each >= 1")
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    check_tokens(name, int(bounds[-1]))
    return bounds.astype(np.int32)
