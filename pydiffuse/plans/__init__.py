"""Which tiles of an attention are computed: patterns in closed form, masks, and the plan they make.

    plan = frames(num_frames=16, tokens_per_frame=256, references=2)
    y = pydiffuse.tile_attention(q, k, v, plan)  # [B, H, 4096, D]

Closed forms, none of which looks at all pairs of tokens:

    frames        frames that see themselves and a few reference frames (Efficient-vDiT)
    sliding_tile  windows of whole tiles over an image or a video (Sliding Tile Attention)
    block_causal  blocks that see the blocks before them (Efficient-DLM, Diffusion Forcing)
    local         tokens that see their neighbours
    causal        tokens that see those before them, and themselves
    groups        several sequences in one
    joint         modalities that see each other, within a window of time where they share a clock (JAM-Flow)
    dense         all

`per_head` and `union` combine plans; `from_mask`, `from_block_mask` and `from_blocks` take
masks; `search` finds the
sparsest plan of every layer within an error. The same arguments give the same object. Under torch.compile
make the plan outside of the compiled function.
"""

from typing import TYPE_CHECKING

from pydiffuse._core.lazy import lazy
from pydiffuse.plans.combine import per_head, union
from pydiffuse.plans.joint import joint
from pydiffuse.plans.masks import from_block_mask, from_blocks, from_mask
from pydiffuse.plans.patterns import block_causal, causal, dense, frames, groups, local
from pydiffuse.plans.plan import TilePlan
from pydiffuse.plans.results import LayerChoice, SearchResult
from pydiffuse.plans.sliding import sliding_tile

if TYPE_CHECKING:
    from pydiffuse.search import search

# It calls tile_attention, which needs plans.
__getattr__, __dir__ = lazy("pydiffuse.plans", {"search": "pydiffuse.search"})

__all__ = [
    "LayerChoice",
    "SearchResult",
    "TilePlan",
    "block_causal",
    "causal",
    "dense",
    "frames",
    "from_block_mask",
    "from_blocks",
    "from_mask",
    "groups",
    "joint",
    "local",
    "per_head",
    "search",
    "sliding_tile",
    "union",
]
