// The guidance rules: from a sample's Gram matrix to its coefficients, in float64.
//
// Written once over a scalar type T: `double` gives the coefficients, `Dual` their derivative by
// one input, and `vjp_part` builds the gradient by seeding each input in turn. k is small, so this
// costs nothing beside a pass over the predictions, and no rule needs a backward formula of its
// own. Degenerate cases are defined where the division happens.
#pragma once

#include <cmath>

#include "guidance.h"

#ifdef __CUDACC__
#define PYDIFFUSE_HD __host__ __device__
#define PYDIFFUSE_ROLLED _Pragma("unroll 1")  // scalar work: registers are worth more
#else
#define PYDIFFUSE_HD
#define PYDIFFUSE_ROLLED
#endif

namespace pydiffuse {

struct Dual {  // v + d eps, eps^2 = 0
  double v = 0, d = 0;
  Dual() = default;
  PYDIFFUSE_HD constexpr Dual(double value, double tangent = 0) : v(value), d(tangent) {}
};
PYDIFFUSE_HD inline Dual operator+(Dual x, Dual y) { return {x.v + y.v, x.d + y.d}; }
PYDIFFUSE_HD inline Dual operator-(Dual x, Dual y) { return {x.v - y.v, x.d - y.d}; }
PYDIFFUSE_HD inline Dual operator-(Dual x) { return {-x.v, -x.d}; }
PYDIFFUSE_HD inline Dual operator*(Dual x, Dual y) { return {x.v * y.v, x.v * y.d + x.d * y.v}; }
PYDIFFUSE_HD inline Dual operator/(Dual x, Dual y) {
  return {x.v / y.v, (x.d - x.v / y.v * y.d) / y.v};
}
PYDIFFUSE_HD inline double value(double x) { return x; }
PYDIFFUSE_HD inline double value(Dual x) { return x.v; }
PYDIFFUSE_HD inline double root(double x) { return std::sqrt(x); }
PYDIFFUSE_HD inline Dual root(Dual x) {  // the slope at 0 is taken as 0
  const double r = std::sqrt(x.v);
  return {r, r == 0 ? 0 : x.d / (2 * r)};
}
PYDIFFUSE_HD inline double exponential(double x) { return std::exp(x); }
PYDIFFUSE_HD inline Dual exponential(Dual x) {
  const double e = std::exp(x.v);
  return {e, e == 0 ? 0 : e * x.d};
}
PYDIFFUSE_HD inline double sine(double x) { return std::sin(x); }
PYDIFFUSE_HD inline Dual sine(Dual x) { return {std::sin(x.v), std::cos(x.v) * x.d}; }
PYDIFFUSE_HD inline double angle(double y, double x) { return std::atan2(y, x); }
PYDIFFUSE_HD inline Dual angle(Dual y, Dual x) {
  const double r = x.v * x.v + y.v * y.v;
  return {std::atan2(y.v, x.v), r == 0 ? 0 : (x.v * y.d - y.v * x.d) / r};
}
// hypot without overflow; its slope at (0, 0) is never used.
PYDIFFUSE_HD inline double length(double x, double y) { return std::hypot(x, y); }
PYDIFFUSE_HD inline Dual length(Dual x, Dual y) {
  const double r = std::hypot(x.v, y.v);
  return {r, r == 0 ? 0 : (x.v * x.d + y.v * y.d) / r};
}

// The input that a Dual sample is differentiated by. G_ij and G_ji are one number and move
// together.
struct Seed {
  enum Of { nothing, gram, sum, parameter } of = nothing;
  int i = 0, j = 0;
};
PYDIFFUSE_HD inline void seeded(double v, bool, double* x) { *x = v; }
PYDIFFUSE_HD inline void seeded(double v, bool seed, Dual* x) { *x = Dual(v, seed ? 1 : 0); }

// What a rule sees of one sample.
template <class T>
struct Sample {
  int k;                 // predictions
  double n;              // elements in each
  const double* gram;    // [k, k]
  const double* sums;    // [k], read only when the result is rescaled
  const double* params;  // [RULE + ...], in the order of `param`
  bool rescaled;         // params[phi] is not the constant 0
  Seed seed = {};
  PYDIFFUSE_HD T lift(double v, Seed::Of of, int i, int j) const {
    T x;
    seeded(v, seed.of == of && i == seed.i && j == seed.j, &x);
    return x;
  }
  PYDIFFUSE_HD T g(int i, int j) const {
    return lift(gram[i * k + j], Seed::gram, i < j ? i : j, i < j ? j : i);
  }
  PYDIFFUSE_HD T sum(int i) const { return lift(sums[i], Seed::sum, i, 0); }
  PYDIFFUSE_HD T parameter(int i) const { return lift(params[i], Seed::parameter, i, 0); }
  PYDIFFUSE_HD T rule(int i) const { return parameter(param::RULE + i); }
  PYDIFFUSE_HD bool original() const { return params[param::original] != 0; }
};

// g = base + w (c - u'), u' = x c + y u, base = c if `original` else u'.
template <class T>
PYDIFFUSE_HD void extrapolate(const Sample<T>& s, T w, T x, T y, T* c) {
  if (s.original()) {
    c[0] = T(1.0) + w * (T(1.0) - x);
    c[1] = -(w * y);
  } else {
    c[0] = x + w * (T(1.0) - x);
    c[1] = (T(1.0) - w) * y;
  }
}

// TCFG (arXiv 2503.18137): u keeps its part along the top right singular vector of [c; u].
template <class T>
PYDIFFUSE_HD void tcfg(const Sample<T>& s, T* c) {
  const T cc = s.g(0, 0), cu = s.g(0, 1), uu = s.g(1, 1);
  const T D = length(cc - uu, T(2.0) * cu);
  const bool tie = value(D) == 0;  // no direction is the top one: both keep half
  const T x = tie ? T(0.0) : cu / D;
  const T y = tie ? T(0.5) : T(0.5) * (T(1.0) + (uu - cc) / D);
  extrapolate(s, s.rule(0), x, y, c);
}

// CFG-Zero* (arXiv 2503.18886): u' = alpha u, alpha = <c,u> / (<u,u> + 1e-8).
template <class T>
PYDIFFUSE_HD void cfg_zero(const Sample<T>& s, T* c) {
  extrapolate(s, s.rule(0), T(0.0), s.g(0, 1) / (s.g(1, 1) + T(1e-8)), c);
}

// APG (arXiv 2410.02416): parameters scale, eta, threshold, momentum; predictions c, u[, state].
// d = c - u + momentum state, cut to the norm `threshold`, its part along c weighted by eta.
template <class T>
PYDIFFUSE_HD void apg(const Sample<T>& s, T* c) {
  const T w = s.rule(0), eta = s.rule(1), threshold = s.rule(2);
  const T d[3] = {T(1.0), T(-1.0), s.rule(3)};  // d in the basis of the predictions
  T dc(0.0), dd(0.0);
  for (int i = 0; i < s.k; ++i) {
    dc = dc + d[i] * s.g(i, 0);
    for (int j = 0; j < s.k; ++j) dd = dd + d[i] * d[j] * s.g(i, j);
  }
  T cut(1.0);
  if (value(threshold) > 0) {
    const T norm = root(value(dd) < 0 ? T(0.0) : dd);  // dd < 0 only by rounding
    if (!(value(norm) <= value(threshold))) cut = threshold / norm;
  }
  const T parallel = value(s.g(0, 0)) == 0 ? T(0.0) : dc / s.g(0, 0);
  const T step = w * cut;
  for (int i = 0; i < s.k; ++i) c[i] = step * d[i];
  c[0] = c[0] - step * (T(1.0) - eta) * parallel;
  const int base = s.original() ? 0 : 1;
  c[base] = c[base] + T(1.0);
}

// MAMBO-G: the scale shrinks with ||c - u|| / ||u||. Parameters scale, alpha.
template <class T>
PYDIFFUSE_HD void magnitude_aware(const Sample<T>& s, T* c) {
  const T w = s.rule(0), alpha = s.rule(1), uu = s.g(1, 1);
  T dd = s.g(0, 0) - T(2.0) * s.g(0, 1) + uu;
  if (value(dd) < 0) dd = T(0.0);  // by rounding
  T decay(1.0);                    // c = u: nothing to scale
  if (value(uu) == 0 && value(dd) > 0)
    decay = T(value(alpha) > 0 ? 0.0 : 1.0);
  else if (!(value(dd) == 0))
    decay = exponential(-alpha * root(dd / uu));
  extrapolate(s, s.original() ? w * decay : T(1.0) + (w - T(1.0)) * decay, T(0.0), T(1.0), c);
}

// Perp-Neg (arXiv 2304.04968): predictions c, n_1 .. n_m, u; parameters scale, v_1 .. v_m.
// g = u + w (e - sum_i v_i perp(n_i - u, e)), e = c - u, perp(y, e) = y - <y,e>/<e,e> e.
template <class T>
PYDIFFUSE_HD void perp_neg(const Sample<T>& s, T* c) {
  const int u = s.k - 1;
  const T w = s.rule(0);
  T ee = s.g(0, 0) - T(2.0) * s.g(0, u) + s.g(u, u), along(1.0), rest(-1.0);
  for (int i = 1; i < u; ++i) {
    const T v = s.rule(i);
    const T ye = s.g(i, 0) - s.g(i, u) - s.g(u, 0) + s.g(u, u);
    along = along + (value(ee) == 0 ? T(0.0) : v * ye / ee);
    rest = rest + v;
    c[i] = -(w * v);
  }
  // u + w (along (c - u) - sum v_i (n_i - u))
  c[0] = w * along;
  c[u] = T(1.0) + w * (rest + T(1.0) - along);
  if (s.original()) {
    c[0] = c[0] + T(1.0);
    c[u] = c[u] - T(1.0);
  }
}

// Composable Diffusion (arXiv 2206.01714): u + sum_i w_i (c_i - u); a negative weight is NOT.
template <class T>
PYDIFFUSE_HD void compose(const Sample<T>& s, T* c) {
  const int u = s.k - 1;
  c[u] = T(1.0);
  for (int i = 0; i < u; ++i) {
    c[i] = s.rule(i);
    c[u] = c[u] - s.rule(i);
  }
}

// Spherical interpolation from p_0 to p_1; a straight line where the two are collinear.
template <class T>
PYDIFFUSE_HD void slerp(const Sample<T>& s, T* c) {
  const T t = s.rule(0), ab = s.g(0, 1);
  const T area = s.g(0, 0) * s.g(1, 1);
  const T cross = area - ab * ab;  // (|a||b| sin)^2
  if (!(value(cross) > 1e-12 * value(area)) && value(cross) == value(cross)) {
    c[0] = T(1.0) - t;
    c[1] = t;
    return;
  }
  const T theta = angle(root(cross), ab), sin = sine(theta);
  c[0] = sine((T(1.0) - t) * theta) / sin;
  c[1] = sine(t * theta) / sin;
}

// Guidance rescale (arXiv 2305.08891): g <- phi std(p_0)/std(g) g + (1 - phi) g. Nothing changes
// where g is constant. A variance below 1e-13 of what it is the difference of is rounding, hence 0.
template <class T>
PYDIFFUSE_HD void rescale(const Sample<T>& s, T* c) {
  T gg(0.0), mean(0.0);
  double size = 0;  // of the summands of gg, which may cancel
  for (int i = 0; i < s.k; ++i) {
    mean = mean + c[i] * s.sum(i);
    for (int j = 0; j < s.k; ++j) {
      const T term = c[i] * c[j] * s.g(i, j);
      gg = gg + term;
      size += std::fabs(value(term));
    }
  }
  const T n(s.n > 0 ? s.n : 1);
  const T var_g = gg - mean * mean / n;
  const T var_c = s.g(0, 0) - s.sum(0) * s.sum(0) / n;
  if (value(var_g) <= 1e-13 * size) return;
  const T ratio = value(var_c) <= 1e-13 * value(s.g(0, 0)) ? T(0.0) : root(var_c / var_g);
  const T factor = T(1.0) + s.parameter(param::phi) * (ratio - T(1.0));
  for (int i = 0; i < s.k; ++i) c[i] = factor * c[i];
}

// c[k] for one sample.
template <class T>
PYDIFFUSE_HD void coefficients(Rule rule, const Sample<T>& s, T* c) {
  switch (rule) {
    case Rule::linear:
      for (int i = 0; i < s.k; ++i) c[i] = s.rule(i);
      break;
    case Rule::cfg:
      extrapolate(s, s.rule(0), T(0.0), T(1.0), c);
      break;
    case Rule::tcfg:
      tcfg(s, c);
      break;
    case Rule::cfg_zero:
      cfg_zero(s, c);
      break;
    case Rule::apg:
      apg(s, c);
      break;
    case Rule::magnitude_aware:
      magnitude_aware(s, c);
      break;
    case Rule::perp_neg:
      perp_neg(s, c);
      break;
    case Rule::compose:
      compose(s, c);
      break;
    case Rule::slerp:
      slerp(s, c);
      break;
    case Rule::rescale:  // predictions: the one whose spread is kept, the guided one
      c[0] = T(0.0);
      c[1] = T(1.0);
      break;
    default:
      break;
  }
  if (s.rescaled) rescale(s, c);
}

// A rule that only weighs, and is not rescaled, needs no pass over the predictions beforehand.
PYDIFFUSE_HD inline bool needs_gram(Rule rule, bool rescaled) {
  return rescaled || !(rule == Rule::linear || rule == Rule::cfg || rule == Rule::compose);
}

// Row i <= column j of entry e of an upper triangle [k, k]: row i holds k - i entries.
PYDIFFUSE_HD inline void triangle_entry(int k, int e, int* i, int* j) {
  for (*i = 0; e >= k - *i; ++*i) e -= k - *i;
  *j = *i + e;
}

// Gram entries arrive as an upper triangle followed by the sums; rules read a full matrix.
PYDIFFUSE_HD inline void unpack(int k, const double* packed, bool sums, double* gram, double* sum) {
  int e = 0;
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) gram[i * k + j] = gram[j * k + i] = packed[e++];
  for (int i = 0; i < k; ++i) sum[i] = sums ? packed[e++] : 0.0;
}

