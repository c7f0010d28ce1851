// Instructions that CUDA C++ has no name for. tests/cuda_host has its own file of this name, for
// the kernels compiled for the host.
#pragma once

namespace pydiffuse {
namespace {

// 2^x: relative error at most 2^-22; subnormal x and results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void prefetch(const void* p) {  // to the second-level cache
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

}  // namespace
}  // namespace pydiffuse
