"""What the ops over several ranks send and take: formulas of bytes, and a model of time made of them.

`python -m pydiffuse plan-scale` prints the time of a denoising step on 1 to 1,024 GPUs. Nothing of it is measured:
it is arithmetic on published rates of one GPU and of its links (`H100`), of the bytes below, which the tests
compare with what `count_bytes` counts, and of no overlap but the ring's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pydiffuse.distributed.scan import BLOCK, BLOCKS_PER_RANK, PIPELINE_RANKS
from pydiffuse.distributed.slices import bounds_of, part, split
from pydiffuse.plans import TilePlan, dense, frames

# Bytes that one rank sends in the forward; an all-reduce or an all-gather counts its own tensor once.


def guidance_bytes(batch: int, predictions: int, rescaled: bool = False) -> int:
    """An all-reduce, of float64."""
    k = predictions
    return 8 * (batch * (k * (k + 1) // 2 + rescaled * k) + rescaled)


def conv_bytes(batch: int, channels: int, width: int, itemsize: int) -> int:
    """To the next rank."""
    return batch * channels * (width - 1) * itemsize


def scan_bytes(batch: int, channels: int, states: int, method: str) -> int:
    """To the next rank, or an all-gather; float32."""
    return 4 * batch * channels * states * (2 if method == "gather" else 1)


def ulysses_bytes(
    batch: int, heads: int, key_heads: int, lengths: Sequence[int], rank: int, dim: int, itemsize: int
) -> int:
    """Two all-to-alls: q, k and v of this rank's tokens out, and the result of its heads back."""
    each, more = divmod(key_heads, len(lengths))
    own = (each + (rank < more)) * heads // key_heads
    mine = (each + (rank < more)) * 2 + own
    out = (heads + 2 * key_heads - mine) * lengths[rank]
    back = own * (sum(lengths) - lengths[rank])
    return batch * dim * itemsize * (out + back)


def ring_bytes(
    batch: int, key_heads: int, plan: TilePlan, lengths: Sequence[int], rank: int, dim: int, itemsize: int
) -> int:
    """Keys and values of this rank that the queries of others see."""
    ends = bounds_of(lengths)
    shown = [part(plan, queries, ends[rank]) for r, queries in enumerate(ends) if r != rank]
    return 2 * batch * key_heads * dim * itemsize * sum(p.number for p in shown if p)


def reorder_bytes(batch: int, lengths: Sequence[int], rank: int, channels: int, itemsize: int) -> float:
    """The mean over orders: every other rank's share of the tokens."""
    leaves = 1 - lengths[rank] / sum(lengths)
    return batch * lengths[rank] * leaves * channels * itemsize


class Device(NamedTuple):
    """Published rates; bytes per second in one direction."""

    name: str
    flops: float
    """Of matrix products and attention in bfloat16, as kernels reach it."""
    exponentials: float
    inside: float
    """Link to the GPUs of the same node."""
    outside: float
    node: int
    latency: float
    """Seconds for a message, assumed."""

    def link(self, ranks: int) -> float:
        return self.inside if ranks <= self.node else self.outside


H100 = Device("H100 SXM", 648e12, 132 * 16 * 1.755e9, 450e9, 50e9, 8, 10e-6)
"""FlashAttention-3's 648 TF/s (arXiv 2407.08608); 16 exponentials per clock and SM; NVLink 4: 900 GB/s both ways;
one 400 Gb/s InfiniBand port for each GPU."""


class Row(NamedTuple):
    ranks: int
    compute: float  # seconds
    communication: float  # seconds that are not hidden
    sent: float  # bytes of one rank

    @property
    def time(self) -> float:
        return self.compute + self.communication