// Equal predictions must come back as they are from coefficients that add up to one, whatever
// cancels between these. So a sample's predictions are taken as one of them, the origin p_o, and
// the differences to it:
//   sum_i c_i p_i = (sum_i c_i) p_o + sum_{i != o} c_i (p_i - p_o).
// o is the larger of the first two or, where all have one sign, the second, as in u + w (c - u);
// none, -1, where only one of two has a weight, or another prediction has far more.
PYDIFFUSE_HD inline int origin(int k, const double* c) {
  if (k < 2 || (k == 2 && (c[0] == 0 || c[1] == 0))) return -1;
  bool cancels = false, far = false;
  const double first = std::fabs(c[0]), second = std::fabs(c[1]);
  PYDIFFUSE_ROLLED
  for (int i = 1; i < k; ++i) cancels = cancels || (c[i] < 0) != (c[0] < 0);
  const int o = cancels && first > second ? 0 : 1;
  PYDIFFUSE_ROLLED
  for (int i = 0; i < k; ++i) far = far || !(std::fabs(c[i]) <= 8 * (o ? second : first));
  return far ? -1 : o;
}

// The rows [outs, k + extras + 1] of one sample's linear combinations, from its coefficients; the
// last column is the sample's origin, in whose column the sum of the row's coefficients stands.
PYDIFFUSE_HD inline void mix_rows(int k, int has, int emit, const double* params, const double* c,
                                  double* row) {
  const int terms = k + (has & 1) + (has >> 1 & 1) + (has >> 2 & 1), o = origin(k, c);
  // APG's state: c - u + momentum state
  const double d[3] = {1, -1, emit & EMIT_STATE ? params[param::RULE + 3] : 0};
  for (int out = EMIT_UPDATE; out <= EMIT_STATE; out *= 2) {
    if (!(emit & out)) continue;
    const bool update = out == EMIT_UPDATE, state = out == EMIT_STATE;
    const double scale = state ? 1 : params[update ? param::b : param::q];
    const double* weights = state ? d : c;
    double sum = 0;
    PYDIFFUSE_ROLLED
    for (int i = 0; i < k; ++i) sum += weights[i], row[i] = scale * weights[i];
    if (o >= 0) row[o] = scale * sum;
    int m = k;
    if (has & HAS_X) row[m++] = state ? 0 : params[update ? param::a : param::p];
    if (has & HAS_HISTORY) row[m++] = update ? params[param::h] : 0;
    if (has & HAS_NOISE) row[m++] = update ? params[param::s] : 0;
    row[terms] = o;
    row += terms + 1;
  }
}

