// Gram matrices and linear combinations, compiled once per instruction set.
//
// gram: products in float64, where a product of two float32 numbers is exact; so ||c - u||^2 can be
//   read off <c,c> - 2<c,u> + <u,u> however close c and u are, and nothing overflows.
// mix: float32 fused multiply-adds, one rounding at the output.
// Both walk an item tile by tile; float32 tiles are used where they lie, others are widened once.
#include "guidance.h"

#include <algorithm>

#include "simd.h"

namespace pydiffuse {
namespace {

constexpr int64_t TILE = 1024;
static_assert(CHUNK % TILE == 0 && TILE % WIDTH == 0);

// All pairs of K tiles at once; two halves of a vector keep 2 triangle(K) chains in flight.
template <int K, bool SUMS>
struct GramTile {
  static constexpr int PAIRS = triangle(K), TOTAL = stats(K, SUMS);
  vdouble acc[TOTAL][2] = {};

  void add(const float* const* p, int64_t i) {
    for (int h = 0; h < 2; ++h) {
      vdouble x[K];
      for (int a = 0; a < K; ++a) x[a] = load_double(p[a] + i + h * HALF);
      int e = 0;
      for (int a = 0; a < K; ++a)
        for (int b = a; b < K; ++b, ++e) acc[e][h] += x[a] * x[b];
      if constexpr (SUMS)
        for (int a = 0; a < K; ++a) acc[PAIRS + a][h] += x[a];
    }
  }
  void tile(const float* const* p, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) add(p, i);
    if (i == n) return;
    float tail[K][WIDTH] = {};  // zeros add nothing
    const float* q[K];
    for (int a = 0; a < K; ++a) {
      std::memcpy(tail[a], p[a] + i, (n - i) * sizeof(float));
      q[a] = tail[a];
    }
    add(q, 0);
  }
  void finish(double* out) const {
    for (int e = 0; e < TOTAL; ++e) out[e] = lane_sum(acc[e][0]) + lane_sum(acc[e][1]);
  }
};

template <int K, bool SUMS>
void gram_item(const GramArgs& a, int64_t item) {
  alignas(64) float scratch[K][TILE];
  const int64_t sample = item / a.chunks, first = item % a.chunks * CHUNK;
  const int64_t last = std::min(first + CHUNK, a.n);
  GramTile<K, SUMS> state;
  for (int64_t start = first; start < last; start += TILE) {
    const int64_t n = std::min(TILE, last - start);
    const float* p[K];
    for (int i = 0; i < K; ++i) p[i] = tile(a.p[i], sample, start, n, scratch[i]);
    state.tile(p, n);
  }
  state.finish(a.partial + item * stats(K, SUMS));
}

// Many predictions: pair by pair over tiles that stay in the first-level cache.
void gram_item_pairs(const GramArgs& a, int64_t item) {
  alignas(64) float scratch[MAX_PREDS + 1][TILE];
  const int64_t sample = item / a.chunks, first = item % a.chunks * CHUNK;
  const int64_t last = std::min(first + CHUNK, a.n);
  double* out = a.partial + item * stats(a.k, a.sums);
  std::fill(out, out + stats(a.k, a.sums), 0.0);
  for (int64_t start = first; start < last; start += TILE) {
    const int64_t n = std::min(TILE, last - start);
    const float* p[MAX_PREDS + 1];
    for (int i = 0; i < a.k; ++i) p[i] = tile(a.p[i], sample, start, n, scratch[i]);
    int e = 0;
    for (int i = 0; i < a.k; ++i)
      for (int j = i; j < a.k; ++j, ++e) {
        GramTile<2, false> pair;  // entry 1 is the mixed product; the compiler drops the others
        const float* q[2] = {p[i], p[j]};
        pair.tile(q, n);
        out[e] += lane_sum(pair.acc[1][0]) + lane_sum(pair.acc[1][1]);
      }
    if (!a.sums) continue;
    for (int i = 0; i < a.k; ++i, ++e) {
      double sum = 0;
      for (int64_t l = 0; l < n; ++l) sum += p[i][l];
      out[e] += sum;
    }
  }
}

template <int K>
void gram_items(const GramArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item)
    a.sums ? gram_item<K, true>(a, item) : gram_item<K, false>(a, item);
}

void gram(const GramArgs& a, int64_t begin, int64_t end) {
  switch (a.k) {
    case 1: return gram_items<1>(a, begin, end);
    case 2: return gram_items<2>(a, begin, end);
    case 3: return gram_items<3>(a, begin, end);
    case 4: return gram_items<4>(a, begin, end);
  }
  for (int64_t item = begin; item < end; ++item) gram_item_pairs(a, item);
}

