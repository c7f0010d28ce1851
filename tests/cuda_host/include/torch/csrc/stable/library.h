// What registers itself for CUDA is registered for CPU tensors, in a namespace of its own.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(ns##_cuda_host, CPU, m, C10_UID)
