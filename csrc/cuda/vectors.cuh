// Tiles of samples, and vectors of float32, bfloat16 and float16 memory.
//
// A vector is N consecutive elements of a row; each kernel is compiled for what its tensors allow:
//   N = 4            all are float32: one 16-byte access
//   N = 8, ANY       16-bit or mixed: one 16-byte access, two for a float32 tensor
//   N = 4, ANY       so many terms that registers run short: 8 bytes, 16 for a float32 tensor
//   N = 1, ANY       rows off a 16-byte boundary, and ragged ends: an element at a time
// A tensor's dtype is a kernel argument, so the choice is a uniform branch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../tensor.h"
#include "ptx.cuh"

namespace pydiffuse {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = 4096;  // elements that a block holds at a time: 16 per thread

// How the samples of a call fall into tiles and chunks: by n alone, so that no neighbour and no
// grid changes a bit of a result. A chunk is what one block sums; a sample has at most 512 of them.
struct Split {
  int64_t batch = 0, n = 0, tiles = 0;  // samples, elements and tiles in each
  int per = 1, chunks = 1;              // tiles in a chunk, chunks in a sample (1 even where n = 0)

  Split() = default;
  Split(int64_t batch_, int64_t n_) : batch(batch_), n(n_), tiles((n_ + TILE - 1) / TILE) {
    constexpr int64_t ALONE = 4, MOST = 512;
    per = static_cast<int>(tiles <= ALONE ? ALONE : (tiles + MOST - 1) / MOST);
    chunks = tiles == 0 ? 1 : static_cast<int>((tiles + per - 1) / per);
  }
};

// Vectors are handed round the threads: thread t takes t, t + THREADS, ... of each tile.
struct Tile {
  int64_t sample, start;  // its first element
  int left;               // elements in it; 0 past the end of the sample

  __device__ Tile(const Split& s, int64_t sample_, int64_t index)
      : sample(sample_), start(index * TILE) {
    left = static_cast<int>(max(int64_t(0), min(s.n - start, int64_t(TILE))));
  }
};

template <bool ANY>
__device__ __forceinline__ int bytes(DType dtype) {
  return !ANY || dtype == DType::f32 ? 4 : 2;
}

template <bool ANY>
__device__ __forceinline__ char* at(const Rows& r, const Tile& t) {
  return static_cast<char*>(r.data) + (t.sample * r.stride + t.start) * bytes<ANY>(r.dtype);
}

// N elements as they lie in memory: q[1] is the second half of 8 float32.
template <int N>
struct Raw {
  uint4 q[N == 8 ? 2 : 1];
};

// p: the vector's first element.
template <int N, bool ANY>
__device__ __forceinline__ Raw<N> load(const void* p, DType dtype) {
  Raw<N> raw;
  const bool wide = !ANY || dtype == DType::f32;
  if constexpr (N == 1) {
    raw.q[0].x = wide ? *static_cast<const uint32_t*>(p) : *static_cast<const uint16_t*>(p);
  } else if (N == 8 || wide) {
    raw.q[0] = *static_cast<const uint4*>(p);
    if (N == 8 && wide) raw.q[N == 8] = static_cast<const uint4*>(p)[1];
  } else {
    const uint2 half = *static_cast<const uint2*>(p);
    raw.q[0].x = half.x;
    raw.q[0].y = half.y;
  }
  return raw;
}

__device__ __forceinline__ float2 widen(uint32_t pair, DType dtype) {
  if (dtype == DType::bf16)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <int N, bool ANY>
__device__ __forceinline__ void widen(const Raw<N>& raw, DType dtype, float (&x)[N]) {
  uint32_t word[N == 8 ? 8 : 4];
#pragma unroll
  for (int i = 0; i < (N == 8 ? 2 : 1); ++i) {
    word[4 * i] = raw.q[i].x;
    word[4 * i + 1] = raw.q[i].y;
    word[4 * i + 2] = raw.q[i].z;
    word[4 * i + 3] = raw.q[i].w;
  }
  if (!ANY || dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __uint_as_float(word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = widen(word[i / 2], dtype);
      x[i] = pair.x;
      if (N > 1) x[N > 1 ? i + 1 : 0] = pair.y;
    }
  }
}

__device__ __forceinline__ uint32_t narrow(float lo, float hi, DType dtype) {  // to nearest even
  if (dtype == DType::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __half2 pair = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <int N, bool ANY>
__device__ __forceinline__ void store(void* p, DType dtype, const float (&x)[N]) {
  const bool wide = !ANY || dtype == DType::f32;
  if constexpr (N == 1) {
    if (wide)
      *static_cast<float*>(p) = x[0];
    else
      *static_cast<uint16_t*>(p) = static_cast<uint16_t>(narrow(x[0], 0.0f, dtype));
  } else if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      static_cast<float4*>(p)[i / 4] = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
    uint32_t pair[N / 2];
#pragma unroll
    for (int i = 0; i < N; i += 2) pair[i / 2] = narrow(x[i], x[i + 1], dtype);
    if constexpr (N == 8)
      *static_cast<uint4*>(p) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    else
      *static_cast<uint2*>(p) = make_uint2(pair[0], pair[1]);
  }
}

__device__ __forceinline__ double warp_sum(double v) {  // in a fixed order; every lane gets it
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

}  // namespace
}  // namespace pydiffuse
