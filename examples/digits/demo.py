"""Handwritten digits from a small flow model, guided three ways, each computed two ways.

    python examples/digits/demo.py

1. Samples digits with classifier-free guidance (cfg), tangential damping (tcfg) and
   CFG-Zero* (cfg_zero), once with the plain PyTorch references and once with the compiled
   ops, from the same noise. The images must agree, and a classifier fitted on the real scans
   tells how often it recognises the class that was asked for.
2. Runs tcfg on a latent of the size a video model has, against float64.
3. Draws the digits of every rule next to real ones.

Exits non-zero if the two ways disagree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from layer import layer_demo
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from model import CLASSES, NO_CLASS, DigitDiT, load_data, load_model, to_pixels
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

import pydiffuse

Rule = Callable[[Tensor, Tensor, float], Tensor]
Results = dict[str, tuple[Tensor, float]]  # rule: (images (n, 1, 8, 8) by class, accuracy)

RULES: dict[str, tuple[Rule, float]] = {  # name: (rule, guidance scale)
    "cfg": (pydiffuse.cfg, 2.0),
    "tcfg": (pydiffuse.tcfg, 2.0),
    "cfg_zero": (pydiffuse.cfg_zero, 2.0),
}
BACKENDS = ("reference", "cpu")  # plain PyTorch, compiled
IMAGE_TOLERANCE = 1e-4  # between the images of the two ways, whose range is [-1, 1]
VIDEO_TOLERANCE = 1e-4  # of tcfg on the video latent, whose values are of order 1
VIDEO_SHAPE = (1, 16, 21, 60, 104)  # batch, channels, frames, height, width


def sample(
    model: DigitDiT, rule: Rule, scale: float, noise: Tensor, label: Tensor, steps: int, bar: tqdm
) -> tuple[Tensor, float]:
    """Euler steps from noise (t = 0) to digits (t = 1).

    noise (n, 1, 8, 8), label (n,) -> images (n, 1, 8, 8), median seconds of one guidance call.
    """
    n, dt = len(noise), 1 / steps
    both = torch.cat([label, torch.full_like(label, NO_CLASS)])
    x, seconds = noise, []
    for i in range(steps):
        v = model(torch.cat([x, x]), torch.full((2 * n,), i * dt), both)
        cond, uncond = v.chunk(2)
        start = time.perf_counter()
        g = rule(cond, uncond, scale)
        seconds.append(time.perf_counter() - start)
        x = x + dt * g
        bar.update()
    return x, statistics.median(seconds)


def recognised(classifier: SVC, images: Tensor, label: Tensor) -> float:
    """Share of images (n, 1, 8, 8) in which the classifier sees the requested label (n,)."""
    return float(np.mean(classifier.predict(to_pixels(images)) == label.numpy()))


def digits_demo(per_class: int, steps: int, seed: int) -> tuple[Results, bool]:
    """Sample with every rule, both ways, and print the table.

    Returns the images of the compiled ops, and whether both ways agreed.
    """
    model = load_model()
    label = torch.arange(CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(label), 1, 8, 8, generator=torch.Generator().manual_seed(seed))

    scans, target = load_digits(return_X_y=True)
    classifier = SVC(gamma=0.001)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    held_out = cross_val_score(classifier, scans, target, cv=folds).mean()
    classifier.fit(scans, target)

    runs = {}  # (rule, backend): (images, seconds)
    total = (1 + len(RULES) * len(BACKENDS)) * steps
    with torch.inference_mode(), tqdm(total=total, desc="sample", unit="step") as bar:
        bar.set_postfix_str("no guidance")
        unguided, _ = sample(model, lambda cond, uncond, scale: cond, 1.0, noise, label, steps, bar)
        for name, (rule, scale) in RULES.items():
            for backend in BACKENDS:
                bar.set_postfix_str(f"{name}, {backend}")
                with pydiffuse.use_backend(backend):
                    runs[name, backend] = sample(model, rule, scale, noise, label, steps, bar)

    print(f"\nDigits: {len(label)} images per rule, {steps} Euler steps, same noise both ways")
    print(f"{'':10}{'':>7}{'largest':>13}{'':>11}{'guidance, us per step':>25}{'class':>12}")
    print(
        f"{'rule':10}{'scale':>7}{'difference':>13}{'tolerance':>11}"
        f"{'PyTorch':>14}{'compiled':>11}{'recognised':>12}"
    )
    results, agree = {}, True
    for name, (_, scale) in RULES.items():
        (plain, plain_s), (fast, fast_s) = (runs[name, backend] for backend in BACKENDS)
        difference = (plain - fast).abs().max().item()
        agree &= difference <= IMAGE_TOLERANCE  # False for nan as well
        accuracy = recognised(classifier, fast, label)
        results[name] = (fast, accuracy)
        print(
            f"{name:10}{scale:7.1f}{difference:13.1e}{IMAGE_TOLERANCE:11.0e}"
            f"{1e6 * plain_s:14.0f}{1e6 * fast_s:11.0f}{accuracy:12.1%}"
        )
    print(f"{'unguided':10}{'':56}{recognised(classifier, unguided, label):12.1%}")
    print(f"{'real scans the classifier was not fitted on':66}{held_out:12.1%}")
    return results, agree


def tcfg_by_svd(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """tcfg the way its paper writes it: project uncond on the first right singular vector.

    cond, uncond (n, ...) -> guided prediction (n, ...).
    """
    rows = torch.stack([cond, uncond], dim=1).flatten(2)  # (n, 2, numel)
    _, _, vh = torch.linalg.svd(rows, full_matrices=False)
    first = vh[:, 0]  # (n, numel)
    damped = (rows[:, 1] * first).sum(dim=1, keepdim=True) * first
    damped = damped.view_as(uncond)
    return damped + scale * (cond - damped)


def tcfg_float64(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """The closed form in float64, for one sample: (1, ...) -> float64 (1, ...)."""
    c, u = cond.double(), uncond.double()
    cc, cu, uu = (c * c).sum(), (c * u).sum(), (u * u).sum()
    d = torch.hypot(cc - uu, 2 * cu)
    damped = cu / d * c + 0.5 * (1 + (uu - cc) / d) * u
    return damped + scale * (c - damped)


def best_time(
    rule: Rule, cond: Tensor, uncond: Tensor, scale: float, repeats: int
) -> tuple[Tensor, float]:
    """Guided prediction and the least seconds of `repeats` calls, after one to warm up."""
    result, seconds = rule(cond, uncond, scale), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = rule(cond, uncond, scale)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def video_demo(seed: int, scale: float = 5.0) -> bool:
    """Time tcfg on one video-sized latent and print errors; whether pydiffuse is in tolerance."""
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(VIDEO_SHAPE, generator=generator)
    cond = uncond + 0.1 * torch.randn(VIDEO_SHAPE, generator=generator)
    exact = tcfg_float64(cond, uncond, scale)

    def svd_in_float64(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        return tcfg_by_svd(cond.double(), uncond.double(), scale)

    ways: list[tuple[str, Rule, str, int]] = [
        ("torch.linalg.svd, float32", tcfg_by_svd, "reference", 3),
        ("torch.linalg.svd, float64", svd_in_float64, "reference", 3),
        ("plain PyTorch closed form", pydiffuse.tcfg, "reference", 10),
        ("pydiffuse.tcfg", pydiffuse.tcfg, "cpu", 10),
    ]
    rows = []
    for title, rule, backend, repeats in tqdm(ways, desc="video latent", unit="way"):
        with torch.inference_mode(), pydiffuse.use_backend(backend):
            result, seconds = best_time(rule, cond, uncond, scale, repeats)
        error = (result.double() - exact).abs()
        rows.append((title, 1e3 * seconds, error.mean().item(), error.max().item()))

    shape = "x".join(map(str, VIDEO_SHAPE))
    print(f"\ntcfg on a {shape} float32 latent, scale {scale:g}, {torch.get_num_threads()} threads")
    print("(uncond is normal noise, cond = uncond + 0.1 normal noise; best of several runs)")
    print(f"{'way':28}{'ms':>9}{'speed':>9}{'mean error':>13}{'largest error':>16}")
    for title, ms, mean, largest in rows:
        print(f"{title:28}{ms:9.1f}{rows[0][1] / ms:8.1f}x{mean:13.1e}{largest:16.1e}")
    print("Errors are against the closed form in float64.")
    print(f"Tolerance of the largest error in the last two rows: {VIDEO_TOLERANCE:.0e}.")
    return all(largest <= VIDEO_TOLERANCE for *_, largest in rows[2:])


def draw(results: Results, path: Path, columns: int = 12) -> None:
    """Save a panel of real digits and one per rule; each row is a class."""
    images, target = load_data()
    real = torch.cat([images[target == k][:columns] for k in range(CLASSES)])
    panels = [("real scans", "the training data, from scikit-learn", real)]
    for name, (x, accuracy) in results.items():
        x = x.unflatten(0, (CLASSES, -1))[:, :columns].flatten(0, 1)
        panels.append((name, f"scale {RULES[name][1]:g}, {accuracy:.1%} recognised", x))

    cell, gap = 8, 2  # pixels of a digit, and between digits
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(11.6, 11.2), layout=layout)
    axes = figure.subplots(2, 2)
    figure.suptitle(
        "Digits from a flow model: a row per requested class, the same noise for every rule",
        fontsize=17,
    )
    for ax, (title, subtitle, x) in zip(axes.flat, panels, strict=True):
        count = len(x) // CLASSES
        grid = F.pad(x.view(CLASSES, count, 8, 8), (0, gap, 0, gap), value=-1.0)
        grid = grid.transpose(1, 2).reshape(CLASSES * (cell + gap), -1)[:-gap, :-gap]
        ax.imshow(grid.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        middles = np.arange(CLASSES) * (cell + gap) + (cell - 1) / 2
        ax.set_yticks(middles, range(CLASSES), fontsize=13)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{title}\n", fontsize=16, fontweight="bold")
        ax.text(0.5, 1.025, subtitle, transform=ax.transAxes, ha="center", fontsize=13, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Guided digits, PyTorch against compiled ops.")
    parser.add_argument("--per-class", type=int, default=20, help="images per class and rule")
    parser.add_argument("--steps", type=int, default=32, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"))
    args = parser.parse_args()

    results, digits_agree = digits_demo(args.per_class, args.steps, args.seed)
    video_agrees = video_demo(args.seed)
    layer_agrees = layer_demo(args.seed)
    draw(results, args.out)
    print(f"\nWrote {args.out}")
    if not (digits_agree and video_agrees and layer_agrees):
        sys.exit("FAILED: a difference is above its tolerance")


if __name__ == "__main__":
    main()
