// Gram matrices in float64, and the arguments of all the CUDA kernels of guidance.
//
// A sum is taken in one order everywhere: a thread's elements, the lanes of a warp, the warps of a
// block (a chunk), the chunks of a sample. So every way through the kernels gives one result.
#pragma once

#include "../guidance_rules.h"
#include "vectors.cuh"

namespace pydiffuse {
namespace {

struct Partials {  // what the blocks of a Gram pass leave for the next
  double* data;    // [batch, width, chunks], or null: there was no Gram pass
  int width;       // stats(k, sums)
};

struct GramArgs {
  Split split;
  int k;
  bool sums, vector;  // vector: all rows lie on 16-byte boundaries
  Rows p[MAX_PREDS + 1];
  Partials partials;
};

struct RuleArgs {
  Rule rule;
  int k, has, emit;
  bool rescaled, curved;
  double n, params[MAX_PARAMS];
  int nparams, ncolumns;
  const double* varied;  // [batch, ncolumns]
  int64_t columns[MAX_PARAMS];
};

struct MixArgs {  // out_j = shift_j + sum_m c_jm term_m
  Split split;
  int terms, outs;
  int run;  // tiles that a block takes one after the other
  bool vector;
  Rows term[MAX_TERMS], out[MAX_OUTS];
  uint32_t used[MAX_OUTS];  // bit m: term m appears in out_j (a zero coefficient still counts)
  const double* matrix;     // [batch, outs, columns], or null: `fixed` holds for all samples
  double fixed[3 * (MAX_TERMS + 1)];  // [outs, columns]
  const double* shift;                // [batch, outs], or null
  int columns;
  int preds;                  // leading terms that are summed around one of them, if any: the last
  uint8_t column[MAX_TERMS];  // column is their origin (guidance_rules.h); the column of each term
};

struct GuideArgs {  // mix.term: the predictions, then the terms of the update
  MixArgs mix;
  RuleArgs rule;
  Partials partials;
  int hold;           // chunks that a block keeps in shared memory
  int lanes, planes;  // 16-byte words per thread of each: [hold, lanes, planes][THREADS]
  uint8_t plane[4];   // the first plane of each prediction
};

static_assert(sizeof(GuideArgs) <= 4096, "kernel arguments are passed by value");

struct SolveArgs {
  Split split;
  RuleArgs rule;
  Partials partials;
  double* matrix;  // [batch, rows]
  int rows;        // outs * columns
};

struct VjpArgs {
  Split split;
  RuleArgs rule;
  Partials partials;  // of (p_0 .. p_{k-1}, y)
  double* matrix;     // [batch, k, k + 1]
  double* shift;      // [batch, k]
  double* dvaried;    // [batch, ncolumns], or null
};

struct FinishArgs {
  Split split;
  int k;
  Partials partials;
  double* gram;  // [batch, k, k]
  double* sums;  // [batch, k], or null
};

// A thread's sums over K rows: of the products, exact in float64 (upper triangle); of the rows.
template <int K>
struct Sums {
  static constexpr int PAIRS = triangle(K), TOTAL = stats(K, true);
  double acc[TOTAL] = {};

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[K][N]) {
#pragma unroll
    for (int l = 0; l < N; ++l) {
      double d[K];
#pragma unroll
      for (int i = 0; i < K; ++i) d[i] = x[i][l];
      int e = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int j = i; j < K; ++j, ++e) acc[e] = fma(d[i], d[j], acc[e]);
        acc[PAIRS + i] += d[i];
      }
    }
  }
  // A tile that vectors do not fit, by elements, in the order in which vectors would be added.
  template <int N, bool ANY>
  __device__ __forceinline__ void add_ragged(const char* const (&p)[K], const DType (&type)[K],
                                             int left) {
#pragma unroll 1
    for (int v = threadIdx.x; v * N < left; v += THREADS)
#pragma unroll 1
      for (int l = v * N; l < min(left, v * N + N); ++l) {
        float x[K][1];
#pragma unroll
        for (int i = 0; i < K; ++i)
          widen<1, ANY>(load<1, ANY>(p[i] + l * bytes<ANY>(type[i]), type[i]), type[i], x[i]);
        add(x);
      }
  }
  // warps: [WARPS][width]; a later barrier makes them visible.
  __device__ __forceinline__ void leave(double* warps, int width) {
#pragma unroll
    for (int e = 0; e < TOTAL; ++e) {
      const double sum = warp_sum(acc[e]);
      if (e < width && threadIdx.x % 32 == 0) warps[threadIdx.x / 32 * width + e] = sum;
      acc[e] = 0;
    }
  }
};

__device__ __forceinline__ double block_sum(const double* warps, int width, int e) {
  double sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += warps[w * width + e];
  return sum;
}

// More than four rows are taken by twos: a block holds two of the twos, and owns the products
// between them; products within a two belong to the first pair of twos in which it stands.
constexpr int gram_blocks(int k) { return k <= 4 ? 1 : triangle((k + 1) / 2 - 1); }

template <int K>
struct Subset {
  int k, first, second;  // the twos, for k > 4

