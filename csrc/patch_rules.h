// The coefficients of a patch, from its levels. T is a number or a vector of them, a patch per
// lane: it has arithmetic, comparisons with ?:, and root() beside it.
#pragma once

#include "patch.h"

namespace pydiffuse {
namespace {  // compiled once per instruction set: nothing here may be shared

template <class T>
struct Level {
  T alpha, sigma, dalpha, dsigma;  // d: slopes in t
};

template <class T>
inline T sine(T x) {  // for |x| <= pi/2, to 1e-13: its series
  const T y = x * x;
  T sum = T{} + 1.0;
  for (int k = 16; k > 0; k -= 2) sum = 1.0 - sum * y * (1.0 / (k * (k + 1)));
  return x * sum;
}

template <class T>
inline Level<T> level(Path path, T t) {
  constexpr double HALF_PI = 1.5707963267948966;
  if (path == Path::linear) return {t, 1.0 - t, T{} + 1.0, T{} - 1.0};
  if (path == Path::trig) {
    const T s = sine(HALF_PI * t), c = sine(HALF_PI * (1.0 - t));
    return {s, c, HALF_PI * c, -HALF_PI * s};
  }
  const T q = t * t + (1.0 - t) * (1.0 - t), r = 1.0 / root(q);
  const T alpha = t * r, sigma = (1.0 - t) * r;
  return {alpha, sigma, sigma / q, -alpha / q};
}

template <class T>
struct Pair {
  T a, b;  // a x1 + b eps, or a x + b g
};

template <class T>
inline Pair<T> prediction(Kind kind, const Level<T>& l) {
  const T zero = {}, one = zero + 1.0;
  if (kind == Kind::flow) return {one, -one};
  if (kind == Kind::eps) return {zero, one};
  if (kind == Kind::x1) return {one, zero};
  const T r = 1.0 / root(l.alpha * l.alpha + l.sigma * l.sigma);
  return {-l.sigma * r, l.alpha * r};
}

template <class T>
struct Levels {
  T now, next, last;  // t, t_next, and the level at which the history was predicted
};

// c must be zero. g = scale pred + (1 - scale) uncond.
template <class T>
inline void coefficients(const PatchRule& rule, const Levels<T>& at, T scale, T (*c)[TERMS]) {
  if (rule.method == Method::residual) {
    c[OUT_X][TERM_X] = at.now, c[OUT_X][TERM_NOISE] = -at.now;
    c[OUT_HISTORY][TERM_X] = -at.next, c[OUT_HISTORY][TERM_NOISE] = at.next;
    return;
  }
  const Level<T> l = level(rule.path, at.now);
  if (rule.method == Method::noise) {
    const Pair<T> target = prediction(rule.target, l);
    c[OUT_X][TERM_X] = l.alpha, c[OUT_X][TERM_NOISE] = l.sigma;
    c[OUT_HISTORY][TERM_X] = target.a, c[OUT_HISTORY][TERM_NOISE] = target.b;
    return;
  }
  const T h = at.next - at.now;
  const bool slope = rule.method == Method::euler || rule.method == Method::multistep;
  const Pair<T> source = prediction(rule.source, l);
  // From (x, g) to a x1 + b eps.
  const auto combined = [&](T a, T b) -> Pair<T> {
    const T by = 1.0 / (l.alpha * source.b - l.sigma * source.a);
    return {(a * source.b - b * source.a) * by, (b * l.alpha - a * l.sigma) * by};
  };
  Pair<T> y{T{}, T{} + 1.0};
  if (rule.method == Method::convert) {
    const Pair<T> target = prediction(rule.target, l);
    y = combined(target.a, target.b);
  } else if (slope) {
    if (rule.path != Path::linear || rule.source != Kind::flow) y = combined(l.dalpha, l.dsigma);
    T ahead = h;
    if (rule.method == Method::multistep) {
      const T before = at.now - at.last, none = {};
      const T half = before > 0.0 ? 0.5 * h / before : none;
      c[OUT_X][TERM_HISTORY] = -h * half;
      c[OUT_HISTORY][TERM_X] = y.a;
      c[OUT_HISTORY][TERM_PRED] = y.b * scale, c[OUT_HISTORY][TERM_UNCOND] = y.b * (1.0 - scale);
      ahead = h * (1.0 + half);
    }
    y = {1.0 + ahead * y.a, ahead * y.b};
  } else {
    const Level<T> next = level(rule.path, at.next);
    T sigma = next.sigma;
    if (rule.method == Method::ancestral) {
      const T one = T{} + 1.0, none = {};
      const auto forward = h > 0.0;
      T q = next.sigma * l.alpha / (forward ? next.alpha * l.sigma : one);
      q = forward && q < 1.0 ? q : one;
      const T up = rule.eta * next.sigma * root(1.0 - q * q);
      const T left = sigma * sigma - up * up;
      sigma = root(left > 0.0 ? left : none);
      c[OUT_X][TERM_NOISE] = up;
    }
    y = combined(next.alpha, sigma);
  }
  c[OUT_X][TERM_X] = y.a;
  c[OUT_X][TERM_PRED] = y.b * scale, c[OUT_X][TERM_UNCOND] = y.b * (1.0 - scale);
}

}  // namespace
}  // namespace pydiffuse
