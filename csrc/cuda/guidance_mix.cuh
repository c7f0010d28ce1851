// Linear combinations in float32: alone, and in one launch with the Gram pass before them.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "guidance_solve.cuh"

namespace pydiffuse {
namespace {

constexpr int padded(int terms) { return (terms + 3) / 4 * 4; }

template <int M, int J>
struct Coefficients {  // of one sample, in shared memory
  alignas(16) float c[J][padded(M)];
  float shift[J];
  int origin;

  // By all threads. rows: [outs, columns].
  __device__ void set(const MixArgs& a, int64_t sample, const double* rows) {
    for (int e = threadIdx.x; e < a.outs * a.terms; e += THREADS) {
      const int j = e / a.terms, m = e % a.terms;
      c[j][m] = static_cast<float>(rows[j * a.columns + a.column[m]]);
    }
    const int j = threadIdx.x;  // -0 + y = y, always
    if (j < a.outs) shift[j] = a.shift ? static_cast<float>(a.shift[sample * a.outs + j]) : -0.0f;
    if (j == 0) origin = a.preds ? static_cast<int>(rows[a.columns - 1]) : -1;
  }
};

// The first `preds` terms become their differences to x[O], except x[O].
template <int O, int N, int STEP, int M>
__device__ __forceinline__ void subtract(int preds, float (&x)[STEP][M][N]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m == O || m >= preds) continue;
#pragma unroll
    for (int s = 0; s < STEP; ++s)
#pragma unroll
      for (int i = 0; i < N; ++i) x[s][m][i] -= x[s][O][i];
  }
}

// The outputs of a tile. term(m, v): vector v of term m < terms. STEP vectors of every term are in
// registers before the first is stored, so an output may be one of the terms, position by position.
template <int N, bool ANY, int STEP, int M, int J, class Term>
__device__ __forceinline__ void sweep(const MixArgs& a, const Coefficients<M, J>& w, const Tile& t,
                                      int terms, Term term) {
#pragma unroll 1
  for (int v = threadIdx.x; v * N < t.left; v += STEP * THREADS) {
    Raw<N> raw[STEP][M];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int s = 0; s < STEP; ++s) {
        raw[s][m] = {};
        if (m < terms && (s == 0 || (v + s * THREADS) * N < t.left))
          raw[s][m] = term(m, v + s * THREADS);
      }
    float x[STEP][M][N];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int s = 0; s < STEP; ++s) widen<N, ANY>(raw[s][m], a.term[m].dtype, x[s][m]);
    if constexpr (M > 1) {
      if (w.origin == 0) subtract<0>(a.preds, x);
      if (w.origin == 1) subtract<1>(a.preds, x);
    }
#pragma unroll 1
    for (int j = 0; j < a.outs; ++j) {
      float c[padded(M)], y[STEP][N];
#pragma unroll
      for (int m = 0; m < M; m += 4) {
        const float4 four = reinterpret_cast<const float4&>(w.c[j][m]);
        c[m] = four.x;
        c[m + 1] = four.y;
        c[m + 2] = four.z;
        c[m + 3] = four.w;
      }
#pragma unroll
      for (int s = 0; s < STEP; ++s)
#pragma unroll
        for (int i = 0; i < N; ++i) y[s][i] = w.shift[j];
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (a.used[j] >> m & 1) {
#pragma unroll
          for (int s = 0; s < STEP; ++s)
#pragma unroll
            for (int i = 0; i < N; ++i) y[s][i] = fmaf(c[m], x[s][m][i], y[s][i]);
        }
      const DType type = a.out[j].dtype;
      char* out = at<ANY>(a.out[j], t);
#pragma unroll
      for (int s = 0; s < STEP; ++s)
        if (s == 0 || (v + s * THREADS) * N < t.left)
          store<N, ANY>(out + (v + s * THREADS) * N * bytes<ANY>(type), type, y[s]);
    }
  }
}

// Elements of each term that a thread has in flight; blocks that can then share a multiprocessor.
constexpr int mix_elements(int terms) { return terms <= 3 ? 16 : terms <= 6 ? 8 : 4; }
constexpr int mix_residency(int terms) { return terms <= 2 ? 3 : terms <= 6 ? 2 : 1; }

