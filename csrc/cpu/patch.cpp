// Combinations whose coefficients are constant per patch, compiled once per instruction set.
//
// Lanes are neighbouring columns. A strip computes its coefficients in float64, a patch per lane,
// then lays them out per column, so that a row costs one load per coefficient and term and no
// gathering. Float32 fused multiply-adds, one rounding at the output.
#include "patch.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace pydiffuse {
namespace {

inline vdouble root(vdouble v) {
  for (int i = 0; i < HALF; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

}  // namespace
}  // namespace pydiffuse

#include "../patch_rules.h"

namespace pydiffuse {
namespace {

constexpr int64_t TILE = PATCH_TILE;
static_assert(TILE % WIDTH == 0);
constexpr int MAX_COEFFICIENTS = OUTS * TERMS;

// What one output of a strip is made of.
struct Blend {
  int terms = 0;
  int term[TERMS];
  const float* c = nullptr;  // [terms][TILE]: per column
  int kept = -1;             // the term that takes over where a patch stays; -1: zeros do
  bool guided = false;       // u + w (c - u): the second term is taken less the third
};

struct Strip {
  int64_t sample, z, y, rows;  // z, y, rows count patches
  int64_t first, n;            // columns, of every row
  alignas(64) float c[MAX_COEFFICIENTS][TILE];
  alignas(64) int32_t stays[TILE];  // -1: this column's patch keeps what it has
  alignas(64) float zeros[TILE] = {};
  bool any_stays;
  vdouble matrix[OUTS][TERMS] = {};  // of the patches at hand; a rule always sets the same entries
  Blend out[TERMS];
};

struct Window {            // the patches of a strip
  int64_t first, n, base;  // of their row; base: the row's first patch in the sample
};

// A value per patch, laid out per column.
template <class T>
void lay_out(const T* __restrict value, const Window& w, int64_t patch, const Strip& s,
             T* __restrict to) {
  if (patch == 1) return (void)std::copy(value, value + w.n, to);
  if (patch == 2) {  // strips begin and end with whole patches
    int64_t p = 0;
    for (; p + WIDTH <= w.n; p += WIDTH)
      for (int i = 0; i < WIDTH; ++i) to[2 * (p + i)] = to[2 * (p + i) + 1] = value[p + i];
    for (; p < w.n; ++p) to[2 * p] = to[2 * p + 1] = value[p];
    return;
  }
  for (int64_t p = 0; p < w.n; ++p) {
    const int64_t from = std::max((w.first + p) * patch, s.first) - s.first;
    const int64_t end = std::min((w.first + p + 1) * patch, s.first + s.rows * s.n) - s.first;
    std::fill(to + from, to + end, value[p]);
  }
}

// A table's values for the patches of a strip: where they lie, or a copy with a whole number of
// vectors, which reads like a level where there is none.
const float* load_table(const Table& table, int64_t sample, const Window& w, float* to) {
  const float* from = table.data + sample * table.stride[0] + (w.base + w.first) * table.stride[1];
  if (table.stride[1] == 1 && w.n % HALF == 0) return from;
  for (int64_t p = 0; p < w.n; ++p) to[p] = from[p * table.stride[1]];
  std::fill(to + w.n, to + (w.n + HALF - 1) / HALF * HALF, 0.5f);
  return to;
}

// Which patches stay, and where all of them arrive.
bool arrive(const MixPatchesArgs& a, const Strip& s, const Window& w, const float* now,
            const float* next, int32_t* __restrict stays) {
  const int64_t at = s.sample * a.grid.patches() + w.base + w.first;
  if (a.rule.method > Method::multistep) return false;
  for (int64_t p = 0; p < w.n; ++p) stays[p] = now[p] == next[p] ? -1 : 0;
  if (a.mask)
    for (int64_t p = 0; p < w.n; ++p) stays[p] |= a.mask[at + p] ? 0 : -1;
  if (a.arrived) {
    // Where a stretch is narrower than a patch, the strip that holds its first column writes.
    float* __restrict arrived = a.arrived + at;
    for (int64_t p = w.first * a.grid.patch[2] < s.first; p < w.n; ++p)
      arrived[p] = stays[p] ? now[p] : next[p];
  }
  int32_t any = 0;
  for (int64_t p = 0; p < w.n; ++p) any |= stays[p];
  return any != 0;
}

void begin(const MixPatchesArgs& a, int64_t item, Strip& s) {
  const Grid& g = a.grid;
  const int64_t across = g.across(2), patch = g.patch[2];
  s.first = item % a.stretches * a.width;
  s.n = std::min(a.width, g.size[2] - s.first);
  item /= a.stretches;
  s.y = item % a.strips * a.height;
  s.rows = std::min(a.height, g.across(1) - s.y);
  s.z = item / a.strips % g.across(0);
  s.sample = item / a.strips / g.across(0);
  // The patches of whole rows follow each other, and so do their columns.
  const int64_t start = s.first / patch, last = (s.first + s.n - 1) / patch;
  const Window w{start, (s.rows - 1) * across + last - start + 1,
                 (s.z * g.across(1) + s.y) * across};

  alignas(64) float scratch[3][TILE], value[MAX_COEFFICIENTS][TILE];
  int32_t stays[TILE];
  const float* now = load_table(a.t, s.sample, w, scratch[0]);
  const float* next = a.next.data ? load_table(a.next, s.sample, w, scratch[1]) : now;
  const float* before = a.last.data ? load_table(a.last, s.sample, w, scratch[2]) : now;
  s.any_stays = arrive(a, s, w, now, next, stays);

  const vdouble scale = vdouble{} + double(a.scales ? a.scales[s.sample] : a.scale);
  // Around the unconditional prediction, so that equal ones give themselves, whatever the scale.
  const bool guided = !a.transposed && a.terms > 2 && a.term_place[1] == TERM_PRED &&
                      a.term_place[2] == TERM_UNCOND;
  const int places = a.outs * a.terms;
  const vdouble* from[MAX_COEFFICIENTS];  // of each output and term
  for (int i = 0; i < places; ++i) {
    const int out = a.out_place[i / a.terms], term = a.term_place[i % a.terms];
    from[i] = a.transposed ? &s.matrix[term][out] : &s.matrix[out][term];
  }
  for (int64_t p = 0; p < w.n; p += HALF) {
    const auto at = [&](const float* t) { return widened(load<vhalf>(t + p)); };
    coefficients(a.rule, Levels<vdouble>{at(now), at(next), at(before)}, scale, s.matrix);
    if (guided)
      for (auto& row : s.matrix) row[TERM_UNCOND] += row[TERM_PRED];
    for (int i = 0; i < places; ++i) store(value[i] + p, narrowed(*from[i]));
  }

  if (s.any_stays) lay_out(stays, w, patch, s, s.stays);
  int used = 0;
  for (int j = 0; j < a.outs; ++j) {
    Blend& blend = s.out[j];
    blend = Blend{};
    blend.c = s.c[used];
    blend.guided = guided;
    for (int m = 0; m < a.terms; ++m) {
      const int out = a.transposed ? a.term_place[m] : a.out_place[j];
      const int term = a.transposed ? a.out_place[j] : a.term_place[m];
      if (out == OUT_X ? term == TERM_X : term == TERM_HISTORY) blend.kept = m;
      // Only a step looks back, and history becomes what was predicted now.
      if (out == OUT_HISTORY && term == TERM_HISTORY) continue;
      blend.term[blend.terms++] = m;
      lay_out(value[j * a.terms + m], w, patch, s, s.c[used++]);
    }
  }
}

// f(offset of the first row of a row of patches in its sample, of its coefficients in the strip)
// for every channel and plane of a strip, in the order of memory.
template <class F>
inline void for_bands(const Grid& g, int64_t z, int64_t y, int64_t rows, int64_t n, const F& f) {
  for (int64_t channel = 0; channel < g.channels; ++channel)
    for (int64_t plane = z * g.patch[0]; plane < (z + 1) * g.patch[0]; ++plane)
      for (int64_t r = 0; r < rows; ++r)
        f(((channel * g.size[0] + plane) * g.size[1] + (y + r) * g.patch[1]) * g.size[2], r * n);
}

// The same for every row.
template <class F>
inline void for_rows(const Grid& g, int64_t z, int64_t y, int64_t rows, int64_t n, const F& f) {
  for_bands(g, z, y, rows, n, [&](int64_t row, int64_t to) {
    for (int64_t i = 0; i < g.patch[1]; ++i) f(row + i * g.size[2], to);
  });
}

// Columns [i, n) of some rows, `pitch` apart, of one output: what is left after whole vectors.
template <class E, int M>
__attribute__((noinline)) void last_columns(const typename E::Bits* const* t, const float* by,
                                            const int32_t* stays, const typename E::Bits* old,
                                            bool moves, bool guided, typename E::Bits* dst,
                                            int64_t i, int64_t n, int rows, int64_t pitch) {
  for (; i < n; ++i)
    for (int64_t at = i, r = 0; r < rows; ++r, at += pitch) {
      float y = -0.0f;
      for (int m = 0; m < M; ++m) {
        float x = E::read_one(t[m] + at);
        if (M > 2 && m == 1 && guided) x -= E::read_one(t[M > 2 ? 2 : 0] + at);
        y = fused(by[m * TILE + i], x, y);
      }
      if (stays && stays[i]) y = E::read_one(old + (moves ? at : 0));
      E::write_one(dst + at, y);
    }
}

// J outputs of the same M terms, computed together: each term is read once for all of them.
template <class E, int M, int J, bool STAYS>
struct Sweep {
  using Bits = typename E::Bits;
  static constexpr bool RARE = M == 0 || M == TERMS;  // a gradient that is zero, or by no rule
  const Bits *term[M + 1] = {}, *kept[J];
  bool moves[J];  // kept goes along the rows
  bool guided;
  const float* c[J];
  const int32_t* stays;
  Bits* out[J];

