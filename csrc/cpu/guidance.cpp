// Gram matrices and linear combinations, compiled once per instruction set.
//
// gram: products in float64, where a product of two float32 numbers is exact; so ||c - u||^2 can be
//   read off <c,c> - 2<c,u> + <u,u> however close c and u are, and nothing overflows.
// mix: float32 fused multiply-adds, one rounding at the output.
// Tensors of one dtype are read in that dtype, straight from memory. Where dtypes are mixed
// (bfloat16 predictions, a float32 latent) each is widened, a tile at a time, in the first-level
// cache.
#include "guidance.h"

#include <algorithm>

#include "simd.h"

namespace pydiffuse {
namespace {

constexpr int64_t TILE = 1024;
static_assert(CHUNK % TILE == 0 && TILE % WIDTH == 0);

bool same_dtype(const Rows* r, int count, DType dtype) {
  return std::all_of(r, r + count, [&](const Rows& x) { return x.dtype == dtype; });
}

// All pairs of K rows at once; two halves of a vector keep 2 triangle(K) chains in flight.
template <int K, bool SUMS>
struct GramSums {
  static constexpr int PAIRS = triangle(K), TOTAL = stats(K, SUMS);
  vdouble acc[TOTAL][2] = {};

  template <class E>
  void add(const typename E::Bits* const* p, int64_t i) {
    for (int h = 0; h < 2; ++h) {
      vdouble x[K];
      for (int a = 0; a < K; ++a) x[a] = widened(E::read_half(p[a] + i, h));
      int e = 0;
      for (int a = 0; a < K; ++a)
        for (int b = a; b < K; ++b, ++e) acc[e][h] += x[a] * x[b];
      if constexpr (SUMS)
        for (int a = 0; a < K; ++a) acc[PAIRS + a][h] += x[a];
    }
  }
  template <class E>
  void add_all(const typename E::Bits* const* p, int64_t n) {
    int64_t i = 0;
    GramSums sums = *this;  // in registers: p might point at *this
    for (; i + WIDTH <= n; i += WIDTH) sums.template add<E>(p, i);
    *this = sums;
    if (i == n) return;
    typename E::Bits tail[K][WIDTH] = {};  // zeros add nothing
    const typename E::Bits* q[K];
    for (int a = 0; a < K; ++a) {
      std::copy(p[a] + i, p[a] + n, tail[a]);
      q[a] = tail[a];
    }
    add<E>(q, 0);
  }
  void finish(double* out) const {
    for (int e = 0; e < TOTAL; ++e) out[e] = lane_sum(acc[e][0]) + lane_sum(acc[e][1]);
  }
};

// The part of a sample that an item stands for.
struct Part {
  int64_t sample, first, last;
  template <class Args>
  Part(const Args& a, int64_t item)
      : sample(item / a.chunks),
        first(item % a.chunks * CHUNK),
        last(std::min(first + CHUNK, a.n)) {}
};

template <int K, bool SUMS>
void gram_item(const GramArgs& a, int64_t item) {
  const Part part(a, item);
  GramSums<K, SUMS> sums;
  if (same_dtype(a.p, K, a.p[0].dtype)) {
    with_element(a.p[0].dtype, [&](auto element) {
      using E = decltype(element);
      const typename E::Bits* p[K];
      for (int i = 0; i < K; ++i) p[i] = at<E>(a.p[i], part.sample, part.first);
      sums.template add_all<E>(p, part.last - part.first);
    });
  } else {
    alignas(64) float scratch[K][TILE];
    for (int64_t start = part.first; start < part.last; start += TILE) {
      const int64_t n = std::min(TILE, part.last - start);
      const float* p[K];
      for (int i = 0; i < K; ++i) p[i] = widen(a.p[i], part.sample, start, n, scratch[i]);
      sums.template add_all<F32>(p, n);
    }
  }
  sums.finish(a.partial + item * stats(K, SUMS));
}

// Many predictions: pair by pair over tiles that stay in the first-level cache.
void gram_item_pairs(const GramArgs& a, int64_t item) {
  alignas(64) float scratch[MAX_PREDS + 1][TILE];
  const Part part(a, item);
  double* out = a.partial + item * stats(a.k, a.sums);
  std::fill(out, out + stats(a.k, a.sums), 0.0);
  for (int64_t start = part.first; start < part.last; start += TILE) {
    const int64_t n = std::min(TILE, part.last - start);
    const float* p[MAX_PREDS + 1];
    for (int i = 0; i < a.k; ++i) p[i] = widen(a.p[i], part.sample, start, n, scratch[i]);
    int e = 0;
    for (int i = 0; i < a.k; ++i)
      for (int j = i; j < a.k; ++j, ++e) {
        GramSums<2, false> pair;  // entry 1 is the mixed product; the compiler drops the others
        const float* q[2] = {p[i], p[j]};
        pair.add_all<F32>(q, n);
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
    case 1:
      return gram_items<1>(a, begin, end);
    case 2:
      return gram_items<2>(a, begin, end);
    case 3:
      return gram_items<3>(a, begin, end);
    case 4:
      return gram_items<4>(a, begin, end);
  }
  for (int64_t item = begin; item < end; ++item) gram_item_pairs(a, item);
}

// A sum of terms: start + sum_m c[m] (term[m] - around), where `start` is a constant or, if `more`,
// what dst holds; terms with `apart` are taken as they are, and all of them if nothing is `around`.
template <class Bits>
struct Sum {
  const Bits* const* term;
  const float* c;
  const bool* apart;
  const Bits* around;
  float shift;
  bool more;
};

template <class E, int M, bool AROUND>
void weigh(const Sum<typename E::Bits>& sum, int64_t n, typename E::Bits* dst, bool past_cache) {
  const auto [term, c, apart, around, shift, more] = sum;
  int64_t i = 0;
  vfloat w[M];
  vint minus[M];
  for (int m = 0; m < M; ++m) {
    w[m] = vfloat{} + c[m];
    minus[m] = vint{} - (AROUND && !apart[m]);
  }
  auto value = [&](int64_t at) {
    vfloat y = more ? E::read(dst + at) : vfloat{} + shift;
    const vint o = AROUND ? (vint)E::read(around + at) : vint{};
    for (int m = 0; m < M; ++m) {
      const vfloat x = E::read(term[m] + at);
      y = fused(w[m], AROUND ? x - (vfloat)(o & minus[m]) : x, y);
    }
    return y;
  };
  if (past_cache && reinterpret_cast<uintptr_t>(dst) % (WIDTH * sizeof *dst) == 0) {
    for (; i + WIDTH <= n; i += WIDTH) E::write(dst + i, value(i), true);
  } else {
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
      const vfloat lo = value(i), hi = value(i + WIDTH);
      E::write(dst + i, lo, false);
      E::write(dst + i + WIDTH, hi, false);
    }
  }
  for (; i < n; ++i) {
    float y = more ? E::read_one(dst + i) : shift;
    const float o = AROUND ? E::read_one(around + i) : 0;
    for (int m = 0; m < M; ++m)
      y = fused(c[m], E::read_one(term[m] + i) - (AROUND && !apart[m] ? o : 0), y);
    E::write_one(dst + i, y);
  }
}

constexpr int GROUP = 6;  // terms per sweep; more are added on top, in float32

template <class E, bool AROUND>
void weigh(int terms, const Sum<typename E::Bits>& sum, int64_t n, typename E::Bits* dst,
           bool past_cache) {
  using Sweep = void (*)(const Sum<typename E::Bits>&, int64_t, typename E::Bits*, bool);
  static constexpr Sweep SWEEP[GROUP] = {weigh<E, 1, AROUND>, weigh<E, 2, AROUND>,
                                         weigh<E, 3, AROUND>, weigh<E, 4, AROUND>,
                                         weigh<E, 5, AROUND>, weigh<E, 6, AROUND>};
  SWEEP[terms - 1](sum, n, dst, past_cache);
}
template <class E>
void weigh(int terms, const Sum<typename E::Bits>& sum, int64_t n, typename E::Bits* dst,
           bool past_cache) {
  sum.around ? weigh<E, true>(terms, sum, n, dst, past_cache)
             : weigh<E, false>(terms, sum, n, dst, past_cache);
}

// A row of a sample's matrix, with the unused terms left out.
struct Row {
  int terms = 0;
  int index[MAX_TERMS];
  float c[MAX_TERMS];
  bool apart[MAX_TERMS];  // not one of those that are summed around `around`
  int around = -1;
  float shift;

