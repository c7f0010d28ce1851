// The kernels once more, for another instruction set: kernel-builder gives a file one set of flags.
#define PYDIFFUSE_ISA avx512
#include "../../csrc/cpu/adaln.cpp"
#include "../../csrc/cpu/guidance.cpp"