  Sweep(const Bits* const* terms, Bits* const* outs, const Blend* b, const Strip& s)
      : guided(b->guided), stays(s.stays) {
    for (int m = 0; m < M; ++m) term[m] = terms[b->term[m]];
    for (int j = 0; j < J; ++j) {
      moves[j] = b[j].kept >= 0;
      kept[j] = moves[j] ? terms[b[j].kept] : reinterpret_cast<const Bits*>(s.zeros);
      c[j] = b[j].c;
      out[j] = outs[j];
    }
  }

  // R rows of n columns, `pitch` apart, of one row of patches: they share their coefficients, which
  // are read once. The first lies `row` elements on from where terms and outputs begin.
  template <int R>
  inline void rows(int64_t row, int64_t to, int64_t n, int64_t pitch, bool past_cache) const {
    typedef int32_t lanes __attribute__((vector_size(WIDTH * 4)));
    const Bits *t[M + 1], *old[J];
    const float* by[J];
    Bits* dst[J];
    for (int m = 0; m < M; ++m) t[m] = term[m] + row;
    if (R > 1 && pitch % WIDTH) past_cache = false;
    for (int j = 0; j < J; ++j) {
      old[j] = moves[j] ? kept[j] + row : kept[j];
      by[j] = c[j] + to;
      dst[j] = out[j] + row;
      past_cache = past_cache && reinterpret_cast<uintptr_t>(dst[j]) % (WIDTH * sizeof(Bits)) == 0;
    }
    const auto vectors = [&](int64_t i, bool past) {
      vfloat k[J][M + 1];
      for (int j = 0; j < J; ++j)
        for (int m = 0; m < M; ++m) k[j][m] = load<vfloat>(by[j] + m * TILE + i);
      for (int64_t at = i, r = 0; r < R; ++r, at += pitch) {
        vfloat x[M + 1];
        for (int m = 0; m < M; ++m) x[m] = E::read(t[m] + at);
        if constexpr (M > 2)
          if (guided) x[1] -= x[2];
        for (int j = 0; j < J; ++j) {
          vfloat y = vfloat{} - 0.0f;  // -0 + y = y, always
          for (int m = 0; m < M; ++m) y = fused(k[j][m], x[m], y);
          if constexpr (STAYS)
            y = load<lanes>(stays + to + i) ? E::read(old[j] + (moves[j] ? at : 0)) : y;
          E::write(dst[j] + at, y, past);
        }
      }
    };
    int64_t i = 0;
    if (past_cache)
      for (; i + WIDTH <= n; i += WIDTH) vectors(i, true);
    for (; i + WIDTH <= n; i += WIDTH) vectors(i, false);
    if (i == n) return;
    for (int j = 0; j < J; ++j)
      last_columns<E, M>(t, by[j], STAYS ? stays + to : nullptr, old[j], moves[j], guided, dst[j],
                         i, n, R, pitch);
  }
};

// f(sweep) for J outputs of a strip, its terms and outputs given where the strip's first row
// begins.
template <class E, int M, int J, class F>
void with_stays(const typename E::Bits* const* terms, typename E::Bits* const* outs, const Blend* b,
                const Strip& s, const F& f) {
  s.any_stays ? f(Sweep<E, M, J, true>(terms, outs, b, s))
              : f(Sweep<E, M, J, false>(terms, outs, b, s));
}
template <class E, class F>
void with_sweep(const typename E::Bits* const* terms, typename E::Bits* const* outs, const Blend* b,
                const Strip& s, const F& f) {
  switch (b->terms) {
    case 0:
      return with_stays<E, 0, 1>(terms, outs, b, s, f);
    case 1:
      return with_stays<E, 1, 1>(terms, outs, b, s, f);
    case 2:
      return with_stays<E, 2, 1>(terms, outs, b, s, f);
    case 3:
      return with_stays<E, 3, 1>(terms, outs, b, s, f);
    case 4:
      return with_stays<E, 4, 1>(terms, outs, b, s, f);
    default:
      return with_stays<E, TERMS, 1>(terms, outs, b, s, f);
  }
}

// Two outputs of the same one or two terms: a noising, and most gradients.
bool paired(const Blend& a, const Blend& b) {
  return (a.terms == 1 || a.terms == 2) && a.terms == b.terms &&
         std::equal(a.term, a.term + a.terms, b.term);
}
template <class E, class F>
void with_pair(const typename E::Bits* const* terms, typename E::Bits* const* outs, const Blend* b,
               const Strip& s, const F& f) {
  b->terms == 1 ? with_stays<E, 1, 2>(terms, outs, b, s, f)
                : with_stays<E, 2, 2>(terms, outs, b, s, f);
}

// One dtype throughout, and no output that another output still needs to read: each is written
// where it belongs, as it is computed.
template <class E>
void rows_in_place(const MixPatchesArgs& a, const Strip& s) {
  const typename E::Bits* terms[TERMS];
  typename E::Bits* outs[TERMS];
  for (int m = 0; m < a.terms; ++m) terms[m] = at<E>(a.term[m], s.sample, s.first);
  for (int j = 0; j < a.outs; ++j) outs[j] = at<E>(a.out[j], s.sample, s.first);
  const auto every_row = [&](const auto& sweep) {
    const int64_t pitch = a.grid.size[2], high = a.grid.patch[1];
    for_bands(a.grid, s.z, s.y, s.rows, s.n, [&](int64_t row, int64_t to) {
      int64_t i = 0;
      if constexpr (!std::decay_t<decltype(sweep)>::RARE)
        for (; i + 2 <= high; i += 2)
          sweep.template rows<2>(row + i * pitch, to, s.n, pitch, a.stream);
      for (; i < high; ++i) sweep.template rows<1>(row + i * pitch, to, s.n, pitch, a.stream);
    });
  };
  for (int j = 0; j < a.outs; ++j) {
    if (j + 1 < a.outs && paired(s.out[j], s.out[j + 1])) {
      with_pair<E>(terms, outs + j, s.out + j, s, every_row);
      ++j;
    } else {
      with_sweep<E>(terms, outs + j, s.out + j, s, every_row);
    }
  }
}

// Any dtypes, outputs that may be terms of each other: results wait in float32.
void rows_by_scratch(const MixPatchesArgs& a, const Strip& s) {
  alignas(64) float scratch[TERMS][TILE], result[TERMS][TILE];
  for_rows(a.grid, s.z, s.y, s.rows, s.n, [&](int64_t row, int64_t to) {
    const float* terms[TERMS];
    for (int m = 0; m < a.terms; ++m)
      terms[m] = widen(a.term[m], s.sample, row + s.first, s.n, scratch[m]);
    for (int j = 0; j < a.outs; ++j) {
      float* const into[] = {result[j]};
      with_sweep<F32>(terms, into, s.out + j, s,
                      [&](const auto& sweep) { sweep.template rows<1>(0, to, s.n, 0, false); });
    }
    for (int j = 0; j < a.outs; ++j) narrow(result[j], a.out[j], s.sample, row + s.first, s.n);
  });
}

void mix(const MixPatchesArgs& a, int64_t first, int64_t end) {
  Strip s;
  const DType dtype = a.out[0].dtype;
  bool in_place = a.outs == 1 || a.disjoint;
  for (int j = 1; j < a.outs; ++j) in_place = in_place && a.out[j].dtype == dtype;
  for (int m = 0; m < a.terms; ++m) in_place = in_place && a.term[m].dtype == dtype;
  for (int64_t item = first; item < end; ++item) {
    begin(a, item, s);
    if (in_place) {
      with_element(dtype, [&](auto element) { rows_in_place<decltype(element)>(a, s); });
    } else {
      rows_by_scratch(a, s);
    }
  }
  if (a.stream) stream_fence();
}

// Columns add up in float64, each over its rows; then the columns of a patch in their order.
void loss_item(const PatchLossArgs& a, int64_t item) {
  constexpr double LOG_2_PI = 1.8378770664093453;
  const Grid& g = a.grid;
  const int64_t across = g.across(2), patch = g.patch[2];
  const int64_t stretch = item % a.stretches, strip = item / a.stretches;
  const int64_t y = strip % g.across(1), z = strip / g.across(1) % g.across(0);
  const int64_t sample = strip / g.across(1) / g.across(0);
  const int64_t from = stretch * a.group, to = std::min(from + a.group, across);
  const int64_t base = (sample * g.across(0) + z) * g.across(1) * across + y * across;
  double* errors = a.errors + base;
  std::fill(errors + from, errors + to, 0.0);
  alignas(64) float scratch[2][TILE];
  alignas(64) double sums[TILE];
  for (int64_t start = from * patch; start < to * patch; start += TILE) {
    const int64_t n = std::min(TILE, to * patch - start);
    std::fill(sums, sums + n, 0.0);
    for_rows(g, z, y, 1, 0, [&](int64_t row, int64_t) {
      const float* p = widen(a.pred, sample, row + start, n, scratch[0]);
      const float* u = widen(a.target, sample, row + start, n, scratch[1]);
      for (int64_t i = 0; i < n; ++i) {
        const double d = double(p[i]) - double(u[i]);
        sums[i] += d * d;
      }
    });
    int64_t p = start / patch;
    for (int64_t i = 0, next = (p + 1) * patch - start; i < n; ++p, next += patch)
      for (; i < std::min(n, next); ++i) errors[p] += sums[i];
  }
  double total = 0;
  for (int64_t p = from; p < to; ++p) {
    double each = errors[p];
    if (a.logvar) {
      const double l = a.logvar[base + p];
      each += a.nll / 2 * (double(g.per_patch()) * (LOG_2_PI + l) + errors[p] * std::exp(-l));
    }
    total += a.weight ? each * a.weight[base + p] : each;
  }
  a.partial[item] = total;
}

void loss(const PatchLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) loss_item(a, item);
}

bool within(const Table& table, int64_t batch, int64_t patches) {
  int64_t inside = 0, seen = 0;
  const int64_t rows = table.stride[0] ? batch : std::min<int64_t>(batch, 1);
  const int64_t columns = table.stride[1] ? patches : std::min<int64_t>(patches, 1);
  for (int64_t b = 0; b < rows; ++b, seen += columns) {
    const float* t = table.data + b * table.stride[0];
    int32_t row = 0;
    if (table.stride[1] == 1)
      for (int64_t i = 0; i < columns; ++i) row += (t[i] >= 0.0f) & (t[i] <= 1.0f);
    else
      for (int64_t i = 0; i < columns; ++i)
        row += (t[i * table.stride[1]] >= 0.0f) & (t[i * table.stride[1]] <= 1.0f);
    inside += row;
  }
  return inside == seen;
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(PatchKernels, patch) = {pydiffuse::mix, pydiffuse::loss, pydiffuse::within};
