"""What diffusers (>= 0.42) plugs in: its guiders with their arithmetic on pydiffuse, and plans for the
attention of its models.

    from pydiffuse.integrations.diffusers import TangentialClassifierFreeGuidance
    pipe.update_components(guider=TangentialClassifierFreeGuidance(guidance_scale=7.5))
"""

# Where the `from_pretrained` of a pipeline looks for the kinds of its parts.
from diffusers.guiders import BaseGuidance as BaseGuidance

from pydiffuse.integrations.diffusers.attention import attention_plan
from pydiffuse.integrations.diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    MagnitudeAwareGuidance,
    TangentialClassifierFreeGuidance,
)

__all__ = [
    "AdaptiveProjectedGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "MagnitudeAwareGuidance",
    "TangentialClassifierFreeGuidance",
    "attention_plan",
]

for _name in __all__:  # the name that a saved pipeline keeps
    globals()[_name].__module__ = __name__
