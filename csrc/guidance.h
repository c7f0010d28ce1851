// Guidance: the vocabulary that the CPU kernels, the CUDA kernels and both bindings share.
//
// A guidance rule sees k predictions p_0 .. p_{k-1} of a sample only through their Gram matrix
// G_ij = <p_i, p_j>, their sums s_i and a few parameters; it answers with k coefficients, and the
// guided prediction is sum_i c_i p_i. A sampler's update adds its own terms to the same sum.
#pragma once

#include "tensor.h"

namespace pydiffuse {

constexpr int MAX_PREDS = 16;
constexpr int MAX_TERMS = MAX_PREDS + 3;   // predictions, x, history, noise
constexpr int MAX_OUTS = MAX_PREDS;        // the backward writes a gradient for each prediction
constexpr int MAX_PARAMS = 8 + MAX_PREDS;  // update, rule, one weight per prediction

// The codes are those of pydiffuse/_core/rules.py.
enum class Rule : int {
  linear,
  cfg,
  tcfg,
  cfg_zero,
  apg,
  magnitude_aware,
  perp_neg,
  compose,
  slerp,
  rescale,
  count
};

// Places in the parameter vector of a call; the rule's own parameters follow from RULE on.
// Update:  x' = a x + b g + h history + s noise;   second output  D = p x + q g.
namespace param {
enum : int { a, b, h, s, p, q, original, phi, RULE };
}
constexpr int MAX_RULE_PARAMS = MAX_PARAMS - param::RULE;

// Whether a rule finds all that it reads among that many predictions and parameters, and no more
// predictions than it knows.
constexpr bool rule_fits(Rule rule, int preds, int params) {
  constexpr struct {
    int preds, params;
  } NEEDS[] = {{1, 0}, {2, 1}, {2, 1}, {2, 1}, {2, 4}, {2, 2}, {2, 1}, {1, 0}, {2, 1}, {2, 0}};
  static_assert(sizeof NEEDS / sizeof *NEEDS == static_cast<int>(Rule::count));
  const auto needs = NEEDS[static_cast<int>(rule)];
  const bool weights = rule == Rule::linear || rule == Rule::compose || rule == Rule::perp_neg;
  const int least = weights ? preds - (rule != Rule::linear) : needs.params;
  const int most = weights ? MAX_PREDS : rule == Rule::apg ? 3 : 2;
  return preds >= needs.preds && preds <= most && params >= param::RULE + least &&
         params <= MAX_PARAMS;
}

// Terms of the update that a call brings beside its predictions, in this order.
enum Has : int { HAS_X = 1, HAS_HISTORY = 2, HAS_NOISE = 4 };

// Outputs of a call, in this order: x' (or g where there is no x), D, and the rule's new state.
enum Emit : int { EMIT_UPDATE = 1, EMIT_PREDICT = 2, EMIT_STATE = 4 };

constexpr int bits(int set) { return (set & 1) + (set >> 1 & 1) + (set >> 2 & 1); }

// Entries of the upper triangle of G, row by row, then the k sums.
constexpr int triangle(int k) { return k * (k + 1) / 2; }
constexpr int stats(int k, bool sums) { return triangle(k) + (sums ? k : 0); }
constexpr int MAX_STATS = stats(MAX_PREDS + 1, true);

// The calls, as the bindings hand them to the CPU (cpu/guidance_call.h) and to CUDA
// (cuda/guidance.cu).
struct GuideCall {
  Rule rule;
  int k, has, emit;
  bool rescaled;
  int64_t batch, n;
  Rows pred[MAX_PREDS], extra[3], out[3];
  double params[MAX_PARAMS];
  int nparams;
  const double* varied;         // [batch, ncolumns]: parameters with a value per sample
  int64_t columns[MAX_PARAMS];  // the parameters they stand for
  int ncolumns;
};

struct GuideBackwardCall {
  Rule rule;
  int k;
  bool rescaled;
  int64_t batch, n;
  Rows pred[MAX_PREDS], grad, dpred[MAX_PREDS];
  double params[MAX_PARAMS];
  int nparams;
  const double* varied;
  int64_t columns[MAX_PARAMS];
  int ncolumns;
  double* dvaried;  // [batch, ncolumns], or null
};

struct MixCall {
  int terms, outs;
  int64_t batch, n;
  Rows term[MAX_TERMS], out[MAX_OUTS];
  const double* matrix;  // [batch, outs, terms]
  const double* shift;   // [batch, outs], or null
};

}  // namespace pydiffuse
