"""The same computations through the plain PyTorch references and through the compiled ops.

`python examples/digits/compare.py BACKEND` prints the peaks of memory of a process that does nothing else.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from data import CLASSES, SIDE, load_data
from model import ZigzagTransformer, load_model
from sample import RULES, SAMPLERS, denoiser, uniform
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from train import loss_of

import pydiffuse

BACKENDS = {"reference": "plain PyTorch", "cpu": "pydiffuse"}
TOLERANCE = 1e-4
"""Of images, whose range is [-1, 1], by the largest difference, after all evaluations; of a loss and of all
gradients together relative to their norm."""
BATCH = 32  # digits in the steps that are timed


class Check(NamedTuple):
    what: str
    difference: float


class Costs(NamedTuple):
    """Of a training step and of a sampling step."""

    milliseconds: tuple[float, float]
    share: tuple[float, float]  # of the time, within pydiffuse's ops
    peak: tuple[float, float]  # MB above the peak of a process that has loaded model and data


def noise_for(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def training_step(net: ZigzagTransformer, seed: int) -> tuple[float, Tensor]:
    """Loss and all gradients of a step of train.py on real digits: the same draws for the same seed."""
    images, labels = load_data()
    torch.manual_seed(seed)
    pick = torch.randint(len(images), (BATCH,))
    net.zero_grad()
    with torch.enable_grad():
        loss = loss_of(net, images[pick], labels[pick], drop=0.1, keep=1.0)
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@torch.no_grad()
def sampling_step(net: ZigzagTransformer) -> Tensor:
    """A step of Euler with tcfg."""
    label = torch.arange(BATCH) % CLASSES
    return uniform(denoiser(net, label, pydiffuse.tcfg, 2.0), noise_for(BATCH, 0), 1)


@torch.no_grad()
def samples(net: ZigzagTransformer, scale: float, seed: int) -> dict[str, Tensor]:
    """A digit of each class from every sampler, in 8 evaluations, with one of the rules."""
    label, noise = torch.arange(CLASSES), noise_for(CLASSES, seed)
    drawn = {}
    for (sampler, run), rule in zip(SAMPLERS.items(), ("cfg", "tcfg", "cfg"), strict=True):
        model = denoiser(net, label, RULES[rule], scale)
        drawn[f"{sampler}, {rule}, 10 digits in 8 evaluations"] = run(model, noise, 8)
    return drawn


def checks(net: ZigzagTransformer, learner: ZigzagTransformer, scale: float, seed: int) -> list[Check]:
    images, steps = {}, {}
    for backend in tqdm(BACKENDS, desc="plain PyTorch and pydiffuse"):
        with pydiffuse.use_backend(backend):
            images[backend] = samples(net, scale, seed)
            steps[backend] = training_step(learner, seed)
    found = [
        Check(what, (x - images["reference"][what]).abs().max().item())
        for what, x in images["cpu"].items()
    ]
    (loss, gradients), (plain, slopes) = steps["cpu"], steps["reference"]
    found.append(Check("training step, loss", abs(loss / plain - 1)))
    error = (gradients - slopes).norm() / slopes.norm()
    return [*found, Check("training step, all gradients", error.item())]


def costs(net: ZigzagTransformer, learner: ZigzagTransformer, backend: str) -> Costs:
    calls = (lambda: training_step(learner, 0)), (lambda: sampling_step(net))
    with pydiffuse.use_backend(backend):
        first, second = ((timed(call), share_in_ops(call)) for call in calls)
    command = [sys.executable, __file__, backend]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return Costs((first[0], second[0]), (first[1], second[1]), (float(printed[1]), float(printed[0])))


def timed(call: Callable[[], object], repeats: int = 3) -> float:
    """Median milliseconds of some calls, after one to warm up."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def share_in_ops(call: Callable[[], object]) -> float:
    """By torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it has nothing to say
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = found.key_averages()
    ops = sum(e.self_cpu_time_total for e in events if e.key.startswith("pydiffuse::"))
    return ops / sum(e.self_cpu_time_total for e in events)


def compare(net: ZigzagTransformer, scale: float, seed: int, with_costs: bool) -> bool:
    """Print what the two ways give and, if asked, cost; whether they agree."""
    learner = load_model().requires_grad_()
    found = checks(net, learner, scale, seed)
    print("\nThe same through the references, in plain PyTorch, and through the compiled ops")
    print(f"{'':48}{'difference':>12}{'tolerance':>11}")
    for what, difference in found:
        print(f"{what:48}{difference:12.1e}{TOLERANCE:11.0e}")
    if with_costs:
        print_costs(net, learner)
    return all(difference <= TOLERANCE for _, difference in found)  # False for nan as well


def print_costs(net: ZigzagTransformer, learner: ZigzagTransformer) -> None:
    spent = {backend: costs(net, learner, backend) for backend in tqdm(BACKENDS, desc="times and memory")}
    print(f"\n{f'{BATCH} digits, {torch.get_num_threads()} threads':32}", end="")
    print("".join(f"{title:>20}" for title in BACKENDS.values()) + f"{'of it in its ops':>20}")
    plain, ours = spent["reference"], spent["cpu"]
    for i, what in enumerate(("training step", "sampling step, tcfg and Euler")):
        print(
            f"{what:32}{plain.milliseconds[i]:17.0f} ms{ours.milliseconds[i]:17.0f} ms{ours.share[i]:20.0%}"
        )
        print(f"{'  memory':32}{plain.peak[i]:17.0f} MB{ours.peak[i]:17.0f} MB")
    print("Most of the rest are matrix products, which both leave to torch.")


def print_peaks(backend: str) -> None:
    """MB by which a sampling and then a training step raise the peak of this process."""
    net = load_model()
    load_data()
    before, peaks = peak_memory(), []
    with pydiffuse.use_backend(backend):
        sampling_step(net)
        peaks.append(peak_memory() - before)
        training_step(net.requires_grad_(), 0)
        peaks.append(peak_memory() - before)
    print(*peaks)


def peak_memory() -> float:
    """Of this process since it began, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    print_peaks(sys.argv[1])
