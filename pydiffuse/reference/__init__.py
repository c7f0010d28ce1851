"""The definition of every op in plain PyTorch, with the names and signatures of the public ops."""

from pydiffuse.reference import guidance

__all__ = ["guidance"]
