// CUDA C++ for the host compiler: what kernels may say. A thread is a fiber (../fibers.h); a
// barrier or a shuffle is a call that comes back when the other threads have arrived, with the
// place it was called from, by which divergence is told.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cuda_host {

using Where = std::source_location;

// Of the running thread; set before it goes on.
inline uint3 thread_index{}, block_index{};
inline dim3 block_size, grid_size;

void sync_block(const Where& where);
void sync_warp(unsigned mask, const Where& where);
void sync_grid(const Where& where);
// Every lane of the mask gives a word; gives the words of all 32 lanes.
const uint64_t* exchange(unsigned mask, uint64_t word, const Where& where);

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t align);

// A __shared__ variable, as a struct of one member (../build.py makes one of each declaration).
// Every block has its own; it begins as NaN.
template <class Variable>
Variable& shared() {
  static const char key = 0;
  return *static_cast<Variable*>(static_shared(&key, sizeof(Variable), alignof(Variable)));
}

template <class To, class From>
To bits(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

inline unsigned lane() {
  return (thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) % 32;
}

}  // namespace cuda_host

#define threadIdx ::cuda_host::thread_index
#define blockIdx ::cuda_host::block_index
#define blockDim ::cuda_host::block_size
#define gridDim ::cuda_host::grid_size
constexpr int warpSize = 32;

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::sync_block(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::sync_warp(mask, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              cuda_host::Where where = cuda_host::Where::current()) {
  const int first = static_cast<int>(cuda_host::lane()) / width * width;
  return cuda_host::bits<T>(
      cuda_host::exchange(mask, cuda_host::bits<uint64_t>(value), where)[first + lane % width]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  cuda_host::Where where = cuda_host::Where::current()) {
  const int mine = static_cast<int>(cuda_host::lane()), from = mine ^ lanes;
  const uint64_t* words = cuda_host::exchange(mask, cuda_host::bits<uint64_t>(value), where);
  return cuda_host::bits<T>(words[from / width <= mine / width ? from : mine]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   cuda_host::Where where = cuda_host::Where::current()) {
  const int mine = static_cast<int>(cuda_host::lane()), from = mine + static_cast<int>(lanes);
  const uint64_t* words = cuda_host::exchange(mask, cuda_host::bits<uint64_t>(value), where);
  return cuda_host::bits<T>(words[from / width == mine / width ? from : mine]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 cuda_host::Where where = cuda_host::Where::current()) {
  const int mine = static_cast<int>(cuda_host::lane()), from = mine - static_cast<int>(lanes);
  const uint64_t* words = cuda_host::exchange(mask, cuda_host::bits<uint64_t>(value), where);
  return cuda_host::bits<T>(words[from >= mine / width * width ? from : mine]);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              cuda_host::Where where = cuda_host::Where::current()) {
  const uint64_t* words = cuda_host::exchange(mask, vote != 0, where);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(words[i] & 1) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int vote,
                      cuda_host::Where where = cuda_host::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      cuda_host::Where where = cuda_host::Where::current()) {
  return __ballot_sync(mask, vote, where) == mask;
}

// Loads and stores that only say which cache they want.
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __uint_as_float(unsigned x) { return cuda_host::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host::bits<unsigned>(x); }

// Never contracted into the operations around them.
__noinline__ inline float __fadd_rn(float x, float y) { return x + y; }
__noinline__ inline float __fmul_rn(float x, float y) { return x * y; }

// As documented: 0 for 2^126 < |y| < 2^128.
inline float __fdividef(float x, float y) {
  if (std::fabs(y) > 0x1p126f && std::isfinite(y)) return std::isinf(x) ? NAN : 0.0f;
  return x / y;
}