class Video(NamedTuple):
    """A transformer over a video: Wan2.1 14B at 81 frames of 720 x 1280 by default."""

    tokens: int = 75_600
    dim: int = 5120
    inner: int = 13_824
    heads: int = 40
    layers: int = 40
    frames: int = 21
    references: int = 0
    """Frames that all see (Efficient-vDiT); 0: every token sees every token."""

    def plan(self) -> TilePlan:
        if not self.references:
            return dense(self.tokens)
        return frames(self.frames, self.tokens // self.frames, self.references)

    def row(self, ranks: int, device: Device) -> Row:
        """The fastest way of splitting heads: over all ranks, over those of a node with rings across, or not."""
        within = {n for n in (1, device.node, ranks) if ranks % n == 0 and n <= self.heads}
        return min((self._row(ranks, n, device) for n in sorted(within)), key=lambda row: row.time)

    def _row(self, ranks: int, within: int, device: Device) -> Row:
        """Heads are split over `within` ranks, neighbours, and tokens travel in rings across."""
        plan, head_dim, across = self.plan(), self.dim // self.heads, ranks // within
        # Attention of whole heads is even whatever tokens a rank holds; that of a ring is where its queries are.
        each, more = divmod(self.tokens, ranks)
        lengths = [each + (r < more) for r in range(ranks)] if across == 1 else split(plan, ranks)
        rows = [lengths[i : i + within] for i in range(0, ranks, within)]
        at = across // 2
        heads = math.ceil(self.heads / within)  # of the rank that is waited for
        linear = 2 * max(lengths) * self.dim * (6 * self.dim + 2 * self.inner) / device.flops
        attention = 4 * int(plan.kept[0]) * heads * head_dim / across / device.flops
        sent, wait = 0, 0.0
        if within > 1:
            sent = ulysses_bytes(1, self.heads, self.heads, rows[at], 0, head_dim, 2)
            wait = sent / device.link(within) + 2 * device.latency
        if across > 1:
            sums = [sum(row) for row in rows]
            keys = ring_bytes(1, heads, plan, sums, at, head_dim, 2)
            ends = bounds_of(sums)
            steps = sum(part(plan, ends[at], other) is not None for other in ends)
            # Keys travel while the attention of those before them is computed.
            wait += max(0.0, keys / device.link(ranks) + steps * device.latency - attention)
            sent += keys
        return Row(ranks, self.layers * (linear + attention), self.layers * wait, self.layers * sent)


class Image(NamedTuple):
    """ZigMa (arXiv 2403.13802) at 128 x 128 patches."""

    tokens: int = 16_384
    dim: int = 768
    layers: int = 24
    states: int = 16
    rank: int = 48

    def row(self, ranks: int, device: Device) -> Row:
        inner = 2 * self.dim
        lengths = [len(range(r, self.tokens, ranks)) for r in range(ranks)]
        own = max(lengths)
        linear = 2 * own * (3 * self.dim * inner + inner * (2 * self.rank + 2 * self.states))
        scan = own * inner * self.states / device.exponentials
        compute = linear / device.flops
        if ranks == 1:
            return Row(1, self.layers * (compute + scan), 0.0, 0)
        link = device.link(ranks)
        sent = 2 * reorder_bytes(1, lengths, 0, self.dim, 2) + conv_bytes(1, inner, 4, 2)
        wait = sent / link + 3 * device.latency
        if ranks <= PIPELINE_RANKS:
            states: float = scan_bytes(1, inner, self.states, "pipeline")
            width = max(BLOCK, math.ceil(inner / (BLOCKS_PER_RANK * (ranks - 1)) / BLOCK) * BLOCK)
            blocks = math.ceil(inner / width)
            wait += (ranks - 1) / blocks * (scan + states / link) + (ranks - 1 + blocks) * device.latency
        else:
            states = scan_bytes(1, inner, self.states, "gather")
            wait += scan + (ranks - 1) * states / link + math.log2(ranks) * device.latency
        return Row(
            ranks, self.layers * (compute + scan), self.layers * wait, self.layers * (sent + states)
        )


MODELS: dict[str, Video | Image] = {
    "Wan2.1 14B, 75,600 tokens, dense attention": Video(),
    "Wan2.1 14B, 75,600 tokens, frames with 2 references": Video(references=2),
    "ZigMa, 16,384 tokens": Image(),
}


def table(model: Video | Image, ranks: Sequence[int], device: Device = H100) -> str:
    """One denoising step, forward, batch 1."""
    lines = ["  GPUs   step, ms   of which waits   sent by a GPU, MB   efficiency"]
    one = model.row(1, device)
    for n in ranks:
        row = model.row(n, device)
        lines.append(
            f"{n:6,} {row.time * 1e3:10.2f} {row.communication * 1e3:16.2f} {row.sent / 1e6:19.2f}"
            f" {one.time / n / row.time:11.0%}"
        )
    return "\n".join(lines)


def main(ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)) -> None:
    print(
        f"Computed, not measured: published rates of {H100.name} and its links (pydiffuse.distributed.scale)."
    )
    for name, model in MODELS.items():
        print(f"\n{name}\n{table(model, ranks)}")