// The backward's combinations, with y the gradient of sum_i c_i p_i and dc_i = <y, p_i>:
//   dp_i = sum_j rows[i, j] p_j + rows[i, k] y + shift[i];  dparams [ncolumns], by `columns`.
// They fall into parts that may be computed in any order: c_i, a shift, an entry of G, a parameter.
PYDIFFUSE_HD inline int vjp_parts(int k, int ncolumns) { return 2 * k + triangle(k) + ncolumns; }

PYDIFFUSE_HD inline void vjp_part(int part, Rule rule, Sample<Dual> s, const double* dc,
                                  const int64_t* columns, double* rows, double* shift,
                                  double* dparams, Dual* c /* [k], scratch */) {
  const int k = s.k, entry = part - 2 * k, column = entry - triangle(k);
  auto slope = [&](Seed::Of of, int i, int j) {
    s.seed = {of, i, j};
    coefficients(rule, s, c);
    double sum = 0;
    for (int m = 0; m < k; ++m) sum += dc[m] * c[m].d;
    return sum;
  };
  if (part < k) {
    coefficients(rule, s, c);
    rows[part * (k + 1) + k] = c[part].v;
  } else if (entry < 0) {
    shift[part - k] = s.rescaled ? slope(Seed::sum, part - k, 0) : 0;
  } else if (column < 0) {
    int i, j;
    triangle_entry(k, entry, &i, &j);
    const double g = needs_gram(rule, s.rescaled) ? slope(Seed::gram, i, j) : 0;
    rows[i * (k + 1) + j] = rows[j * (k + 1) + i] = (i == j ? 2 : 1) * g;
  } else {
    dparams[column] = slope(Seed::parameter, static_cast<int>(columns[column]), 0);
  }
}

