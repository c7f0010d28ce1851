"""Modules made of pydiffuse's ops."""

from pydiffuse.nn.zigzag_mamba import ZigzagMamba

__all__ = ["ZigzagMamba"]
