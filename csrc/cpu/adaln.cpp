// Adaptive layer norm by rows of a table, compiled once per instruction set.
//
// A token's features go through the first-level cache once: widened to float32 with their sum, then
// the spread about the mean, then the output. The second sweep also sums what the mean missed, so
// features far from zero lose nothing: mean + missed is right to twice float32.
#include "adaln.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "simd.h"

namespace pydiffuse {
namespace {

constexpr int CHAINS = 4;  // independent sums in flight

struct Whole {  // the lanes of a vector that are there: all of them, or an int's worth
  constexpr operator int() const { return WIDTH; }
};

template <class E>
inline vfloat get(const typename E::Bits* p, Whole) {
  return E::read(p);
}
template <class E>
inline vfloat get(const typename E::Bits* p, int lanes) {
  typename E::Bits part[WIDTH] = {};
  std::memcpy(part, p, lanes * sizeof *p);
  return E::read(part);
}
template <class E>
inline void put(typename E::Bits* p, vfloat v, Whole, bool past_cache = false) {
  E::write(p, v, past_cache);
}
template <class E>
inline void put(typename E::Bits* p, vfloat v, int lanes, bool = false) {
  typename E::Bits part[WIDTH];
  E::write(part, v, false);
  std::memcpy(p, part, lanes * sizeof *p);
}
inline vfloat only(vfloat v, Whole) { return v; }
inline vfloat only(vfloat v, int lanes) {
  for (int i = lanes; i < WIDTH; ++i) v[i] = 0;
  return v;
}

// f(start, lanes, chain) over n features, a vector at a time, chains in turn.
template <class F>
inline void sweep(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + CHAINS * WIDTH <= n; i += CHAINS * WIDTH) {
    f(i, Whole{}, 0);
    f(i + WIDTH, Whole{}, 1);
    f(i + 2 * WIDTH, Whole{}, 2);
    f(i + 3 * WIDTH, Whole{}, 3);
  }
  for (; i + WIDTH <= n; i += WIDTH) f(i, Whole{}, 0);
  if (i < n) f(i, int(n - i), 1);
}

struct Sum {
  vfloat chain[CHAINS] = {};
  float total() const {  // in a fixed order: halves of halves
    float lane[WIDTH];
    store(lane, (chain[0] + chain[1]) + (chain[2] + chain[3]));
    for (int width = WIDTH / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
};

// One token in float32, on a cache line. Freed by hand: a destructor brings the unwinder's weak
// symbol into the object.
inline float* new_token(int64_t n) {
  return static_cast<float*>(operator new((n + WIDTH) * sizeof(float), std::align_val_t{64}));
}
inline void delete_token(float* v) { operator delete(v, std::align_val_t{64}); }

struct TableRow {  // of one token, each [D]
  const float *shift, *scale, *gate;
  float one;  // factor = one + scale
  TableRow(const Modulation& a, int64_t token)
      : shift(a.table + a.row[token] * a.columns * a.n),
        scale(shift + a.n),
        gate(shift + 2 * a.n),
        one(a.factors ? 0.0f : 1.0f) {}
};

struct Moments {
  const float* v;  // [D]
  float mean = 0, missed = 0, rstd = 1;
  vfloat normed(vfloat v) const { return (v - mean - missed) * rstd; }
};

// v = x + gate branch and its moments. v is the memory of x where nothing is to be done, else
// `room`.
template <class E, bool GATED>
inline Moments moments(const Modulation& a, int64_t token, const TableRow& t, float* room) {
  const auto* x = at<E>(a.x, token, 0);
  const auto* branch = GATED ? at<E>(a.branch, token, 0) : nullptr;
  constexpr bool PLAIN = std::is_same_v<E, F32> && !GATED;
  Sum sum;
  sweep(a.n, [&](int64_t i, auto lanes, int chain) {
    vfloat value = get<E>(x + i, lanes);
    if constexpr (GATED) value += get<F32>(t.gate + i, lanes) * get<E>(branch + i, lanes);
    if constexpr (!PLAIN) store(room + i, value);
    sum.chain[chain] += value;
  });
  Moments m{room};
  if constexpr (PLAIN) m.v = x;
  if (a.norm == Norm::none) return m;
  if (a.norm == Norm::layer) m.mean = sum.total() / float(a.n);
  Sum missed, squares;
  sweep(a.n, [&](int64_t i, auto lanes, int chain) {
    const vfloat d = only(get<F32>(m.v + i, lanes) - m.mean, lanes);
    missed.chain[chain] += d;
    squares.chain[chain] += d * d;
  });
  if (a.norm == Norm::layer) m.missed = missed.total() / float(a.n);
  const float spread = squares.total() / float(a.n) - m.missed * m.missed;
  m.rstd = 1.0f / __builtin_sqrtf(spread + a.eps);
  return m;
}

template <class P>
bool aligned(const P* p) {
  return reinterpret_cast<uintptr_t>(p) % (WIDTH * sizeof *p) == 0;
}

template <class E, bool GATED>
void modulate_tokens(const ModulateArgs& a, int64_t begin, int64_t end) {
  float* const v = new_token(a.n);
  for (int64_t token = begin; token < end; ++token) {
    const TableRow t(a, token);
    const Moments m = moments<E, GATED>(a, token, t, v);
    auto* y = at<E>(a.y, token, 0);
    auto* r = a.r.data ? at<E>(a.r, token, 0) : nullptr;
    const bool stream = a.stream && aligned(y) && (!r || aligned(r));
    const int64_t ahead = std::min(token + 1, end - 1);
    const auto* next_x = at<E>(a.x, ahead, 0);
    const auto* next_branch = GATED ? at<E>(a.branch, ahead, 0) : nullptr;
    sweep(a.n, [&](int64_t i, auto lanes, int) {
      const vfloat value = get<F32>(m.v + i, lanes);
      const vfloat factor = t.one + get<F32>(t.scale + i, lanes);
      if (r) put<E>(r + i, value, lanes, stream);
      put<E>(y + i, m.normed(value) * factor + get<F32>(t.shift + i, lanes), lanes, stream);
      __builtin_prefetch(next_x + i);
      if constexpr (GATED) __builtin_prefetch(next_branch + i);
    });
  }
  delete_token(v);
  if (a.stream) stream_fence();
}

void modulate(const ModulateArgs& a, int64_t begin, int64_t end) {
  with_element(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    a.branch.data ? modulate_tokens<E, true>(a, begin, end)
                  : modulate_tokens<E, false>(a, begin, end);
  });
}

// With g = dy factor and u = norm(v):
//   dv = rstd (g - mean(g) - u mean(g u)) + dr, without mean(g) for rms;
//   dshift = sum dy, dscale = sum dy u, dgate = sum dv branch over the tokens of a row of the
//   table.
template <class E, bool GATED>
void backward_segment(const ModulateBackwardArgs& a, const Segment& segment, float* v) {
  const int64_t n = a.n;
  float* const slope = v + (n + 2 * WIDTH - 1) / WIDTH * WIDTH;
  float *dshift = segment.sums, *dscale = dshift + n, *dgate = dshift + 2 * n;
  std::memset(dshift, 0, a.columns * n * sizeof(float));
  for (int64_t i = segment.begin; i < segment.end; ++i) {
    const int64_t token = a.order[i];
    const TableRow t(a, token);
    const Moments m = moments<E, GATED>(a, token, t, v);
    const auto* dy = at<E>(a.dy, token, 0);
    const auto* dr = a.dr.data ? at<E>(a.dr, token, 0) : nullptr;
    const auto* branch = GATED ? at<E>(a.branch, token, 0) : nullptr;
    auto* dx = at<E>(a.dx, token, 0);
    auto* dbranch = GATED ? at<E>(a.dbranch, token, 0) : nullptr;
    // The next token may lie anywhere: it is fetched while this one is worked on.
    const int64_t ahead = i + 1 < segment.end ? a.order[i + 1] : token;
    const auto *next_x = at<E>(a.x, ahead, 0), *next_dy = at<E>(a.dy, ahead, 0);
    const auto* next_branch = GATED ? at<E>(a.branch, ahead, 0) : nullptr;
    const auto* next_dr = dr ? at<E>(a.dr, ahead, 0) : next_dy;
    Sum sum_g, sum_gu;
    sweep(n, [&](int64_t i, auto lanes, int chain) {
      const vfloat y = get<E>(dy + i, lanes), u = only(m.normed(get<F32>(m.v + i, lanes)), lanes);
      const vfloat g = y * (t.one + get<F32>(t.scale + i, lanes));
      store(v + i, u);
      store(slope + i, g);
      sum_g.chain[chain] += g;
      sum_gu.chain[chain] += g * u;
      put<F32>(dshift + i, get<F32>(dshift + i, lanes) + y, lanes);
      put<F32>(dscale + i, get<F32>(dscale + i, lanes) + y * u, lanes);
      __builtin_prefetch(next_x + i);
      if constexpr (GATED) __builtin_prefetch(next_branch + i);
    });
    const float mean_g = a.norm == Norm::layer ? sum_g.total() / float(n) : 0.0f;
    const float mean_gu = a.norm == Norm::none ? 0.0f : sum_gu.total() / float(n);
    const bool stream = a.stream && aligned(dx) && (!GATED || aligned(dbranch));
    sweep(n, [&](int64_t i, auto lanes, int) {
      vfloat dv = m.rstd * (load<vfloat>(slope + i) - mean_g - load<vfloat>(v + i) * mean_gu);
      if (dr) dv += get<E>(dr + i, lanes);
      put<E>(dx + i, dv, lanes, stream);
      __builtin_prefetch(next_dy + i);
      if constexpr (GATED) __builtin_prefetch(next_dr + i);
      if constexpr (GATED) {
        put<E>(dbranch + i, dv * get<F32>(t.gate + i, lanes), lanes, stream);
        const vfloat more = dv * get<E>(branch + i, lanes);
        put<F32>(dgate + i, get<F32>(dgate + i, lanes) + more, lanes);
      }
    });
  }
}

void backward(const ModulateBackwardArgs& a, int64_t begin, int64_t end) {
  float* const v = new_token(2 * (a.n + WIDTH));  // norm(v), then g
  with_element(a.x.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t i = begin; i < end; ++i)
      a.branch.data ? backward_segment<E, true>(a, a.segment[i], v)
                    : backward_segment<E, false>(a, a.segment[i], v);
  });
  delete_token(v);
  if (a.stream) stream_fence();
}

// Adds the segments of a table row in their order; a row of one segment is complete already.
void sum(const ModulateBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.columns * a.n, blocks = (width + SUM_COLUMNS - 1) / SUM_COLUMNS;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, first = item % blocks * SUM_COLUMNS;
    const int64_t count = std::min(SUM_COLUMNS, width - first);
    if (a.of_row[row + 1] - a.of_row[row] == 1) continue;
    double total[SUM_COLUMNS] = {};
    for (int64_t s = a.of_row[row]; s < a.of_row[row + 1]; ++s)
      for (int64_t i = 0; i < count; ++i) total[i] += a.segment[s].sums[first + i];
    for (int64_t i = 0; i < count; ++i) a.dtable[row * width + first + i] = float(total[i]);
  }
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(AdalnKernels, adaln) = {pydiffuse::modulate, pydiffuse::backward, pydiffuse::sum};
