"""Train the digit model by Patch Forcing and save its averaged weights as checkpoint.pt.

The checkpoint in this folder was made by the defaults, on one thread:

    OMP_NUM_THREADS=1 python examples/digits/train.py

Stopped, it goes on from where it was: the state is kept in --state until the training is over.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import load_data
from model import CHECKPOINT, ZigzagTransformer
from pictures import losses as draw_losses
from torch import Tensor, nn
from tqdm import trange

from pydiffuse import noise_patches, patch_loss, route, sample_t

LEVELS = 64  # noise levels are multiples of 1/64: a batch then has few distinct ones, and small tables


def loss_of(model: ZigzagTransformer, x1: Tensor, label: Tensor, drop: float, keep: float) -> Tensor:
    """Patch Forcing (arXiv 2604.19141). x1 (B, C, H, W), label (B,) -> scalar.

    No patch knows more than a bound drawn for its image ("ltg"). A share `drop` of the labels is
    dropped; a share `keep` of the tokens goes through the middle layers (TREAD).
    """
    tokens = model.grid[0] * model.grid[1]
    t = (sample_t(len(x1), tokens, "ltg") * LEVELS).round() / LEVELS
    x_t, v = noise_patches(x1, t, model.patch, noise=torch.randn_like(x1))
    label = torch.where(torch.rand(len(x1)) < drop, model.classes, label)
    ids = route(1, tokens, keep)[0] if keep < 1 else None
    pred, logvar = model(x_t, t, label, levels=LEVELS + 1, ids=ids)
    return patch_loss(pred, v, logvar, patch_size=model.patch)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, with a shorter memory at the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """No weight decay where Mamba asks for none, nor for biases, norms and positions."""
    plain = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False) or p.dim() < 2]
    held = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in held]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    images, labels = load_data()
    model = ZigzagTransformer()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = optimizer_of(model, args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    settings = {k: getattr(args, k) for k in ("steps", "batch", "lr", "drop", "keep", "decay", "seed")}
    losses: list[float] = []

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"settings": settings, "losses": losses, "random": torch.get_rng_state()}
        args.state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, args.state.with_suffix(".new"))
        args.state.with_suffix(".new").replace(args.state)

    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{args.state} is of another training, {state['settings']}; remove it first")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses = state["losses"]
        torch.set_rng_state(state["random"])

    progress = trange(args.steps, initial=len(losses), desc="train", unit="step")
    for step in range(len(losses), args.stop or args.steps):
        pick = torch.randint(len(images), (args.batch,))
        loss = loss_of(model, images[pick], labels[pick], args.drop, args.keep)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, model, step, args.decay)
        losses.append(loss.item())
        progress.update()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if len(losses) % 200 == 0:
            save()
    progress.close()
    save()
    draw_losses(losses, args.curve)
    if len(losses) < args.steps:
        return
    torch.save({name: w.half() for name, w in average.state_dict().items()}, args.out)
    args.state.unlink()
    count = sum(p.numel() for p in model.parameters())
    size = args.out.stat().st_size / 2**20
    print(
        f"{count:,} weights, {args.steps} steps, loss {np.mean(losses[-100:]):.4f};"
        f" saved {args.out} ({size:.2f} MiB), {args.curve}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Train the class-conditional digit model.")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--drop", type=float, default=0.1, help="share of dropped labels")
    p.add_argument("--keep", type=float, default=1.0, help="share of tokens in the middle layers")
    p.add_argument("--decay", type=float, default=0.999, help="of the weight average")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", type=int, help="stop after this many steps; the next call goes on")
    p.add_argument("--out", type=Path, default=CHECKPOINT)
    p.add_argument("--state", type=Path, default=Path("out/train.pt"))
    p.add_argument("--curve", type=Path, default=Path("out/loss.png"))
    return p


if __name__ == "__main__":
    train(parser().parse_args())
