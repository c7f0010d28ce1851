"""Trains the transformer of examples/digits with its tokens split over the ranks of a process group.

    torchrun --nproc-per-node 2 examples/distributed/train.py --steps 20 --folder out/split

Every rank holds a part of each image's tokens, all weights (with --fsdp a part), and draws the same batch;
losses are those of one process. Each tenth step is saved by torch.distributed.checkpoint, and a run goes on
from the last one it finds: with `torchrun --max-restarts 3` also after a rank was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.digits.model import ZigzagTransformer
from pydiffuse import distributed, embed_t, modulate, noise_patches, sample_t

BATCH, SIDE, PATCH, CLASSES = 8, 16, 2, 4


class Split(ZigzagTransformer):
    """The transformer on this rank's tokens: (B, C, H, W), t (B, N) and label -> (B, its tokens, values)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__((SIDE, SIDE), patch=PATCH, dim=64, depth=2, classes=CLASSES)
        self.lengths = distributed.split(self.plan, dist.get_world_size(group))
        first = sum(self.lengths[: dist.get_rank(group)])
        self.own = slice(first, first + self.lengths[dist.get_rank(group)])
        distributed.split_tokens(self, self.lengths, group=group)

    def tokens(self, image: Tensor) -> Tensor:
        return F.pixel_unshuffle(image, self.patch).flatten(2).mT[:, self.own]

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        known, rows = embed_t(t, self.dim, scale=1000.0)
        cond = F.silu(self.level(known)[:, None] + self.label.weight).flatten(0, 1)
        rows = (rows * (self.classes + 1) + label[:, None])[:, self.own]
        h = self.tokens_in(self.tokens(x)) + self.position[self.own]
        y = modulate(h, self.begin.rows(cond)[:, :2], rows)
        _, y = self.run(h, y, cond, rows, range(len(self.layers)))
        return self.tokens_out(y)[..., :-1]


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, the velocity, t and the label of a step, the same on every rank: discs whose size is their label."""
    g = torch.Generator().manual_seed(step)
    label = torch.randint(CLASSES, (BATCH,), generator=g)
    at = torch.arange(SIDE) - SIDE * (0.3 + 0.4 * torch.rand(BATCH, 2, 1, generator=g))
    distance = (at[:, 0, :, None] ** 2 + at[:, 1, None] ** 2).sqrt()
    x1 = torch.tanh(label[:, None, None] + 2 - distance)[:, None]
    t = sample_t(BATCH, (SIDE // PATCH) ** 2, "ltg", generator=g)
    noise = torch.randn(x1.shape, generator=g)
    x, v = noise_patches(x1, t, PATCH, noise=noise)
    return x, v, t, label


def train(
    steps: int,
    folder: Path | None = None,
    group: dist.ProcessGroup | None = None,
    every: int = 10,
    fail_at: int | None = None,
    fsdp: bool = False,
) -> list[float]:
    """The losses of the steps, from the last saved one on. fsdp: weights are sharded, too."""
    torch.manual_seed(0)
    model = Split(group)
    if fsdp:
        mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu")
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    start, losses = load(folder, model, optimizer), []
    for step in range(start, steps):
        if step == fail_at:
            os._exit(1)  # as a machine that is lost
        x, v, t, label = batch(step)
        # This rank's part of the mean over all tokens.
        loss = (model(x, t, label) - model.tokens(v)).square().sum() / v.numel()
        optimizer.zero_grad()
        if fsdp:  # which takes the mean over the ranks, where their parts are to be added up
            (loss * dist.get_world_size(group)).backward()
        else:
            loss.backward()
            distributed.sum_gradients(model.parameters(), group)
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole, group=group)
        losses.append(whole.item())
        if folder and (step + 1) % every == 0:
            save(folder, step + 1, model, optimizer)
    return losses


def state(model: Split, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, step: int, model: Split, optimizer: torch.optim.Optimizer) -> None:
    dcp.save(state(model, optimizer), checkpoint_id=folder / f"{step:06d}")


def load(folder: Path | None, model: Split, optimizer: torch.optim.Optimizer) -> int:
    """The step that the last complete checkpoint was saved after; 0 without one."""
    saved = sorted(folder.glob("*/.metadata")) if folder else []
    if not saved:
        return 0
    found = state(model, optimizer)
    dcp.load(found, checkpoint_id=saved[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return int(saved[-1].parent.name)


def join() -> None:
    """init_process_group with what torchrun sets. Its store outlives a restart (torch 2.13), and the addresses of the
    ranks before would be found in it: each start has keys of its own."""
    store, rank, ranks = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("out/split"), help="for checkpoints")
    parser.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--fail-at", type=int, help="the last rank leaves before this step, the first time"
    )
    parser.add_argument("--fsdp", action="store_true", help="shard the weights by FSDP2 (fully_shard)")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    join()
    last = dist.get_rank() == dist.get_world_size() - 1
    first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    losses = train(
        args.steps, args.folder, every=args.every, fail_at=args.fail_at if last and first_time else None,
        fsdp=args.fsdp,
    )  # fmt: skip
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks; losses:", *(f"{loss:.6f}" for loss in losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
