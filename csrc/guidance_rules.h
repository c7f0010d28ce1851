// The guidance rules: from a sample's Gram matrix to its coefficients, in float64.
//
// Written once over a scalar type T: `double` gives the coefficients, `Dual` one directional
// derivative of them, from which `coefficients_vjp` builds the gradient by seeding each entry in
// turn. k is small, so this costs nothing beside a pass over the predictions, and no rule needs a
// backward formula of its own. Degenerate cases are defined where the division happens.
#pragma once

#include <cmath>

#include "guidance.h"

#ifdef __CUDACC__
#define PYDIFFUSE_HD __host__ __device__
#else
#define PYDIFFUSE_HD
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

// What a rule sees of one sample.
template <class T>
struct Sample {
  int k;             // predictions
  double n;          // elements in each
  const T* gram;     // [k, k]
  const T* sums;     // [k], read only when the result is rescaled
  const T* params;   // [RULE + ...], in the order of `param`
  bool rescaled;     // params[phi] is not the constant 0
  PYDIFFUSE_HD T g(int i, int j) const { return gram[i * k + j]; }
  PYDIFFUSE_HD T rule(int i) const { return params[param::RULE + i]; }
  PYDIFFUSE_HD bool original() const { return value(params[param::original]) != 0; }
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
  if (value(uu) == 0 && value(dd) > 0) decay = T(value(alpha) > 0 ? 0.0 : 1.0);
  else if (!(value(dd) == 0)) decay = exponential(-alpha * root(dd / uu));
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
// where g is constant. A variance below 1e-13 of its second moment is rounding, hence zero.
template <class T>
PYDIFFUSE_HD void rescale(const Sample<T>& s, T* c) {
  T gg(0.0), mean(0.0);
  for (int i = 0; i < s.k; ++i) {
    mean = mean + c[i] * s.sums[i];
    for (int j = 0; j < s.k; ++j) gg = gg + c[i] * c[j] * s.g(i, j);
  }
  const T n(s.n > 0 ? s.n : 1);
  const T var_g = gg - mean * mean / n;
  const T var_c = s.g(0, 0) - s.sums[0] * s.sums[0] / n;
  if (value(var_g) <= 1e-13 * value(gg)) return;
  const T ratio = value(var_c) <= 1e-13 * value(s.g(0, 0)) ? T(0.0) : root(var_c / var_g);
  const T factor = T(1.0) + s.params[param::phi] * (ratio - T(1.0));
  for (int i = 0; i < s.k; ++i) c[i] = factor * c[i];
}

// c[k] for one sample.
template <class T>
PYDIFFUSE_HD void coefficients(Rule rule, const Sample<T>& s, T* c) {
  switch (rule) {
    case Rule::linear:
      for (int i = 0; i < s.k; ++i) c[i] = s.rule(i);
      break;
    case Rule::cfg: extrapolate(s, s.rule(0), T(0.0), T(1.0), c); break;
    case Rule::tcfg: tcfg(s, c); break;
    case Rule::cfg_zero: cfg_zero(s, c); break;
    case Rule::apg: apg(s, c); break;
    case Rule::magnitude_aware: magnitude_aware(s, c); break;
    case Rule::perp_neg: perp_neg(s, c); break;
    case Rule::compose: compose(s, c); break;
    case Rule::slerp: slerp(s, c); break;
    case Rule::rescale:  // predictions: the one whose spread is kept, the guided one
      c[0] = T(0.0);
      c[1] = T(1.0);
      break;
    default: break;
  }
  if (s.rescaled) rescale(s, c);
}

// A rule that only weighs, and is not rescaled, needs no pass over the predictions beforehand.
PYDIFFUSE_HD inline bool needs_gram(Rule rule, bool rescaled) {
  return rescaled || !(rule == Rule::linear || rule == Rule::cfg || rule == Rule::compose);
}

// Gram entries arrive as an upper triangle followed by the sums; rules read a full matrix.
template <class T>
PYDIFFUSE_HD void unpack(int k, const double* packed, bool sums, T* gram, T* sum) {
  int e = 0;
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) gram[i * k + j] = gram[j * k + i] = T(packed[e++]);
  for (int i = 0; i < k; ++i) sum[i] = T(sums ? packed[e++] : 0.0);
}

