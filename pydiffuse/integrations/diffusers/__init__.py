"""What diffusers (>= 0.42) plugs in: its guiders with their arithmetic on pydiffuse, and plans for the
attention of its models.

    from pydiffuse.integrations.diffusers import TangentialClassifierFreeGuidance
    pipe.update_components(guider=TangentialClassifierFreeGuidance(guidance_scale=7.5))
"""

# Where the `from_pretrained` of a pipeline looks for the kinds of its parts.
from diffusers.guiders import BaseGuidance as BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from pydiffuse.integrations.diffusers.attention import attention_plan
from pydiffuse.integrations.diffusers.frequency import FrequencyDecoupledGuidance
from pydiffuse.integrations.diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    MagnitudeAwareGuidance,
    TangentialClassifierFreeGuidance,
)
from pydiffuse.integrations.diffusers.perturbed import (
    AutoGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from pydiffuse.integrations.diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    fuse_scheduler,
)

__all__ = [
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "AutoGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FrequencyDecoupledGuidance",
    "LTX2Guidance",
    "MagnitudeAwareGuidance",
    "PerturbedAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TangentialClassifierFreeGuidance",
    "UniPCMultistepScheduler",
    "attention_plan",
    "fuse_scheduler",
]

for _name in __all__:  # the name that a saved pipeline keeps
    globals()[_name].__module__ = __name__