// From the packed statistics of (p_0 .. p_{k-1}, y): those of p alone, full, and dc.
PYDIFFUSE_HD inline void unpack_vjp(int k, const double* packed, bool sums, double* gram,
                                    double* sum, double* dc) {
  int e = 0;
  for (int i = 0; i <= k; ++i)
    for (int j = i; j <= k; ++j, ++e) {
      if (j < k)
        gram[i * k + j] = gram[j * k + i] = packed[e];
      else if (i < k)
        dc[i] = packed[e];
    }
  for (int i = 0; i < k; ++i) sum[i] = sums ? packed[e++] : 0.0;
}

// Which terms each of those rows has: a term that is not there is not read, so its NaNs stay out.
inline int mix_masks(Rule rule, int k, int has, int emit, uint32_t* used) {
  const uint32_t all = (1u << k) - 1, x = has & HAS_X ? 1u << k : 0;
  const uint32_t preds = rule == Rule::rescale ? 2u : all;
  const uint32_t extras = ((1u << bits(has)) - 1) << k;
  int outs = 0;
  if (emit & EMIT_UPDATE) used[outs++] = preds | extras;
  if (emit & EMIT_PREDICT) used[outs++] = preds | x;
  if (emit & EMIT_STATE) used[outs++] = all;
  return outs;
}

}  // namespace pydiffuse
