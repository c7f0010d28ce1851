"""Modules made of pydiffuse's ops."""

from pydiffuse.nn.tile_attention import TileAttention
from pydiffuse.nn.zigzag_mamba import ZigzagMamba

__all__ = ["TileAttention", "ZigzagMamba"]
