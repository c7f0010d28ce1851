"""Handwritten digits from a transformer whose patches each have their own noise level, on a CPU.

    python examples/digits/demo.py [--full]

1. Draws digits of every class, the noise levels of their patches on the way, and the model's paths and plan.
2. Draws more from the same noise with three samplers, all with the same number of model evaluations. A
   classifier fitted on real scans says how often it sees the class that was asked for, and how far the drawn
   digits are from real ones, beside how far real ones are from each other.
3. Runs the same training step and the same sampling through the plain PyTorch references and through
   the compiled ops, and prints the differences.

With --full: twice as many digits, without guidance and by two rules; and what both ways cost, in time, share
of it within the ops and peak memory.

Exits non-zero if the references and the compiled ops disagree.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from compare import compare, noise_for
from data import CLASSES, Judge, Verdict, load_data
from model import ZigzagTransformer, load_model
from pictures import Panel, grids, levels, structure
from sample import RULES, SAMPLERS, denoiser, watched
from torch import Tensor
from tqdm import tqdm

import pydiffuse
from pydiffuse.nn import ZigzagMamba


class Drawn(NamedTuple):
    sampler: str
    rule: str
    images: Tensor  # (n, 1, 16, 16) by class
    verdict: Verdict


def draw_digits(net: ZigzagTransformer, args: argparse.Namespace) -> list[Drawn]:
    """Digits of every sampler under every rule from the same noise, and the table about them."""
    count = args.per_class * CLASSES
    label = torch.arange(CLASSES).repeat_interleave(args.per_class)
    noise, judge = noise_for(count, args.seed), Judge(count)
    drawn = []
    rules = ("none", *RULES) if args.full else ("tcfg",)
    ways = [(sampler, rule) for rule in rules for sampler in SAMPLERS]
    for sampler, rule in tqdm(ways, desc="samplers"):
        model = denoiser(net, label, RULES.get(rule), args.scale)
        images = SAMPLERS[sampler](model, noise, args.evaluations)
        drawn.append(Drawn(sampler, rule, images, judge(images, label)))
    print(
        f"\n{count} digits each from the same noise, {args.evaluations} evaluations of the model each,"
        f" guidance scale {args.scale:g}"
    )
    print(f"{'guidance':10}{'sampler':12}{'class seen':>13}{'Frechet distance':>22}")
    for d in drawn:
        print(f"{d.rule:10}{d.sampler:12}{line(d.verdict)}")
    print(f"{'real digits':22}{line(judge.real)}")
    print(
        f"Distances are from {len(judge.others)} other real digits, in the last hidden layer of a classifier"
        " fitted on the\nrest of the scans; +- is their spread over resampled digits. The model was trained"
        " on all scans."
    )
    for rule in rules:
        even, *others = (d for d in drawn if d.rule == rule)
        print(f"Beside uniform steps, guidance {rule:5} {', '.join(beside(d, even) for d in others)}")
    return drawn


def line(v: Verdict) -> str:
    return f"{v.accuracy:13.1%}{v.distance:15.2f} +- {v.spread:.2f}"


def beside(d: Drawn, even: Drawn) -> str:
    """Where a sampler's digits are, seen from those of uniform steps."""
    gain = even.verdict.distance - d.verdict.distance
    side = "nearer" if gain > 0 else "farther"
    return f"{d.sampler} {abs(gain):.2f} {side}{' (within the spread)' if abs(gain) < d.verdict.spread else ''}"


def draw_levels(net: ZigzagTransformer, args: argparse.Namespace) -> Path:
    """A digit on its way through the dual loop, with the noise levels of its patches."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = denoiser(net, torch.arange(CLASSES), pydiffuse.cfg, args.scale)
    SAMPLERS["dual loop"](watched(model, seen, 5), noise_for(CLASSES, args.seed), 12)
    levels("Dual loop", seen, net.grid, args.out / "levels.png")
    return args.out / "levels.png"


def draw_model(net: ZigzagTransformer, args: argparse.Namespace) -> Path:
    ways = [layer.branch.path for layer in net.layers if isinstance(layer.branch, ZigzagMamba)]
    structure(ways, net.plan, args.out / "model.png")
    return args.out / "model.png"


def draw_grids(drawn: list[Drawn], args: argparse.Namespace) -> Path:
    """Real digits and those of every way."""
    images, target = load_data()
    columns = min(9, args.per_class)
    real = torch.cat([images[target == k][:columns] for k in range(CLASSES)])
    panels: list[Panel] = [("real digits", "from scikit-learn, enlarged", real)]
    for d in drawn:
        name = f"{d.sampler}, {'no guidance' if d.rule == 'none' else d.rule}"
        found = f"class seen {d.verdict.accuracy:.1%}, distance {d.verdict.distance:.2f}"
        panels.append((name, found, d.images))
    grids(panels, CLASSES, columns, args.out / "digits.png")
    return args.out / "digits.png"


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits with a noise level per patch.")
    parser.add_argument("--full", action="store_true", help="all rules, more digits, times and memory")
    parser.add_argument("--per-class", type=int, help="digits per class and sampler: 10; 20 if full")
    parser.add_argument("--evaluations", type=int, default=16, help="of the model, per sampler; even")
    parser.add_argument("--scale", type=float, default=2.0, help="of the guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.per_class = args.per_class or (20 if args.full else 10)
    start = time.perf_counter()

    def wrote(path: Path) -> None:
        print(f"{time.perf_counter() - start:4.0f} s: wrote {path}", flush=True)

    net = load_model()
    with torch.no_grad():
        wrote(draw_levels(net, args))
        wrote(draw_model(net, args))
        wrote(draw_grids(draw_digits(net, args), args))
    agree = compare(net, args.scale, args.seed, with_costs=args.full)
    if not agree:
        sys.exit("FAILED: a difference is above its tolerance")


if __name__ == "__main__":
    main()
