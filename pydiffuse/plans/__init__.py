"""Which tiles of an attention are computed: patterns in closed form, masks, and the plan they make.

    plan = frames(num_frames=16, tokens_per_frame=256, references=2)
    y = pydiffuse.tile_attention(q, k, v, plan)  # [B, H, 4096, D]

The same arguments give the same object. Under torch.compile make the plan outside of the compiled
function.
"""

from pydiffuse.plans.masks import from_mask
from pydiffuse.plans.patterns import frames
from pydiffuse.plans.plan import TilePlan

__all__ = ["TilePlan", "frames", "from_mask"]
