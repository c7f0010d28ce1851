// Vectors of one instruction set, and float32 tiles of float32, bfloat16 and float16 memory.
//
// A file that includes this is compiled once per instruction set (PYDIFFUSE_ISA names it). All
// that stands here is in an anonymous namespace: a function shared between the copies would let
// the linker hand AVX-512 code to a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../guidance.h"

namespace pydiffuse {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // float32 lanes
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int HALF = WIDTH / 2;  // float64 lanes

typedef float vfloat __attribute__((vector_size(WIDTH * 4)));
typedef float vhalf __attribute__((vector_size(HALF * 4)));
typedef double vdouble __attribute__((vector_size(WIDTH * 4)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline vdouble load_double(const float* p) {
  return __builtin_convertvector(load<vhalf>(p), vdouble);
}
inline double lane_sum(vdouble v) {  // in a fixed order: halves of halves
  double lane[HALF];
  std::memcpy(lane, &v, sizeof v);
  for (int width = HALF / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Past the caches: the line is written without being read first. p is aligned to a vector.
inline void stream(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline uint16_t float_to_bf16(float f) {  // to nearest even; NaN stays a quiet NaN
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
inline float f16_to_float(uint16_t h) {
  // Shift the exponent into place, let a float32 product set the bias (denormals come out right),
  // and lift inf and NaN to float32's exponent.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  const uint32_t magnitude = float_to_bits(bits_to_float(rest) * 0x1p112f);
  return bits_to_float(sign | (rest >= 0x7c00u << 13 ? (rest | 0x7f800000) : magnitude));
}
inline uint16_t float_to_f16(float f) {  // to nearest even
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65520 or more
  if (a < 0x38800000) {  // denormal: adding 0.5 leaves the multiple of 2^-24 in the low bits
    return uint16_t(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((a + 0xfff + ((a >> 13) & 1) - 0x38000000) >> 13));
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// dst[0..n) = src in float32. Plain loops: the compiler vectorises both conversions.
inline void widen(const void* src, DType dtype, int64_t n, float* __restrict__ dst) {
  const auto* s = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  if (dtype == DType::bf16) {
    for (; i < n; ++i) dst[i] = bits_to_float(uint32_t(s[i]) << 16);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(s + i))));
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(s + i))));
#endif
  for (; i < n; ++i) dst[i] = f16_to_float(s[i]);
}

inline void narrow(const float* src, DType dtype, int64_t n, void* __restrict__ dst) {
  auto* d = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  if (dtype == DType::bf16) {
    for (; i < n; ++i) d[i] = float_to_bf16(src[i]);
    return;
  }
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256((__m256i*)(d + i), _mm512_cvtps_ph(_mm512_loadu_ps(src + i), 0));
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
  for (; i < n; ++i) d[i] = float_to_f16(src[i]);
}

// A tile of float32 values: the memory itself where it is float32, else a widened copy.
inline const float* tile(const Rows& r, int64_t sample, int64_t start, int64_t n, float* scratch) {
  const int64_t offset = sample * r.stride + start;
  if (r.dtype == DType::f32) return static_cast<const float*>(r.data) + offset;
  widen(static_cast<const uint16_t*>(r.data) + offset, r.dtype, n, scratch);
  return scratch;
}

}  // namespace
}  // namespace pydiffuse