// The gradient of sum_i dc[i] c[i]: dgram [k, k] (symmetric, ready to multiply predictions:
// dp_i = sum_j dgram_ij p_j), dsums [k], dparams for the `seeds` columns asked for.
PYDIFFUSE_HD inline void coefficients_vjp(Rule rule, int k, double n, const double* packed, bool rescaled,
                                          const double* params, int nparams, const double* dc,
                                          const int64_t* columns, int ncolumns, double* dgram,
                                          double* dsums, double* dparams) {
  Dual gram[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], p[MAX_PARAMS], c[MAX_PREDS];
  unpack(k, packed, rescaled, gram, sums);
  for (int i = 0; i < nparams; ++i) p[i] = Dual(params[i]);
  const Sample<Dual> sample{k, n, gram, sums, p, rescaled};
  auto slope = [&](Dual& seed) {
    seed.d = 1;
    coefficients(rule, sample, c);
    seed.d = 0;
    double sum = 0;
    for (int i = 0; i < k; ++i) sum += dc[i] * c[i].d;
    return sum;
  };
  const bool curved = needs_gram(rule, rescaled);
  for (int i = 0; i < k; ++i) {
    for (int j = i; j < k; ++j) {
      double g = 0;
      if (curved) {  // G_ij and G_ji are the same number: both entries move
        gram[j * k + i].d = 1;
        g = slope(gram[i * k + j]);
        gram[j * k + i].d = 0;
      }
      dgram[i * k + j] = dgram[j * k + i] = (i == j ? 2 : 1) * g;
    }
    dsums[i] = rescaled ? slope(sums[i]) : 0;
  }
  for (int i = 0; i < ncolumns; ++i) dparams[i] = slope(p[columns[i]]);
}

// The rows [outs, k + extras] of one sample's linear combinations, from its coefficients.
PYDIFFUSE_HD inline void mix_rows(int k, int has, int emit, const double* params, const double* c,
                                  double* row) {
  const int terms = k + (has & 1) + (has >> 1 & 1) + (has >> 2 & 1);
  auto extras = [&](double x, double history, double noise) {
    int m = k;
    if (has & HAS_X) row[m++] = x;
    if (has & HAS_HISTORY) row[m++] = history;
    if (has & HAS_NOISE) row[m++] = noise;
    row += terms;
  };
  if (emit & EMIT_UPDATE) {
    for (int i = 0; i < k; ++i) row[i] = params[param::b] * c[i];
    extras(params[param::a], params[param::h], params[param::s]);
  }
  if (emit & EMIT_PREDICT) {
    for (int i = 0; i < k; ++i) row[i] = params[param::q] * c[i];
    extras(params[param::p], 0, 0);
  }
  if (emit & EMIT_STATE) {  // APG: c - u + momentum state
    const double d[3] = {1, -1, params[param::RULE + 3]};
    for (int i = 0; i < k; ++i) row[i] = d[i];
    extras(0, 0, 0);
  }
}

// The backward's combinations, from the packed statistics of (p_0 .. p_{k-1}, y), y the gradient of
// sum_i c_i p_i:  dp_i = sum_j rows[i, j] p_j + rows[i, k] y + shift[i];  dparams [ncolumns] or null.
PYDIFFUSE_HD inline void vjp_rows(Rule rule, int k, double n, const double* packed, bool rescaled,
                                  const double* params, int nparams, const int64_t* columns,
                                  int ncolumns, double* rows, double* shift, double* dparams) {
  double own[MAX_STATS] = {}, dc[MAX_PREDS] = {}, dgram[MAX_PREDS * MAX_PREDS], unused[MAX_PARAMS];
  int from = 0, to = 0;
  for (int i = 0; i <= k; ++i)  // take the row of y out of the triangle
    for (int j = i; j <= k; ++j, ++from) {
      if (j < k) own[to++] = packed[from];
      else if (i < k) dc[i] = packed[from];
    }
  for (int i = 0; i < k; ++i) own[to++] = rescaled ? packed[from++] : 0;

  double gram[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], c[MAX_PREDS];
  unpack(k, own, rescaled, gram, sums);
  coefficients(rule, Sample<double>{k, n, gram, sums, params, rescaled}, c);
  coefficients_vjp(rule, k, n, own, rescaled, params, nparams, dc, columns, dparams ? ncolumns : 0,
                   dgram, shift, dparams ? dparams : unused);
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j) rows[i * (k + 1) + j] = dgram[i * k + j];
    rows[i * (k + 1) + k] = c[i];
  }
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
