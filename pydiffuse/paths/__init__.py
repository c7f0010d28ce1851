"""Orders over tokens for scans: sweeps, zigzags, Hilbert curves, and permutations of your own.

Tokens stand in raster order on a grid (H, W), or (T, H, W) for a video: token (t H + h) W + w. A
path visits each once; step l is at token `order[l]`, and token n is visited at step `inverse[n]`.
The same arguments give the same object, so a path can be asked for in every forward pass:

    path = zigzag((32, 32), scheme=3)
    inner = x[:, path.order]  # [B, L, ...] in path order
    x = inner[:, path.inverse]  # and back

Under torch.compile make the path outside of the compiled function (in a module's __init__, say):
inside, it would be traced and built again.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffuse._core.modes import compiling, is_tensor, real_tensors, torch_is_there

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]
Walk = Callable[[int, int, int], np.ndarray]


@dataclass(frozen=True, repr=False)
class ScanPath:
    """An order over the tokens of a grid. Equal and hashed by name, shape and parameters.

    The tensors belong to every user of the path: read them, do not write to them.
    """

    name: str
    shape: Shape
    """The token grid: (H, W) or (T, H, W); (L,) for a path from `from_order` without a shape."""
    parameters: tuple[tuple[str, Any], ...]
    """What beside name and shape tells paths apart, as (keyword, value) pairs."""
    visits: np.ndarray = field(compare=False)
    """`order` as an array, which needs no torch."""
    _tensors: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    """order and inverse; None until torch is there."""
    _kin: dict[tuple[bool, torch.device | None], ScanPath] = field(default_factory=dict, compare=False)
    """This path in both directions on every device it was asked for, by (backwards, device); None is the CPU."""

    def __post_init__(self) -> None:
        if self._tensors is None and torch_is_there():
            object.__setattr__(self, "_tensors", _order_and_inverse(self.visits))
        self._kin[self._backwards, self._place] = self

    @property
    def order(self) -> Tensor:
        """int32 [L]: step l visits token order[l]."""
        return self._both[0]

    @property
    def inverse(self) -> Tensor:
        """int32 [L]: token n is visited at step inverse[n]."""
        return self._both[1]

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        if self._tensors is None:
            object.__setattr__(self, "_tensors", _order_and_inverse(self.visits))
        assert self._tensors is not None
        return self._tensors

    @property
    def _place(self) -> torch.device | None:
        if self._tensors is None or self._tensors[0].device.type == "cpu":
            return None
        return self._tensors[0].device

    @property
    def length(self) -> int:
        """How many tokens: the product of the shape."""
        return math.prod(self.shape)

    def to(self, device: torch.device | str | int) -> ScanPath:
        """The same path with its tensors on `device`: copied once, then the same object again."""
        import torch

        device = torch.device(device)
        if device.index is None and device.type != "cpu":
            device = torch.empty(0, device=device).device  # "cuda" is a device by its number, too
        found = self._kin.get((self._backwards, None if device.type == "cpu" else device))
        if found is None:
            with nullcontext() if compiling() else real_tensors():
                moved = self.order.to(device), self.inverse.to(device)
            found = ScanPath(self.name, self.shape, self.parameters, self.visits, moved, self._kin)
        return found

    def reversed(self) -> ScanPath:
        """The same tokens from last to first. path.reversed().reversed() is path."""
        found = self._kin.get((not self._backwards, self._place))
        if found is None:
            parameters = tuple(p for p in self.parameters if p[0] != "reversed")
            if not self._backwards:
                parameters += (("reversed", True),)
            tensors = None
            if self._tensors is not None:
                order, inverse = self._tensors
                with nullcontext() if compiling() else real_tensors():
                    tensors = order.flip(0), self.length - 1 - inverse
            found = ScanPath(self.name, self.shape, parameters, self.visits[::-1], tensors, self._kin)
        return found

    @property
    def _backwards(self) -> bool:
        return ("reversed", True) in self.parameters

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        given = "".join(f", {key}={value!r}" for key, value in self.parameters)
        return (
            f"<ScanPath {self.name}({self.shape}{given}), {self.length} tokens on {self._place or 'cpu'}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles find the path they came from, on the device that torch.load maps to.
        anchor = None
        if torch_is_there():
            import torch

            anchor = torch.empty(0, dtype=torch.int32, device=self.order.device)
        order = None
        if any(key == "digest" for key, _ in self.parameters):
            order = np.ascontiguousarray(self.visits[::-1] if self._backwards else self.visits)
        return _restore, (self.name, self.shape, self.parameters, anchor, order)


def sweep(shape: Sequence[int], transpose: bool = False) -> ScanPath:
    """Raster order, the identity; with `transpose`, column by column.

    shape: (H, W) or (T, H, W); frames follow each other in time, each swept by itself. The step
    from the end of a row (column, frame) to the next one is a jump.
    """
    if not isinstance(transpose, bool):
        raise TypeError(f"sweep: transpose is {transpose!r}; accepted: True or False")
    return _sweep(_grid("sweep", shape), transpose=transpose)


def zigzag(shape: Sequence[int], scheme: int = 0) -> ScanPath:
    """A snake through the grid: consecutive tokens are always neighbours (ZigMa, arXiv 2403.13802).

    shape: (H, W), or (T, H, W): then the snake walks a frame to its end, steps to the same place in
    the next frame and walks that one backwards. The schemes, numbered as in ZigMa's code:

    ====== ==================== ==================================
    scheme first token          snake
    ====== ==================== ==================================
    0      top left             along rows, the first one rightwards
    1      top left             along columns, the first one downwards
    2      top right            along rows, the first one leftwards
    3      top right            along columns, the first one downwards
    4      bottom left          along rows, the first one rightwards
    5      bottom left          along columns, the first one upwards
    6      bottom right         along rows, the first one leftwards
    7      bottom right         along columns, the first one upwards
    ====== ==================== ==================================

    They are eight different paths where H, W >= 2. Layer i of a ZigMa takes scheme i mod 8:
    `zigzag_layers`.
    """
    return _zigzag(_grid("zigzag", shape), scheme=_scheme("zigzag", scheme))


def zigzag_layers(shape: Sequence[int], depth: int) -> list[ScanPath]:
    """The path of each of `depth` layers: zigzag(shape, i mod 8) for layer i."""
    grid = _grid("zigzag_layers", shape)
    depth = _integer("zigzag_layers", "depth", depth, "0, 1, 2, ...")
    if depth < 0:
        raise ValueError(f"zigzag_layers: depth is {depth}; accepted: 0, 1, 2, ...")
    return [_zigzag(grid, scheme=i % 8) for i in range(depth)]


def zigzag_video(shape: Sequence[int], scheme: int = 0) -> tuple[ScanPath, ScanPath]:
    """ZigMa's factored video scan: (spatial, temporal), two paths over the T H W tokens of a video.

    shape: (T, H, W). `spatial` walks frame 0 by zigzag((H, W), scheme), then frame 1 from the same
    corner, and so on: T pieces of H W steps. `temporal` goes through the places of a frame in that
    same order, and at each one through time, from frame 0 to T-1: H W pieces of T steps.

    Layers alternate between the two (ZigMa: spatial, spatial, temporal), and every piece is a
    sequence of its own. Either reorder, scan the pieces as a batch and put them back,

        pieces = x[:, spatial.order].reshape(B * T, H * W, D)
        x = scan(pieces).reshape(B, T * H * W, D)[:, spatial.inverse]

    or give the path to a scan over all L tokens: one sequence then carries its state from piece to
    piece.
    """
    grid = _grid("zigzag_video", shape, dims=(3,))
    scheme = _scheme("zigzag_video", scheme)
    return (
        _zigzag_video(grid, axes="spatial", scheme=scheme),
        _zigzag_video(grid, axes="temporal", scheme=scheme),
    )


def hilbert(shape: Sequence[int]) -> ScanPath:
    """A Hilbert curve for every (H, W) and (T, H, W); consecutive tokens are always neighbours.

    On a 2^k square it is the Hilbert curve (each quadrant is visited in one go, and so on inside
    it), on a 2^k cube a Hilbert curve of three dimensions. Any other grid is cut in the same way,
    by halves that are rounded as parity demands; below, `_walk` says how.

    It starts at token 0. On a checkerboard a path changes colour at each step, so none of unit
    steps joins the two ends of an odd side while another side is even. The curve ends at the far
    end of the longest side, if that side is even or all sides are odd (of equal sides: W, then H).
    Else it ends at the far end of the next shorter such side, if that is at least 2/3 as long. Else
    it covers an even number of slices of the longest side in that way, and turns along the longest
    even side in the slices that are left.
    """
    return _hilbert(_grid("hilbert", shape))


def from_order(
    order: Tensor | np.ndarray | Sequence[int],
    shape: Sequence[int] | None = None,
    name: str = "custom",
) -> ScanPath:
    """A path from a permutation of 0..L-1: step l visits token order[l].

    order: [L], integers. shape: the token grid, of L tokens; (L,) by default. The path is on the
    CPU wherever `order` was (`path.to(device)` moves it); while it lives, the same permutation with
    the same shape and name gives the same object. ValueError if `order` is no permutation.
    """
    values = _permutation(order)
    grid: Shape = (len(values),)
    if shape is not None:
        grid = _grid("from_order", shape, dims=(1, 2, 3))
        if math.prod(grid) != len(values):
            raise ValueError(
                f"from_order: shape is {grid}, of {math.prod(grid)} tokens, and order has {len(values)};"
                " they must be equal"
            )
    if not isinstance(name, str):
        raise TypeError(f"from_order: name is a {type(name).__name__}; accepted: a str")
    key = (name, grid, hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest())
    found = _CUSTOM.get(key)
    if found is None:
        found = _CUSTOM[key] = _path(name, grid, values, digest=key[-1])
    return found


_CUSTOM: weakref.WeakValueDictionary[tuple[str, Shape, str], ScanPath] = weakref.WeakValueDictionary()


def _path(name: str, shape: Shape, order: np.ndarray, **parameters: Any) -> ScanPath:
    """order: any array of the L tokens in the order of the steps."""
    visits = np.array(order, dtype=np.int32).ravel()
    return ScanPath(name, shape, tuple(parameters.items()), visits)


def _order_and_inverse(visits: np.ndarray) -> tuple[Tensor, Tensor]:
    import torch

    visits = np.ascontiguousarray(visits)
    inverse = np.empty_like(visits)
    inverse[visits] = np.arange(len(visits), dtype=np.int32)
    with nullcontext() if compiling() else real_tensors():
        return torch.from_numpy(visits), torch.from_numpy(inverse)


def _tokens(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


@functools.cache
def _sweep(shape: Shape, *, transpose: bool) -> ScanPath:
    tokens = _tokens(*shape)
    return _path("sweep", shape, tokens.swapaxes(-1, -2) if transpose else tokens, transpose=transpose)


def _snake(tokens: np.ndarray) -> np.ndarray:
    """[rows, n] -> the same with every second row backwards."""
    tokens = tokens.copy()
    tokens[1::2] = tokens[1::2, ::-1].copy()
    return tokens


def _zigzag_frame(H: int, W: int, scheme: int) -> np.ndarray:
    tokens = _tokens(H, W)
    corner, columns = divmod(scheme, 2)
    bottom, right = divmod(corner, 2)
    tokens = tokens[:: -1 if bottom else 1, :: -1 if right else 1]
    return _snake(tokens.T if columns else tokens).ravel()


def _frames(shape: Shape, scheme: int) -> np.ndarray:
    """[T, H W]: every frame's tokens by the same scheme."""
    *T, H, W = shape
    return _tokens(*(T or [1]), 1) * (H * W) + _zigzag_frame(H, W, scheme)


