// From a sample's statistics to the coefficients of its combinations: scalar work in float64.
#pragma once

#include "guidance_gram.cuh"

namespace pydiffuse {
namespace {

__device__ void sample_params(const RuleArgs& r, int64_t sample, double* params) {
  for (int i = threadIdx.x; i < r.nparams; i += blockDim.x) {
    double value = r.params[i];
    for (int c = 0; c < r.ncolumns; ++c)
      if (r.columns[c] == i) value = r.varied[sample * r.ncolumns + c];
    params[i] = value;
  }
}

// A sample on its way from statistics to coefficients, in shared memory; up to K predictions.
template <int K>
struct Board {
  double packed[stats(K, true)], gram[K * K], sums[K], params[MAX_PARAMS], c[K], rows[3 * (K + 4)];
};

// By one thread. One function for all kernels, so that they agree to the last bit.
__device__ __noinline__ void decide(const RuleArgs& r, const double* packed, double* gram,
                                    double* sums, const double* params, double* c, double* rows) {
  if (r.curved) unpack(r.k, packed, r.rescaled, gram, sums);
  coefficients(r.rule, Sample<double>{r.k, r.n, gram, sums, params, r.rescaled}, c);
  mix_rows(r.k, r.has, r.emit, params, c, rows);
}

// By all threads; board.packed may have been filled since the last barrier. One must follow.
template <int K>
__device__ void decide(const RuleArgs& r, int64_t sample, Board<K>& board) {
  sample_params(r, sample, board.params);
  __syncthreads();
  if (threadIdx.x == 0)
    decide(r, board.packed, board.gram, board.sums, board.params, board.c, board.rows);
}

// The coefficients of each sample, in a launch of their own: a block per sample.
__global__ void __launch_bounds__(THREADS) solve_kernel(const __grid_constant__ SolveArgs a) {
  __shared__ Board<MAX_PREDS> board;
  for (int64_t sample = blockIdx.x; sample < a.split.batch; sample += gridDim.x) {
    if (a.rule.curved) add_chunks(a.partials, a.split.chunks, sample, board.packed);
    decide(a.rule, sample, board);
    __syncthreads();
    for (int e = threadIdx.x; e < a.rows; e += THREADS)
      a.matrix[sample * a.rows + e] = board.rows[e];
    __syncthreads();
  }
}

// The backward's coefficients: a block per sample, a thread per part (see vjp_part).
constexpr int VJP_THREADS = 64;

__global__ void __launch_bounds__(VJP_THREADS) vjp_kernel(const __grid_constant__ VjpArgs a) {
  __shared__ double packed[MAX_STATS], gram[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], dc[MAX_PREDS],
      params[MAX_PARAMS];
  __shared__ double2 scratch[VJP_THREADS][MAX_PREDS];
  static_assert(sizeof(Dual) == sizeof(double2));
  const RuleArgs& r = a.rule;
  const int k = r.k, parts = vjp_parts(k, a.dvaried ? r.ncolumns : 0);
  for (int64_t sample = blockIdx.x; sample < a.split.batch; sample += gridDim.x) {
    sample_params(r, sample, params);
    if (a.partials.data)
      add_chunks(a.partials, a.split.chunks, sample, packed);
    else
      for (int e = threadIdx.x; e < MAX_STATS; e += VJP_THREADS) packed[e] = 0;
    __syncthreads();
    if (threadIdx.x == 0) unpack_vjp(k, packed, r.rescaled, gram, sums, dc);
    __syncthreads();
    const Sample<Dual> s{k, r.n, gram, sums, params, r.rescaled};
    for (int part = threadIdx.x; part < parts; part += VJP_THREADS)
      vjp_part(part, r.rule, s, dc, r.columns, a.matrix + sample * k * (k + 1),
               a.shift + sample * k, a.dvaried ? a.dvaried + sample * r.ncolumns : nullptr,
               reinterpret_cast<Dual*>(scratch[threadIdx.x]));
    __syncthreads();
  }
}

}  // namespace
}  // namespace pydiffuse