  Row() = default;
  Row(const MixArgs& a, int64_t sample, int j)
      : shift(a.shift ? float(a.shift[sample * a.outs + j]) : -0.0f) {  // -0 + y = y, always
    const double* row = a.matrix + (sample * a.outs + j) * a.columns;
    if (a.preds) around = int(row[a.terms]);
    for (int m = 0; m < a.terms; ++m)
      if (a.used[j] >> m & 1) {
        index[terms] = m;
        apart[terms] = m == around || m >= a.preds;
        c[terms++] = float(row[m]);
      }
  }
};

// One dtype throughout, and no output that another output still needs to read: each output is
// written where it belongs, as it is computed.
template <class E>
void mix_item_in_place(const MixArgs& a, const Part& part, const Row* row) {
  for (int64_t start = part.first; start < part.last; start += TILE) {
    const int64_t n = std::min(TILE, part.last - start);
    for (int j = 0; j < a.outs; ++j) {
      const typename E::Bits* term[GROUP];
      for (int m = 0; m < row[j].terms; ++m)
        term[m] = at<E>(a.term[row[j].index[m]], part.sample, start);
      const int o = row[j].around;
      weigh<E>(row[j].terms,
               {term, row[j].c, row[j].apart,
                o < 0 ? nullptr : at<E>(a.term[o], part.sample, start), row[j].shift, false},
               n, at<E>(a.out[j], part.sample, start), a.stream);
    }
  }
}

// Any dtypes, any number of terms, outputs that may be terms of each other: results wait in float32
// until all of them have read their terms.
void mix_item_by_scratch(const MixArgs& a, const Part& part, const Row* row,
                         float (*scratch)[TILE]) {
  float (*result)[TILE] = scratch + a.terms;
  for (int64_t start = part.first; start < part.last; start += TILE) {
    const int64_t n = std::min(TILE, part.last - start);
    const float* term[MAX_TERMS];
    for (int m = 0; m < a.terms; ++m) term[m] = widen(a.term[m], part.sample, start, n, scratch[m]);
    for (int j = 0; j < a.outs; ++j) {
      if (row[j].terms == 0) std::fill(result[j], result[j] + n, row[j].shift);
      for (int m = 0; m < row[j].terms; m += GROUP) {
        const int count = std::min(GROUP, row[j].terms - m);
        const float* used[GROUP];
        for (int i = 0; i < count; ++i) used[i] = term[row[j].index[m + i]];
        weigh<F32>(count,
                   {used, row[j].c + m, row[j].apart + m,
                    row[j].around < 0 ? nullptr : term[row[j].around], row[j].shift, m > 0},
                   n, result[j], false);
      }
    }
    for (int j = 0; j < a.outs; ++j) narrow(result[j], a.out[j], part.sample, start, n);
  }
}

// Backwards: what the Gram pass read last is still in this core's cache.
void mix(const MixArgs& a, int64_t begin, int64_t end) {
  alignas(64) float scratch[MAX_TERMS + MAX_OUTS][TILE];
  const DType dtype = a.term[0].dtype;
  const bool alike = same_dtype(a.term, a.terms, dtype) && same_dtype(a.out, a.outs, dtype);
  Row row[MAX_OUTS];
  for (int64_t item = end - 1, sample = -1; item >= begin; --item) {
    const Part part(a, item);
    bool in_place = alike && (a.outs == 1 || a.disjoint);
    for (int j = 0; j < a.outs; ++j) {
      if (part.sample != sample) row[j] = Row(a, part.sample, j);
      in_place = in_place && 0 < row[j].terms && row[j].terms <= GROUP;
    }
    sample = part.sample;
    if (in_place) {
      with_element(dtype,
                   [&](auto element) { mix_item_in_place<decltype(element)>(a, part, row); });
    } else {
      mix_item_by_scratch(a, part, row, scratch);
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(GuidanceKernels, guidance) = {pydiffuse::gram, pydiffuse::mix};