// The outputs of a tile, all terms from device memory.
template <int N, bool ANY, int M, int J>
__device__ __forceinline__ void sweep_memory(const MixArgs& a, const Coefficients<M, J>& w,
                                             const Tile& t, int terms) {
  const char* p[M];
#pragma unroll
  for (int m = 0; m < M; ++m)
    if (m < terms) p[m] = at<ANY>(a.term[m], t);
  constexpr int STEP = N == 1 ? 1 : mix_elements(M) / N;
  sweep<N, ANY, STEP>(a, w, t, terms, [&](int m, int v) {
    const DType type = a.term[m].dtype;
    return load<N, ANY>(p[m] + v * N * bytes<ANY>(type), type);
  });
}

// One pass over the terms, M of them (or up to M > 6). Blocks take runs of tiles, from the last on:
// what a Gram pass read last is still in the second-level cache. Floor: each term read and each
// output written once, so TCFG through gram_kernel and this reads 4 n elements and writes n.
template <int M, int N, bool ANY>
__global__ void __launch_bounds__(THREADS, mix_residency(M))
    mix_kernel(const __grid_constant__ MixArgs a) {
  __shared__ Coefficients<M, MAX_OUTS> w;
  const int terms = M > 6 ? a.terms : M;
  const int64_t tiles = a.split.tiles, all = a.split.batch * tiles;
  int64_t chosen = -1;
  for (int64_t run = (all - 1) / a.run - blockIdx.x; run >= 0; run -= gridDim.x) {
    int64_t item = min(all, (run + 1) * a.run) - 1, sample = item / tiles, index = item % tiles;
    for (; item >= run * a.run; --item) {
      if (chosen < 0 || (a.matrix && sample != chosen)) {
        __syncthreads();  // the last sample's coefficients have been used
        w.set(a, sample, a.matrix ? a.matrix + sample * a.outs * a.columns : a.fixed);
        __syncthreads();
        chosen = sample;
      }
      const Tile t(a.split, sample, index);
      if (a.vector && t.left % N == 0)
        sweep_memory<N, ANY>(a, w, t, terms);
      else
        sweep_memory<1, true>(a, w, t, terms);
      if (--index < 0) {
        index = tiles - 1;
        --sample;
      }
    }
  }
}

// A walk over consecutive tiles, through a chunk and on to the next.
struct Walk {
  int64_t sample;
  int chunk, index;  // of the sample; of the chunk

  __device__ Tile tile(const Split& s) const {
    return Tile(s, sample, int64_t(chunk) * s.per + index);
  }
  __device__ bool next(const Split& s) {  // true where a chunk ends
    if (++index < s.per) return false;
    index = 0;
    if (++chunk == s.chunks) {
      chunk = 0;
      ++sample;
    }
    return true;
  }
};

