"""Nodes for ComfyUI (V3): guidance rules and tile plans on these kernels.

This folder is the custom node: link or copy it to ComfyUI/custom_nodes/pydiffuse, with pydiffuse installed in
ComfyUI's Python. `guidance` and `attention` have what the nodes do to a model, as functions.
"""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to learn of the nodes."""
    from pydiffuse.integrations.comfyui.nodes import PydiffuseExtension

    return PydiffuseExtension()
