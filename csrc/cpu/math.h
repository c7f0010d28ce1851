// exp2, sigmoid and softplus of float32 vectors, to about an ulp.
#pragma once

#include "simd.h"

namespace pydiffuse {
namespace {

constexpr float LOG2E = 1.44269504088896341f;

inline vfloat splat(float x) { return x - vfloat{}; }  // + would turn -0 into 0, hence be code

// 2^t = 2^n 2^r with n = round(t): a polynomial for 2^r on [-1/2, 1/2], exact at 0, so that decays
// close to 1 are right to the last bit. Relative error 1.6e-7 at most. 2^-inf = 0, NaN stays NaN.
inline vfloat vexp2(vfloat t) {
#if defined(__AVX512F__)
  // vreduceps waits for what its result overwrites (seen on Zen 5): zeroing the register first
  // cuts the tie, without which exponentials in a loop run one after the other.
  vfloat r;
  asm("vpxord %x0, %x0, %x0\n\tvreduceps $0, %1, %0" : "=&v"(r) : "v"(t));
  const vfloat n = t - r;  // r = 0 at +-inf
#else
  constexpr float MAGIC = 0x1.8p23f;  // leaves round(t) in the low bits
  const vfloat z = t + MAGIC, r = t - (z - MAGIC);
#endif
  vfloat p = splat(1.326474e-3f);
  p = p * r + 9.671506e-3f;
  p = p * r + 5.5507341e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const vfloat y = (vfloat)((vint)p + ((vint)z << 23));
  const vfloat outside = t < 0.0f ? vfloat{} : t > 0.0f ? splat(__builtin_inff()) : t;
  return ((t > -126.0f) & (t < 128.0f)) ? y : outside;  // NaN is outside, and is t
#endif
}

inline vfloat vsigmoid(vfloat x) { return 1.0f / (1.0f + vexp2(x * -LOG2E)); }

// log(1 + e^x), x itself above 20. log1p(e) = 2 atanh(e / (2 + e)) keeps its digits for small e.
inline vfloat vsoftplus(vfloat x) {
  const vfloat magnitude = x < 0.0f ? -x : x;
  const vfloat e = vexp2(magnitude * -LOG2E);
  const vfloat s = e / (2.0f + e), q = s * s;
  vfloat p = splat(2.0f / 13);
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  const vfloat soft = p * s + (x < 0.0f ? vfloat{} : x);
  return x > 20.0f ? x : soft;
}

}  // namespace
}  // namespace pydiffuse
