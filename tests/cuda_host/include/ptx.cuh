// The host's twin of csrc/cuda/ptx.cuh.
#pragma once

#include "device.h"

namespace pydiffuse {
namespace {

// As inexact as the instruction may be: a relative error of up to 2^-22, which depends on x alone;
// exact for 0 and where there is nothing to be inexact about.
inline float exp2_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) return 1.0f;
  const float y = std::exp2(x);
  if (!std::isfinite(y) || y < 0x1p-125f) return y < 0x1p-126f ? 0.0f : y;
  const uint32_t hash = cuda_host::bits<uint32_t>(x) * 2654435761u >> 29;      // 0 .. 7
  return cuda_host::bits<float>(cuda_host::bits<uint32_t>(y) + hash % 5 - 2);  // ulps
}

inline void prefetch(const void*) {}

}  // namespace
}  // namespace pydiffuse
