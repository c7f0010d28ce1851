// Which instruction set the kernels run on: the best this CPU has, capped by the environment
// variable ATEN_CPU_CAPABILITY (default, avx2, avx512), as in PyTorch.
#pragma once

#include <cstdlib>
#include <cstring>

namespace pydiffuse {

enum class Capability : int { baseline, avx2, avx512 };

inline Capability detect_capability() {
  Capability best = Capability::baseline;
#if defined(__x86_64__)
  // CPUs with AVX2 have F16C, which Clang 16 cannot be asked for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Capability::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      best = Capability::avx512;
  }
#endif
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (!cap) return best;
  Capability asked = best;
  if (!std::strcmp(cap, "default")) asked = Capability::baseline;
  if (!std::strcmp(cap, "avx2")) asked = Capability::avx2;
  return asked < best ? asked : best;
}

inline Capability capability() {
  static const Capability chosen = detect_capability();
  return chosen;
}

// Whether products of bfloat16 pairs (AVX512-BF16) are there, beside avx512.
inline bool multiplies_bf16() {
#if defined(__x86_64__)
  static const bool there = __builtin_cpu_supports("avx512bf16");
  return there && capability() == Capability::avx512;
#else
  return false;
#endif
}

inline const char* capability_name() {
  constexpr const char* name[] = {"default", "avx2", "avx512"};
  return name[static_cast<int>(capability())];
}

}  // namespace pydiffuse

// The table of kernels for this CPU, out of the copies of pydiffuse_<stem>.
#if defined(__x86_64__)
#define PYDIFFUSE_BEST(stem)                                                            \
  (pydiffuse::capability() == pydiffuse::Capability::avx512 ? pydiffuse_##stem##_avx512 \
   : pydiffuse::capability() == pydiffuse::Capability::avx2 ? pydiffuse_##stem##_avx2   \
                                                            : pydiffuse_##stem##_default)
#else
#define PYDIFFUSE_BEST(stem) pydiffuse_##stem##_default
#endif
