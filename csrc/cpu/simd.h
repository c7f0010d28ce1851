// Vectors of one instruction set, and the float lanes of float32, bfloat16 and float16 memory.
//
// A file that includes this is compiled once per instruction set (PYDIFFUSE_ISA names it). All
// that stands here is in an anonymous namespace: a function shared between the copies would let
// the linker hand AVX-512 code to a CPU without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../tensor.h"

#define PYDIFFUSE_JOIN_(stem, isa) pydiffuse_##stem##_##isa
#define PYDIFFUSE_JOIN(stem, isa) PYDIFFUSE_JOIN_(stem, isa)
// The table that a file exports: pydiffuse_<stem>_<isa>.
#define PYDIFFUSE_TABLE(Type, stem)                                                      \
  extern "C" __attribute__((visibility("hidden"))) const pydiffuse::Type PYDIFFUSE_JOIN( \
      stem, PYDIFFUSE_ISA)

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
typedef int32_t vint __attribute__((vector_size(WIDTH * 4)));
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
// Spelled out: g++ 12 converts half a vector at a time and puts the halves together.
inline vdouble widened(vhalf v) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (vdouble)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, vdouble);
#endif
}
inline vhalf narrowed(vdouble v) {
#if defined(__AVX512F__)
  return (vhalf)_mm512_maskz_cvtpd_ps(0xff, (__m512d)v);
#elif defined(__AVX2__)
  return (vhalf)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, vhalf);
#endif
}
inline double lane_sum(vdouble v) {  // in a fixed order: halves of halves
  double lane[HALF];
  std::memcpy(lane, &v, sizeof v);
  for (int width = HALF / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// y + a b, rounded once where the CPU can. Spelled out: of two products in a sum a compiler may
// fuse either, and every way through a kernel must come to the same bits.
inline vfloat fused(vfloat a, vfloat b, vfloat y) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)y);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)y);
#else
  return y + a * b;
#endif
}
inline float fused(float a, float b, float y) {
#if defined(__FMA__) || defined(__AVX512F__)
  return __builtin_fmaf(a, b, y);
#else
  return y + a * b;
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

// How the elements of a tensor are read into float lanes and written from them. `past_cache` writes
// the line without reading it first; p must then be aligned to a whole vector.
// read_half: h = 0 and h = 1 are the two halves of the WIDTH elements at p.
struct F32 {
  using Bits = float;
  static vfloat read(const float* p) { return load<vfloat>(p); }
  static vhalf read_half(const float* p, int h) { return load<vhalf>(p + h * HALF); }
  static float read_one(const float* p) { return *p; }
  static void write(float* p, vfloat v, bool past_cache) {
#if defined(__AVX512F__)
    if (past_cache) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    if (past_cache) return _mm256_stream_ps(p, (__m256)v);
#endif
    (void)past_cache;
    store(p, v);
  }
  static void write_one(float* p, float f) { *p = f; }
};

struct BF16 {
  using Bits = uint16_t;
  template <int N>
  struct Lanes {
    typedef uint16_t u16 __attribute__((vector_size(N * 2)));
    typedef uint32_t u32 __attribute__((vector_size(N * 4)));
  };
#if defined(__AVX512F__)  // spelled out: g++ 12 takes the generic form through the stack
  static vfloat read(const uint16_t* p) {
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
  }
#elif defined(__AVX2__)
  static vfloat read(const uint16_t* p) {
    return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
  }
#else
  static vfloat read(const uint16_t* p) {
    using L = Lanes<WIDTH>;
    return (vfloat)(__builtin_convertvector(load<L::u16>(p), L::u32) << 16);
  }
#endif
  // Even elements, then odd ones: for sums any half will do, and this one needs no shuffle.
  static vhalf read_half(const uint16_t* p, int h) {
    typedef uint32_t pairs __attribute__((vector_size(HALF * 4)));
    const auto both = load<pairs>(p);
    return (vhalf)(h ? both & 0xffff0000u : both << 16);
  }
  static float read_one(const uint16_t* p) { return bits_to_float(uint32_t(*p) << 16); }
  static void write(uint16_t* p, vfloat v, bool past_cache) {
    using L = Lanes<WIDTH>;
    const auto u = (L::u32)v;
    const auto nan = (u & 0x7fffffff) > 0x7f800000;
    const L::u32 half = nan ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const auto packed = __builtin_convertvector(half, L::u16);
#if defined(__AVX512F__)
    if (past_cache) return _mm256_stream_si256((__m256i*)p, (__m256i)packed);
#elif defined(__AVX2__)
    if (past_cache) return _mm_stream_si128((__m128i*)p, (__m128i)packed);
#endif
    (void)past_cache;
    store(p, packed);
  }
  static void write_one(uint16_t* p, float f) { *p = float_to_bf16(f); }
};

struct F16 {
  using Bits = uint16_t;
#if defined(__AVX512F__)
  static vfloat read(const uint16_t* p) { return (vfloat)_mm512_cvtph_ps(load<__m256i>(p)); }
  static vhalf read_half(const uint16_t* p, int h) {
    return (vhalf)_mm256_cvtph_ps(load<__m128i>(p + h * HALF));
  }
  static void write(uint16_t* p, vfloat v, bool past_cache) {
    const __m256i packed = _mm512_cvtps_ph((__m512)v, 0);
    past_cache ? _mm256_stream_si256((__m256i*)p, packed) : store(p, packed);
  }
#elif defined(__AVX2__)
  static vfloat read(const uint16_t* p) { return (vfloat)_mm256_cvtph_ps(load<__m128i>(p)); }
  static vhalf read_half(const uint16_t* p, int h) {
    return (vhalf)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)(p + h * HALF)));
  }
  static void write(uint16_t* p, vfloat v, bool past_cache) {
    const __m128i packed = _mm256_cvtps_ph((__m256)v, 0);
    past_cache ? _mm_stream_si128((__m128i*)p, packed) : store(p, packed);
  }