@functools.cache
def _zigzag(shape: Shape, *, scheme: int) -> ScanPath:
    return _path("zigzag", shape, _snake(_frames(shape, scheme)), scheme=scheme)


@functools.cache
def _zigzag_video(shape: Shape, *, axes: str, scheme: int) -> ScanPath:
    frames = _frames(shape, scheme)
    order = frames if axes == "spatial" else frames.T
    return _path("zigzag_video", shape, order, axes=axes, scheme=scheme)


@functools.cache
def _hilbert(shape: Shape) -> ScanPath:
    sizes = (1, *shape)[-3:]
    walk = functools.cache(lambda a, b, c: _walk(walk, a, b, c))
    places = _curve(walk, sizes)
    walk.cache_clear()  # it holds itself: without this, its memory would wait for the collector
    return _path("hilbert", shape, (places[0] * sizes[1] + places[1]) * sizes[2] + places[2])


def _curve(walk: Walk, sizes: Shape) -> np.ndarray:
    """The Hilbert curve's places [3, L] in a box of `sizes` (T, H, W)."""

    def along(axis: int, sizes: Shape) -> np.ndarray:
        """From corner to corner along one axis, by `_walk`."""
        others = [k for k in (2, 1, 0) if k != axis]
        out = np.empty((3, math.prod(sizes)), np.int32)
        out[[axis, *others]] = walk(sizes[axis], *(sizes[k] for k in others))
        return out

    axes = sorted((2, 1, 0), key=lambda k: -sizes[k])  # longest first; of equals W, H, T
    longest = axes[0]
    for axis in axes:
        rest = math.prod(sizes) // sizes[axis]
        if (sizes[axis] % 2 == 0 or rest % 2 == 1) and 3 * sizes[axis] >= 2 * sizes[longest]:
            return along(axis, sizes)
    # The longest side is odd, another one even and much shorter: an even number of slices, and the
    # rest, about as long as that other side, along it.
    axis = next(k for k in axes if sizes[k] % 2 == 0)
    tail, head = list(sizes), list(sizes)
    tail[longest] = sizes[axis] - 1
    head[longest] -= tail[longest]
    last = along(axis, tuple(tail))
    last[longest] += head[longest]
    return np.concatenate([along(longest, tuple(head)), last], axis=1)


