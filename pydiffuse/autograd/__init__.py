"""Gradients, one formula for all backends: forward and backward call the same ops."""