// Both passes in one launch: a block brings `hold` chunks of K predictions into shared memory,
// leaves their sums, and combines them from there. Where a sample is one chunk its block goes on
// alone; otherwise the launch is cooperative, holds every chunk of the call at once, and all blocks
// wait for each other in between. A thread reads only the words it brought. n is a multiple of N.
// Floor: each term read and each output written once, so TCFG reads 2 n elements and writes n.
template <int K, int N, bool ANY>
__global__ void __launch_bounds__(THREADS, 2) guide_kernel(const __grid_constant__ GuideArgs a) {
  constexpr int VECTORS = TILE / N / THREADS;
  constexpr int AHEAD = 3;  // tiles on their way while one is summed
  extern __shared__ uint4 words[];
  __shared__ Board<K> board;
  __shared__ Coefficients<K + 3, 3> w;
  const MixArgs& mix = a.mix;
  const Split& split = mix.split;
  const int chunks = split.chunks, width = a.partials.width, lanes = a.hold * a.lanes;
  double* warps = reinterpret_cast<double*>(words + lanes * a.planes * THREADS);
  const int64_t all = split.batch * chunks, stride = int64_t(gridDim.x) * a.hold;
  for (int64_t first = int64_t(blockIdx.x) * a.hold; first < all; first += stride) {
    const int held = static_cast<int>(min(int64_t(a.hold), all - first)), steps = held * split.per;
    const Walk start{first / chunks, static_cast<int>(first % chunks), 0};

    auto kept = [&](int lane, int i) {
      const uint4* word = words + (lane * a.planes + a.plane[i]) * THREADS + threadIdx.x;
      Raw<N> raw;
      raw.q[0] = word[0];
      if (N == 8 && mix.term[i].dtype == DType::f32) raw.q[N == 8] = word[THREADS];
      return raw;
    };

    Sums<K> sums;
    Walk ahead = start, walk = start;
    double* next = warps;  // [held, WARPS, width]
#pragma unroll 1
    for (int step = -AHEAD; step < steps; ++step) {
      if (step + AHEAD < steps) {
        const Tile t = ahead.tile(split);
        ahead.next(split);
#pragma unroll 1
        for (int m = K; m < mix.terms; ++m) {
          const int line = threadIdx.x * 128;
          if (line < t.left * bytes<ANY>(mix.term[m].dtype))
            prefetch(at<ANY>(mix.term[m], t) + line);
        }
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const DType type = mix.term[i].dtype;
          const char* p = at<ANY>(mix.term[i], t);
#pragma unroll
          for (int u = 0; u < VECTORS; ++u) {
            const int lane = (step + AHEAD) * VECTORS + u, v = u * THREADS + threadIdx.x;
            if (lane >= lanes) break;
            const bool there = v * N < t.left;  // else zeros, which add nothing, from nowhere
            const char* from =
                there ? p + v * N * bytes<ANY>(type) : static_cast<const char*>(mix.term[i].data);
            uint4* word = words + (lane * a.planes + a.plane[i]) * THREADS + threadIdx.x;
            __pipeline_memcpy_async(word, from, 16, there ? 0 : 16);
            if (N == 8 && type == DType::f32)
              __pipeline_memcpy_async(word + THREADS, from + 16, 16, there ? 0 : 16);
          }
        }
      }
      __pipeline_commit();
      if (step < 0) continue;
      __pipeline_wait_prior(AHEAD);
#pragma unroll(K < 4 ? VECTORS : 1)
      for (int u = 0; u < VECTORS; ++u) {
        if (step * VECTORS + u >= lanes) break;
        float x[K][N];
#pragma unroll
        for (int i = 0; i < K; ++i)
          widen<N, ANY>(kept(step * VECTORS + u, i), mix.term[i].dtype, x[i]);
        sums.add(x);
      }
      if (walk.next(split)) {
        sums.leave(next, width);
        next += WARPS * width;
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < held * width; e += THREADS) {
      const int c = start.chunk + e / width;
      const double sum = block_sum(warps + e / width * WARPS * width, width, e % width);
      if (chunks == 1)
        board.packed[e] = sum;  // one chunk is held
      else
        a.partials.data[((start.sample + c / chunks) * width + e % width) * chunks + c % chunks] =
            sum;
    }
    if (chunks > 1) cooperative_groups::this_grid().sync();

    walk = start;
    int64_t chosen = -1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Tile t = walk.tile(split);
      walk.next(split);
      if (t.sample != chosen) {
        __syncthreads();  // the last sample's coefficients have been used
        if (chunks > 1) add_chunks(a.partials, chunks, t.sample, board.packed);
        decide(a.rule, t.sample, board);
        __syncthreads();
        w.set(mix, t.sample, board.rows);
        __syncthreads();
        chosen = t.sample;
      }
      sweep<N, ANY, 8 / N>(mix, w, t, mix.terms, [&](int m, int v) {
        if (m < K) return kept(step * VECTORS + v / THREADS, m);
        const DType type = mix.term[m].dtype;
        return load<N, ANY>(at<ANY>(mix.term[m], t) + v * N * bytes<ANY>(type), type);
      });
    }
  }
}

}  // namespace
}  // namespace pydiffuse