// dst = start + sum_m c[m] term[m], where `start` is a constant or, if `more`, dst itself.
template <int M>
void weigh(const float* const* term, const float* c, float shift, bool more, int64_t n, float* dst,
           bool past_cache) {
  int64_t i = 0;
  vfloat w[M];
  for (int m = 0; m < M; ++m) w[m] = vfloat{} + c[m];
  auto value = [&](int64_t at) {
    vfloat y = more ? load<vfloat>(dst + at) : vfloat{} + shift;
    for (int m = 0; m < M; ++m) y += w[m] * load<vfloat>(term[m] + at);
    return y;
  };
  if (past_cache && reinterpret_cast<uintptr_t>(dst) % sizeof(vfloat) == 0) {
    for (; i + WIDTH <= n; i += WIDTH) stream(dst + i, value(i));
  } else {
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
      const vfloat lo = value(i), hi = value(i + WIDTH);
      store(dst + i, lo);
      store(dst + i + WIDTH, hi);
    }
  }
  for (; i < n; ++i) {
    float y = more ? dst[i] : shift;
    for (int m = 0; m < M; ++m) y += c[m] * term[m][i];
    dst[i] = y;
  }
}

using Weigh = void (*)(const float* const*, const float*, float, bool, int64_t, float*, bool);
constexpr int GROUP = 6;  // terms per sweep; more are added on top
constexpr Weigh WEIGH[GROUP + 1] = {nullptr, weigh<1>, weigh<2>, weigh<3>,
                                    weigh<4>, weigh<5>, weigh<6>};

// The rows of a sample's matrix, with the unused terms left out.
struct Row {
  int terms = 0;
  int index[MAX_TERMS];
  float c[MAX_TERMS];
  float shift;
};

void mix_item(const MixArgs& a, int64_t item, float (*scratch)[TILE]) {
  const int64_t sample = item / a.chunks, first = item % a.chunks * CHUNK;
  const int64_t last = std::min(first + CHUNK, a.n);
  Row row[MAX_OUTS];
  for (int j = 0; j < a.outs; ++j) {
    row[j].shift = a.shift ? float(a.shift[sample * a.outs + j]) : -0.0f;  // -0 + y = y, always
    for (int m = 0; m < a.terms; ++m)
      if (a.used[j] >> m & 1) {
        row[j].index[row[j].terms] = m;
        row[j].c[row[j].terms++] = float(a.matrix[(sample * a.outs + j) * a.terms + m]);
      }
  }
  // A single float32 output is written in place: it may be one of the terms, position by position.
  // Several wait in scratch until every one of them has read its terms.
  float(*result)[TILE] = scratch + a.terms;
  for (int64_t start = first; start < last; start += TILE) {
    const int64_t n = std::min(TILE, last - start);
    const float* term[MAX_TERMS];
    for (int m = 0; m < a.terms; ++m) term[m] = tile(a.term[m], sample, start, n, scratch[m]);
    float* dst[MAX_OUTS];
    for (int j = 0; j < a.outs; ++j) {
      const Rows& out = a.out[j];
      const bool direct = a.outs == 1 && out.dtype == DType::f32 && row[j].terms <= GROUP;
      dst[j] = direct ? static_cast<float*>(out.data) + sample * out.stride + start : result[j];
      if (row[j].terms == 0) std::fill(dst[j], dst[j] + n, row[j].shift);
      for (int m = 0; m < row[j].terms; m += GROUP) {
        const int count = std::min(GROUP, row[j].terms - m);
        const float* used[GROUP];
        for (int i = 0; i < count; ++i) used[i] = term[row[j].index[m + i]];
        WEIGH[count](used, row[j].c + m, row[j].shift, m > 0, n, dst[j], direct && a.stream);
      }
    }
    for (int j = 0; j < a.outs; ++j) {
      if (dst[j] != result[j]) continue;
      const Rows& out = a.out[j];
      const int64_t offset = sample * out.stride + start;
      if (out.dtype == DType::f32) {
        std::memcpy(static_cast<float*>(out.data) + offset, result[j], n * sizeof(float));
      } else {
        narrow(result[j], out.dtype, n, static_cast<uint16_t*>(out.data) + offset);
      }
    }
  }
}

// Backwards: what the Gram pass read last is still in this core's cache.
void mix(const MixArgs& a, int64_t begin, int64_t end) {
  alignas(64) float scratch[MAX_TERMS + MAX_OUTS][TILE];
  for (int64_t item = end - 1; item >= begin; --item) mix_item(a, item, scratch);
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace pydiffuse

#define PYDIFFUSE_JOIN_(a, b) a##b
#define PYDIFFUSE_JOIN(a, b) PYDIFFUSE_JOIN_(a, b)
extern "C" __attribute__((visibility("hidden"))) const pydiffuse::GuidanceKernels PYDIFFUSE_JOIN(
    pydiffuse_guidance_, PYDIFFUSE_ISA) = {pydiffuse::gram, pydiffuse::mix};
