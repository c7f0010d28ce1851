"""Limits of the kernels, as in csrc/scan.h, csrc/conv.h and csrc/attention.h; a test compares them with the
extension's."""

CHUNK = 64
"""Steps of a scan from one saved state to the next."""
MAX_STATES = 256
MAX_WIDTH = 8
"""Of a causal convolution."""
MAX_HEAD_DIM = 256
BLOCK = 128
"""Rows of a block of work at most: queries in the forward, queries or keys in the backward."""
