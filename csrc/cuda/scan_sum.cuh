// Sums over what blocks left in workspace, in a fixed order.
#pragma once

#include <algorithm>

#include "scan_launch.cuh"

namespace pydiffuse {
namespace {

// out[row, i] = sum_j parts[row, j, i]
struct Sum {
  const float* parts;  // [rows, count, n]
  float* out;          // row r begins at (r / period) stride + (r % period) n
  int64_t rows, count, n;
  int64_t period, stride;

  __host__ __device__ int64_t tiles() const { return (n + 31) / 32; }  // of a row
};

constexpr int MAX_SUMS = 6;

struct SumArgs {
  Sum sum[MAX_SUMS];
  int sums = 0;

  void add(const Sum& s) {
    if (s.out && s.rows * s.n > 0) sum[sums++] = s;
  }
  int64_t blocks() const {
    int64_t all = 0;
    for (int i = 0; i < sums; ++i) all += sum[i].rows * sum[i].tiles();
    return all;
  }
};

// A block sums 32 columns of one row: each of its eight warps every eighth part, one after another,
// and then the eight warps' sums in turn.
__global__ void __launch_bounds__(THREADS) sum_kernel(const __grid_constant__ SumArgs a) {
  extern __shared__ float4 block_memory[];
  float* warps = reinterpret_cast<float*>(block_memory);  // [8, 32]
  int64_t block = blockIdx.x;
  int which = 0;
  while (block >= a.sum[which].rows * a.sum[which].tiles()) {
    block -= a.sum[which].rows * a.sum[which].tiles();
    ++which;
  }
  const Sum& s = a.sum[which];
  const int64_t row = block / s.tiles(), i = block % s.tiles() * 32 + threadIdx.x % 32;
  const float* parts = s.parts + row * s.count * s.n + i;
  float x = 0.0f;
  if (i < s.n) {
#pragma unroll 4
    for (int64_t j = threadIdx.x / 32; j < s.count; j += WARPS) x += parts[j * s.n];
  }
  warps[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= 32 || i >= s.n) return;
  for (int w = 1; w < WARPS; ++w) x += warps[w * 32 + threadIdx.x];
  s.out[row / s.period * s.stride + row % s.period * s.n + i] = x;
}

struct CopyArgs {
  float* to;
  const float* from;  // null: zeros
  int64_t n;
};

__global__ void __launch_bounds__(THREADS) copy_kernel(const __grid_constant__ CopyArgs a) {
  const int64_t all = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < a.n; i += all)
    a.to[i] = a.from ? a.from[i] : 0.0f;
}

inline void run_sums(const ScanLaunch& on, const SumArgs& a) {
  if (a.sums) on.launch(sum_kernel, a.blocks(), a, THREADS);
}

inline void run_copy(const ScanLaunch& on, float* to, const float* from, int64_t n) {
  if (n > 0 && to != from)
    on.launch(copy_kernel, std::min<int64_t>((n + THREADS - 1) / THREADS, 4096),
              CopyArgs{to, from, n});
}

}  // namespace
}  // namespace pydiffuse