def _walk(walk: Walk, a: int, b: int, c: int) -> np.ndarray:
    """Places [3, a b c] of a path of unit steps through a box from (0, 0, 0) to (a-1, 0, 0).

    One exists where a is even or a, b, c are all odd (and a > 1 unless b = c = 1); only such boxes
    are asked for. A long box is two walks in a row. A flat one (a plane: c = 1) is the Hilbert
    curve's bracket, up along b, across along a, down along b:

        | across, a x b2 |
        | up    |   down |   up, down: a1 x b1 and a2 x b1

    A box with b and c alike is the cube's bracket: up b1; along c; across a; back along c; down b1.
    Sizes are halves, rounded such that every part has a walk again: a part of even length does, so
    b1 is even; or a part with all sides odd does. `walk` is this function with a memory: there are
    a few sizes at each depth, so that all of it costs about as much as writing the path.
    """
    if b == c == 1:
        return np.stack([np.arange(a), np.zeros(a), np.zeros(a)]).astype(np.int32)
    bracket = 3 * min(b, c) >= 2 * max(b, c) and a % 2 == 0  # of a cube
    if 2 * a <= 3 * max(b, c) and ((b % 2 == 0 and c % 2 == 1) if bracket else c > b):
        return walk(a, c, b)[[0, 2, 1]]

    def part(start: tuple[int, int, int], *sides: tuple[int, int, int]) -> np.ndarray:
        """A walk from `start`; sides: (axis, direction, size), the first one is walked along."""
        places = walk(*(size for _, _, size in sides))
        out = np.empty_like(places)
        for (axis, direction, _), line in zip(sides, places, strict=True):
            np.multiply(line, direction, out=out[axis])
            out[axis] += start[axis]
        return out

    X, Y, Z = range(3)
    if 2 * a > 3 * max(b, c):
        a1 = a // 2 if b * c % 2 else _even_half(a)
        parts = [
            part((0, 0, 0), (X, 1, a1), (Y, 1, b), (Z, 1, c)),
            part((a1, 0, 0), (X, 1, a - a1), (Y, 1, b), (Z, 1, c)),
        ]
        return np.concatenate(parts, axis=1)

    a1, c1 = a // 2, c // 2
    if bracket and c % 2 and a1 % 2 == 0:
        a1 -= 1  # the walks along an odd c need a1 and a - a1 odd (b is odd here, so b - b1 is)
    odd_halves = a % 4 == b % 4 == 2 and (c % 4 == 2 if bracket else c % 2 == 1)
    b1 = b // 2 if odd_halves else _even_half(b)
    a2, b2, c2 = a - a1, b - b1, c - c1
    if bracket:
        parts = [
            part((0, 0, 0), (Y, 1, b1), (X, 1, a1), (Z, 1, c1)),
            part((0, b1, 0), (Z, 1, c), (X, 1, a1), (Y, 1, b2)),
            part((0, b1 - 1, c - 1), (X, 1, a), (Y, -1, b1), (Z, -1, c2)),
            part((a - 1, b1, c - 1), (Z, -1, c), (X, -1, a2), (Y, 1, b2)),
            part((a - 1, b1 - 1, 0), (Y, -1, b1), (X, -1, a2), (Z, 1, c1)),
        ]
    else:
        parts = [
            part((0, 0, 0), (Y, 1, b1), (X, 1, a1), (Z, 1, c)),
            part((0, b1, 0), (X, 1, a), (Y, 1, b2), (Z, 1, c)),
            part((a - 1, b1 - 1, 0), (Y, -1, b1), (X, -1, a2), (Z, 1, c)),
        ]
    return np.concatenate(parts, axis=1)


