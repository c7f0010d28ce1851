"""What the scan kernels share: a tile of states and channels in the registers of one warp.

A tile is [NR, DR, NL, DL]: state n = nr NL + nl, channel d = dr DL + dl. Triton deals a tensor's last
dimensions out to the lanes and the first to a lane's registers, so NL x DL = 32 says which sums cost
shuffles: over the states none at NL = 1 (a lane is a channel), over the channels few at a small DL.
What has no states is [1, DR, 1, DL], what has no channels [NR, 1, NL, 1].

Triton would deal a tile out otherwise where it sees it next to each other in memory, and move it through
shared memory. So the places of a tile's states are multiplied by `one`, a number it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydiffuse._core.structs import CHUNK as STEPS
from pydiffuse._core.structs import ScanArguments
from pydiffuse.kernels.common import INTERPRETED, cdiv, inner, power_of_2, unspecialised

try:  # the interpreter knows this one by its name, and is fast at it
    from triton.language.standard import _sum_combine as add
except ImportError:

    @triton.jit
    def add(a, b):
        return a + b


LANES = 32
# In a tile, at most: fewer than lanes, so that each lane loads a row of B or C for itself.
STATES = 32 if INTERPRETED else 16
CHUNK = tl.constexpr(STEPS)
UNROLL = tl.constexpr(4)  # steps whose loads are under way at once
SAVE = tl.constexpr(2)  # backward: steps from one saved state to the next; more do not fit into registers
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@inner
def states_of(block, NR: tl.constexpr, NL: tl.constexpr):
    n = tl.arange(0, NR)[:, None, None, None] * NL + tl.arange(0, NL)[None, None, :, None]
    return block * (NR * NL) + n


@inner
def known_of(n, N: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr):
    # Which of the states there are: where blocks come out even, all, and the compiler drops the mask.
    if N % (NR * NL) == 0:
        return n == n
    else:
        return n < N


@inner
def hold(h, known, N: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr):
    # Zeros where there is no state: 0 times an infinite delta or u is NaN, which sums would spread.
    if N % (NR * NL) == 0:
        return h
    else:
        return tl.where(known, h, 0.0)


@inner
def places(one, NR: tl.constexpr, DR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr):
    # A tile register by register, lanes next to each other.
    register = tl.arange(0, NR)[:, None, None, None] * DR + tl.arange(0, DR)[None, :, None, None]
    lane = tl.arange(0, NL)[None, None, :, None] * DL + tl.arange(0, DL)[None, None, None, :]
    return register * (NL * DL) + lane * one


@inner
def cells(d, block, one, N: tl.constexpr, NR: tl.constexpr, NL: tl.constexpr):
    # Places of a tile in [D, N].
    row = d * N + block * (NR * NL)
    if NL == 1:
        return row + tl.arange(0, NR)[:, None, None, None] * one
    else:
        lane = tl.arange(0, NL)[None, None, :, None] * one
        return row + lane + tl.arange(0, NR)[:, None, None, None] * NL


@inner
def channels_of(block, per_group, size, DR: tl.constexpr, DL: tl.constexpr):
    # Blocks of channels stay within a group of `size`: the group, the block in it, channels, which are.
    group, part = block // per_group, block % per_group
    d = tl.arange(0, DR)[None, :, None, None] * DL + tl.arange(0, DL)[None, None, None, :]
    d += part * DR * DL
    return group, part, group * size + d, d < size


@inner
def over_states(x, NL: tl.constexpr):
    if NL > 1:
        x = tl.reduce(x, 2, add, keep_dims=True)
    return tl.reduce(x, 0, add, keep_dims=True)


@inner
def over_channels(x):
    return tl.reduce(tl.reduce(x, 1, add, keep_dims=True), 3, add, keep_dims=True)


@inner
def tokens_at(t, sample, path, d):
    # t: (data, and its strides along batch, path, token, channel).
    return t[0] + sample * t[1] + path * t[2] + d * t[4]


@inner
def read(t, at, token, mask):
    return tl.load(at + token * t[3], mask=mask, other=0.0).to(tl.float32)


@inner
def weights_at(w, sample, path, group, n, DN, cell, mask):
    # Constant B or C, (data,): the tile itself. Else where the rows of n start.
    if len(w) == 1:
        return tl.load(w[0] + path * DN + cell, mask=mask, other=0.0)
    else:
        return w[0] + sample * w[1] + path * w[2] + group * w[3] + n


@inner
def weights(w, at, token, mask):
    if len(w) == 1:
        return at
    else:
        return tl.load(at + token * w[4], mask=mask, other=0.0).to(tl.float32)


@inner
def token_of(order, path, step, L, inside):
    if order is None:
        return step
    else:
        return tl.load(order + path * L + step, mask=inside, other=0).to(tl.int64)


@inner
def sequence_before(sequence, step):
    # The sequence of the step before; -1 before the first.
    if sequence is None:
        return -1
    else:
        return tl.load(sequence + step - 1, mask=step > 0, other=-1)


@inner
def given_state(given, sample, s, S, K, path, DN, cell, mask):
    # State s of given [B, S, K, D, N]; 0 if there is none. cell: places in [D, N].
    if given is None:
        return tl.full(mask.shape, 0.0, tl.float32)
    else:
        at = given + ((sample * S + s) * K + path) * DN
        return tl.load(at + cell, mask=mask & (s >= 0), other=0.0)


@inner
def step_size(delta, bias, inside, SOFTPLUS: tl.constexpr):
    # delta as the recurrence has it, 0 after the last step (which leaves the state alone), and before
    # the softplus.
    if bias is not None:
        delta += bias
    raw = delta
    if SOFTPLUS:  # log1p(e) = log(w) e / (w - 1), w = 1 + e rounded
        e = tl.exp(-tl.abs(raw))
        w = 1.0 + e
        small = w == 1.0
        log1p = tl.where(small, e, tl.log(w) * (e / tl.where(small, 1.0, w - 1.0)))
        delta = tl.where(raw > 20.0, raw, tl.maximum(raw, 0.0) + log1p)
    return tl.where(inside, delta, 0.0), raw


@inner
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


def tokens(t: Tensor | None) -> tuple[Any, ...] | None:
    """t [B, L, D] or [B, K, L, D] as kernels take it."""
    if t is None:
        return None
    strides = t.stride()
    return (t, *strides) if t.dim() == 4 else (t, strides[0], 0, *strides[1:])


def rows_of(t: Tensor) -> tuple[Any, ...]:
    """B or C as kernels take it: a token's states next to each other, for loads of several at once. It
    has no channels, so a copy is small beside the scan."""
    if t.dim() == 3:
        return (t,)
    t = t if t.stride(-1) == 1 else t.contiguous()
    return (t, *t.stride()[:-1])


class Tile(NamedTuple):
    NR: int
    DR: int
    NL: int
    DL: int

    @property
    def states(self) -> int:
        return self.NR * self.NL

    @property
    def channels(self) -> int:
        return self.DR * self.DL

    @classmethod
    def forward(cls, N: int) -> Tile:
        """A lane is a channel."""
        return cls(min(power_of_2(N), STATES), 1, 1, LANES)

    @classmethod
    def backward(cls, N: int) -> Tile:
        """Four lanes share a channel's states: as many sums run over states as over channels. Triton 3.6
        keeps more alive than later ones: two channels a lane spill there."""
        states = min(power_of_2(N), STATES)
        NL = min(states, 4)
        few = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
        return cls(states // NL, 4 if INTERPRETED else 1 if few else 2, NL, LANES // NL)


class Sizes(NamedTuple):
    """The sizes of a call, and how it is cut into tiles."""

    batch: int
    K: int
    L: int
    D: int
    N: int
    groups: int
    sequences: int
    chunks: int

    @classmethod
    def of(cls, a: ScanArguments) -> Sizes:
        batch, L, D = a.u.shape
        K, _, N = a.A.shape
        groups = next((t.shape[2] for t in (a.B, a.C) if t.dim() == 5), 1)
        sequences = 1 if a.offsets is None else a.offsets.numel() - 1
        return cls(batch, K, L, D, N, groups, sequences, cdiv(L, STEPS))

    def empty(self) -> bool:
        return self.batch * self.L * self.D * self.sequences == 0

    def per_group(self, tile: Tile) -> int:
        """Blocks of channels in a group."""
        return cdiv(self.D // self.groups, tile.channels)

    def state_blocks(self, tile: Tile) -> int:
        return cdiv(self.N, tile.states)

    def args(self, tile: Tile) -> tuple[int, ...]:
        """What kernels take as `sizes`."""
        group, per_group = self.D // self.groups, self.per_group(tile)
        return unspecialised(
            self.L, self.D, self.K, self.sequences, self.chunks, self.groups, group, per_group, self.batch,
        )  # fmt: skip

    def programs(self, tile: Tile) -> int:
        return self.batch * self.chunks * self.groups * self.per_group(tile)


def sequence_table(offsets: Tensor | None, L: int) -> Tensor | None:
    """The sequence [L] that each step belongs to, int32; of empty ones none."""
    if offsets is None:
        return None
    steps = torch.arange(L, dtype=torch.int32, device=offsets.device)
    table = torch.searchsorted(offsets, steps, right=True, out_int32=True) - 1
    return table.clamp_(0, offsets.numel() - 2)


def check_float(op: str, *tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous()):
            raise ValueError(f"{op}: parameters, states and their gradients must be contiguous float32")


def wide(targets: Sequence[Tensor | None], several: bool) -> list[Tensor | None]:
    """Where the parts of a sum are added: the outputs, or float32 copies if those would round each."""
    return [
        t
        if t is None or not several or t.dtype is torch.float32
        else torch.empty_like(t, dtype=torch.float32)
        for t in targets
    ]
