"""Train the digit model and save its averaged weights as checkpoint.pt.

The checkpoint in this folder was made by the defaults:

    python examples/digits/train.py
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from model import CHECKPOINT, NO_CLASS, DigitDiT, interpolate, load_data
from torch import Tensor, nn
from tqdm import trange


def flow_loss(model: nn.Module, x1: Tensor, label: Tensor, drop: float) -> Tensor:
    """Squared error of the velocity. x1 (n, 1, 8, 8), label (n,) -> scalar.

    Times are logit-normal; a share `drop` of the labels becomes NO_CLASS.
    """
    t = torch.sigmoid(torch.randn(len(x1)))
    x_t, v = interpolate(x1, torch.randn_like(x1), t)
    label = torch.where(torch.rand(len(x1)) < drop, NO_CLASS, label)
    return (model(x_t, t, label) - v).square().mean()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, with a shorter memory at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the class-conditional digit model.")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drop", type=float, default=0.1, help="share of dropped labels")
    parser.add_argument("--decay", type=float, default=0.999, help="of the weight average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load_data()
    model = DigitDiT()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.05
    )

    start, smooth = time.perf_counter(), None
    progress = trange(args.steps, desc="train", unit="step")
    for step in progress:
        pick = torch.randint(len(images), (args.batch,))
        loss = flow_loss(model, images[pick], labels[pick], args.drop)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, model, step, args.decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{smooth:.4f}")

    torch.save({name: w.half() for name, w in average.state_dict().items()}, args.out)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"{weights:,} weights, {args.steps} steps in {time.perf_counter() - start:.0f} s, "
        f"last loss {smooth:.4f}; saved {args.out.name} ({args.out.stat().st_size / 2**20:.2f} MiB)"
    )


if __name__ == "__main__":
    main()