def _even_half(n: int) -> int:
    """The even number nearest to n / 2, the larger one of two."""
    return (n + 2) // 4 * 2


_BUILDERS: dict[str, Callable[..., ScanPath]] = {
    "sweep": _sweep,
    "zigzag": _zigzag,
    "zigzag_video": _zigzag_video,
    "hilbert": _hilbert,
}


def _restore(
    name: str,
    shape: Shape,
    parameters: tuple[tuple[str, Any], ...],
    anchor: Tensor | None,
    order: np.ndarray | Tensor | None,
) -> ScanPath:
    given = dict(parameters)
    backwards = given.pop("reversed", False)
    path = _BUILDERS[name](shape, **given) if order is None else from_order(order, shape, name)
    path = path.reversed() if backwards else path
    return path if anchor is None else path.to(anchor.device)


def _integer(op: str, argument: str, value: object, accepted: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{op}: {argument} is {value!r}, a {type(value).__name__}; accepted: {accepted}")


def _scheme(op: str, scheme: int) -> int:
    scheme = _integer(op, "scheme", scheme, "0 to 7")
    if not 0 <= scheme < 8:
        raise ValueError(f"{op}: scheme is {scheme}; accepted: 0 to 7 (layer i takes i % 8)")
    return scheme


def _grid(op: str, shape: Sequence[int], dims: tuple[int, ...] = (2, 3)) -> Shape:
    names = {1: "(L,)", 2: "(H, W)", 3: "(T, H, W)"}
    accepted = " or ".join(names[n] for n in dims) + ", integers of at least 1"
    if isinstance(shape, str) or not (isinstance(shape, Sequence | np.ndarray) or is_tensor(shape)):
        raise TypeError(f"{op}: shape is {shape!r}, a {type(shape).__name__}; accepted: {accepted}")
    grid = tuple(_integer(op, "shape", size, accepted) for size in shape)
    if len(grid) not in dims:
        raise ValueError(f"{op}: shape is {grid}, of {len(grid)} dimensions; accepted: {accepted}")
    if min(grid) < 1:
        raise ValueError(f"{op}: shape is {grid}; accepted: {accepted}")
    if math.prod(grid) >= 2**31:
        raise ValueError(
            f"{op}: shape is {grid}, of {math.prod(grid)} tokens; accepted: fewer than 2^31 (int32)"
        )
    return grid


def _permutation(order: Any) -> np.ndarray:
    """int32 [L], or the error that says what is wrong."""
    if is_tensor(order):
        if order.is_meta:
            raise ValueError("from_order: order is a meta tensor, without values; accepted: integers [L]")
        values = np.zeros(1)
        if not (order.is_floating_point() or order.is_complex()):
            values = order.detach().cpu().numpy()
        dtype = str(order.dtype)
    else:
        try:
            values = np.asarray(order)
        except ValueError:  # rows of different lengths
            values = np.asarray(order, object)
        dtype = str(values.dtype)
    if values.dtype.kind not in "iu" and (values.size or values.dtype == object):
        raise TypeError(
            f"from_order: order is a {type(order).__name__} of {dtype}; accepted: integers [L]"
        )
    L = values.size
    accepted = f"each of 0 to {L - 1} once, in any order"
    if values.ndim != 1 or L == 0 or L >= 2**31:
        raise ValueError(
            f"from_order: order has shape {values.shape}; accepted: [L], a permutation of 0 to L-1 with"
            " 1 <= L < 2^31"
        )
    if values.min() < 0 or values.max() >= L:
        wrong = values[(values < 0) | (values >= L)][0]
        raise ValueError(f"from_order: order has {L} steps and holds {wrong}; accepted: {accepted}")
    visits = np.bincount(values.astype(np.int64), minlength=L)
    if visits.max() > 1:
        raise ValueError(
            f"from_order: order visits token {visits.argmax()} {visits.max()} times and token"
            f" {visits.argmin()} never; accepted: {accepted}"
        )
    return values.astype(np.int32)
