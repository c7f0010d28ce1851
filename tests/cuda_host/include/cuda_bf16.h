// bfloat16, two in a word: the conversions that the kernels use, to nearest even.
#pragma once

#include "device.h"

struct alignas(4) __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_host {

inline uint16_t to_bfloat16(float f) {
  const uint32_t word = bits<uint32_t>(f);
  if (std::isnan(f)) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace cuda_host

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {cuda_host::to_bfloat16(x), cuda_host::to_bfloat16(y)};
}