#else
  template <class V>
  static V read_lanes(const uint16_t* p) {
    V v;
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) v[i] = f16_to_float(p[i]);
    return v;
  }
  static vfloat read(const uint16_t* p) { return read_lanes<vfloat>(p); }
  static vhalf read_half(const uint16_t* p, int h) { return read_lanes<vhalf>(p + h * HALF); }
  static void write(uint16_t* p, vfloat v, bool) {
    for (int i = 0; i < WIDTH; ++i) p[i] = float_to_f16(v[i]);
  }
#endif
  static float read_one(const uint16_t* p) { return f16_to_float(*p); }
  static void write_one(uint16_t* p, float f) { *p = float_to_f16(f); }
};

inline void stream_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

// f(E{}) for the element type of a dtype.
template <class F>
inline void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(F32{});
    case DType::bf16:
      return f(BF16{});
    case DType::f16:
      return f(F16{});
  }
}

template <class E>
inline typename E::Bits* at(const Rows& r, int64_t sample, int64_t start) {
  return static_cast<typename E::Bits*>(r.data) + sample * r.stride + start;
}

// A tile in float32: the memory itself where it is float32, else a widened copy.
inline const float* widen(const Rows& r, int64_t sample, int64_t start, int64_t n, float* scratch) {
  if (r.dtype == DType::f32) return at<F32>(r, sample, start);
  with_element(r.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* src = at<E>(r, sample, start);
    int64_t i = 0;
    if constexpr (!std::is_same_v<E, F32>) {
      for (; i + WIDTH <= n; i += WIDTH) store(scratch + i, E::read(src + i));
      for (; i < n; ++i) scratch[i] = E::read_one(src + i);
    }
  });
  return scratch;
}

inline void narrow(const float* src, const Rows& r, int64_t sample, int64_t start, int64_t n) {
  with_element(r.dtype, [&](auto element) {
    using E = decltype(element);
    auto* dst = at<E>(r, sample, start);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) E::write(dst + i, load<vfloat>(src + i), false);
    for (; i < n; ++i) E::write_one(dst + i, src[i]);
  });
}

}  // namespace
}  // namespace pydiffuse
