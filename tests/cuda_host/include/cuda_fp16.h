// float16, two in a word: the conversions that the kernels use, to nearest even.
#pragma once

#include "device.h"

struct alignas(4) __half2 {
  uint16_t x, y;
};

namespace cuda_host {

inline float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(fraction) * 0x1p-24f));
  const uint32_t high = exponent == 31 ? 255 : exponent + 112;
  return bits<float>(sign | high << 23 | fraction << 13);
}

inline uint16_t to_half(float f) {
  const uint16_t sign = static_cast<uint16_t>(bits<uint32_t>(f) >> 16 & 0x8000);
  const float size = std::fabs(f);
  if (std::isnan(f)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  // In units of the last place of the result; subnormals have that of 2^-14.
  int exponent = 0;
  std::frexp(size, &exponent);  // size = m 2^exponent, 1/2 <= m < 1
  if (size < 0x1p-14f) exponent = -13;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return static_cast<uint16_t>(sign | ((uint32_t(exponent + 13) << 10) + units));
}

}  // namespace cuda_host

inline float2 __half22float2(const __half2& h) {
  return {cuda_host::from_half(h.x), cuda_host::from_half(h.y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {cuda_host::to_half(x), cuda_host::to_half(y)};
}