  __device__ Subset(int k_, int block) : k(k_), first(0), second(1) {
    if (k <= 4) return;
    triangle_entry((k + 1) / 2 - 1, block, &first, &second);
    ++second;
  }
  __device__ int row(int i) const {
    if (K < 4 || k <= 4) return i;
    return min(i < 2 ? 2 * first + i : 2 * second + i - 2, k - 1);
  }
  // Where entry e of these K rows stands in the statistics of all; -1: it is another block's.
  __device__ int entry(int e, bool sums) const {
    int i = e - Sums<K>::PAIRS, j = i;
    const bool sum = i >= 0;
    if (!sum) triangle_entry(K, e, &i, &j);
    if (K == 4 && k > 4) {
      const bool last = second == (k + 1) / 2 - 1;
      if (j < 2 && second != first + 1) return -1;
      if (i >= 2 && !(last && second == first + 1)) return -1;
      if (j >= 2 && 2 * second + j - 2 >= k) return -1;
    }
    i = row(i);
    j = row(j);
    if (sum) return sums ? triangle(k) + i : -1;
    return i * k - i * (i - 1) / 2 + j - i;
  }
};

// The first pass. A block takes a chunk (of some rows, where there are more than four), reads each
// of its elements once and leaves the chunk's sums. Floor: k n elements read.
template <int K, int N, bool ANY>
__global__ void __launch_bounds__(THREADS, K <= 2 ? 3 : 2)
    gram_kernel(const __grid_constant__ GramArgs a) {
  constexpr int VECTORS = TILE / N / THREADS, TOTAL = Sums<K>::TOTAL;
  constexpr int FLIGHT = K * VECTORS > 8 ? VECTORS / 2 : VECTORS;  // vectors of a row in flight
  __shared__ double warps[WARPS * TOTAL];
  const int blocks = gram_blocks(a.k), chunks = a.split.chunks;
  const int64_t all = a.split.batch * chunks * blocks;
  for (int64_t work = blockIdx.x; work < all; work += gridDim.x) {
    const Subset<K> subset(a.k, static_cast<int>(work % blocks));
    const int64_t sample = work / blocks / chunks;
    const int chunk = static_cast<int>(work / blocks % chunks);
    Sums<K> sums;
    for (int index = 0; index < a.split.per; ++index) {
      const Tile t(a.split, sample, int64_t(chunk) * a.split.per + index);
      if (t.left == 0) break;
      const char* p[K];
      DType type[K];
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const Rows& r = a.p[subset.row(i)];
        p[i] = at<ANY>(r, t);
        type[i] = r.dtype;
      }
      if (!a.vector || t.left % N != 0) {
        sums.template add_ragged<N, ANY>(p, type, t.left);
        continue;
      }
#pragma unroll
      for (int from = 0; from < VECTORS; from += FLIGHT) {
        Raw<N> raw[FLIGHT][K];
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
          const int v = (from + u) * THREADS + threadIdx.x;
#pragma unroll
          for (int i = 0; i < K; ++i) {
            raw[u][i] = {};
            if (v * N < t.left)
              raw[u][i] = load<N, ANY>(p[i] + v * N * bytes<ANY>(type[i]), type[i]);
          }
        }
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
          float x[K][N];
#pragma unroll
          for (int i = 0; i < K; ++i) widen<N, ANY>(raw[u][i], type[i], x[i]);
          sums.add(x);
        }
      }
    }
    sums.leave(warps, TOTAL);
    __syncthreads();
    if (threadIdx.x < TOTAL) {
      const int e = subset.entry(threadIdx.x, a.sums);
      if (e >= 0)
        a.partials.data[(sample * a.partials.width + e) * chunks + chunk] =
            block_sum(warps, TOTAL, threadIdx.x);
    }
    __syncthreads();
  }
}

// packed [width]: a sample's statistics; a warp adds the chunks of an entry. A barrier must follow.
__device__ void add_chunks(const Partials& p, int chunks, int64_t sample, double* packed) {
  for (int e = threadIdx.x / 32; e < p.width; e += blockDim.x / 32) {
    const double* part = p.data + (sample * p.width + e) * chunks;
    double sum = 0;
#pragma unroll 8
    for (int c = threadIdx.x % 32; c < chunks; c += 32) sum += __ldcg(part + c);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) packed[e] = sum;
  }
}

// The Gram op: a block adds the chunks of a sample and one thread writes the matrix out.
__global__ void __launch_bounds__(THREADS) finish_kernel(const __grid_constant__ FinishArgs a) {
  __shared__ double packed[MAX_STATS], unused[MAX_PREDS];
  for (int64_t sample = blockIdx.x; sample < a.split.batch; sample += gridDim.x) {
    add_chunks(a.partials, a.split.chunks, sample, packed);
    __syncthreads();
    if (threadIdx.x == 0)
      unpack(a.k, packed, a.sums != nullptr, a.gram + sample * a.k * a.k,
             a.sums ? a.sums + sample * a.k : unused);
    __syncthreads();
  }
}

}  // namespace
}  // namespace pydiffuse
