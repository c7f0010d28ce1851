"""A random Wan video model in ComfyUI, sampled before and after the nodes: seconds, and how far the videos move.

With ComfyUI's Python, in ComfyUI's folder: python /path/to/examples/comfyui_plan.py --frames 9 --size 32
"""

from __future__ import annotations

import argparse
import sys
import time

sys.path.insert(0, ".")
parser = argparse.ArgumentParser(description=__doc__)
for name, number in (("frames", 9), ("size", 32), ("width", 256), ("steps", 4), ("references", 2)):
    parser.add_argument(f"--{name}", type=int, default=number)
args, sys.argv[1:] = parser.parse_args(), ["--cpu"]  # what is left is ComfyUI's to read

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
from comfy import model_patcher, samplers, supported_models  # noqa: E402

from pydiffuse.integrations.comfyui import attention, guidance  # noqa: E402

CPU, d = torch.device("cpu"), args.width
torch.manual_seed(0)
config = {"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "window_size": (-1, -1)}
config |= {"dim": d, "ffn_dim": d, "num_heads": d // 64, "num_layers": 2, "in_dim": 16, "out_dim": 16}
config |= {"text_dim": 16, "text_len": 8, "freq_dim": 32}
network = supported_models.WAN21_T2V(config).get_model({}, "", CPU)
for p in network.diffusion_model.parameters():
    torch.nn.init.normal_(p.requires_grad_(False), std=p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0)
model = model_patcher.ModelPatcher(network, CPU, CPU)
noise = torch.randn(1, 16, args.frames, args.size, args.size)
prompts = [[[torch.randn(1, 8, 16), {}]] for _ in range(2)]


@torch.inference_mode()
def sample(patched: model_patcher.ModelPatcher) -> tuple[torch.Tensor, float]:
    sampler, times = samplers.KSampler(patched, args.steps, CPU, "euler", "simple"), []
    for _ in range(3):
        begin = time.perf_counter()
        video = sampler.sample(noise, *prompts, 4.0, torch.zeros_like(noise), disable_pbar=True, seed=0)
        times.append(time.perf_counter() - begin)
    return video, min(times)


before, seconds = sample(model)
print(f"{'before':24} {seconds:6.2f} s")
plan = attention.frames_plan(noise, args.references)
faster = attention.tile_attention(model, plan)
for name, patched in ((f"frames plan, {plan.density:.0%}", faster), ("and TCFG", guidance.tcfg(faster))):
    after, seconds = sample(patched)
    print(f"{name:24} {seconds:6.2f} s, video moved by {(after - before).norm() / before.norm():.3f}")
