"""CUDA kernels on the host: csrc/cuda compiled by the host compiler, its threads run as fibers.

include/ has CUDA's headers as far as the kernels use them, grid.cpp runs a launch, runtime.cpp answers for
the devices. build.py compiles them, emulator.py loads the result and says what it has seen.
"""
