"""The schedulers of diffusers with their step as one op: same names, same configuration.

Only `step` is replaced, and what it keeps between steps is what diffusers keeps: a step that is not fused
is diffusers' own, in the middle of a run, too.
"""

from __future__ import annotations

from typing import Any

from pydiffuse._core.checks import describe
from pydiffuse.integrations.diffusers.schedulers.ddim import DDIMScheduler
from pydiffuse.integrations.diffusers.schedulers.dpm import DPMSolverMultistepScheduler
from pydiffuse.integrations.diffusers.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from pydiffuse.integrations.diffusers.schedulers.unipc import UniPCMultistepScheduler

FUSED: tuple[type[Any], ...] = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)


def fuse_scheduler(pipe: Any) -> Any:
    """The pipeline's scheduler with its step as one op, in its place; or, of a scheduler, its like.

    Configuration and state (timesteps, shift) are kept. Returns what came: the pipeline, or a scheduler.
    Raises TypeError for a scheduler that has no fused one.
    """
    if hasattr(pipe, "scheduler"):
        pipe.scheduler = fuse_scheduler(pipe.scheduler)
        return pipe
    if isinstance(pipe, FUSED):
        return pipe
    for fused in FUSED:
        original: Any = fused.__mro__[1]
        if type(pipe) is original:
            made = fused.from_config(pipe.config)
            made.__dict__.update(pipe.__dict__)
            return made
    raise TypeError(
        f"fuse_scheduler: scheduler is {describe(pipe)}; accepted: {', '.join(f.__name__ for f in FUSED)}"
    )
