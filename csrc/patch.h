// Patches with a noise level of their own: the vocabulary of kernels and bindings.
//
// t = 0 is noise, t = 1 data, x = alpha x1 + sigma eps. A step, a noising, a change of what is
// predicted and their gradients are all out_j = sum_m c_jm term_m, where c depends on the patch
// only: one kernel moves the data of all of them.
#pragma once

#include "tensor.h"

namespace pydiffuse {

// The codes are those of pydiffuse/_core/grids.py.
enum class Path : int { linear, vp, trig, count };
enum class Kind : int { flow, v, eps, x1, count };
enum class Method : int {
  euler,
  ddim,
  ancestral,
  multistep,
  noise,     // (x1, eps) -> (x_t, target)
  convert,   // (x, prediction) -> another prediction
  residual,  // t (p - u) and -t_next (p - u), u in the place of the noise: the gradient of a loss
  count
};

// Places in the matrix c. x' and what history becomes; x or x1, predictions, history, noise.
enum Out : int { OUT_X, OUT_HISTORY };
enum Term : int { TERM_X, TERM_PRED, TERM_UNCOND, TERM_HISTORY, TERM_NOISE };
constexpr int OUTS = 2, TERMS = 5;

struct PatchRule {
  Method method;
  Path path;
  Kind source, target;
  double eta;
};

// The patches of a sample [channels, planes, rows, columns]; a patch has all channels.
struct Grid {
  int64_t channels, size[3], patch[3];

  int64_t across(int d) const { return patch[d] ? size[d] / patch[d] : 0; }
  int64_t patches() const { return across(0) * across(1) * across(2); }
  int64_t elements() const { return channels * size[0] * size[1] * size[2]; }
  int64_t per_patch() const { return channels * patch[0] * patch[1] * patch[2]; }
};

struct Table {  // a value per patch, [batch, patches] with any strides; null if there is none
  const float* data = nullptr;
  int64_t stride[2] = {};
};

struct MixPatchesCall {
  PatchRule rule;
  Grid grid;
  int64_t batch;
  bool transposed;  // terms are gradients of outputs, outputs gradients of terms
  int terms, outs;
  Rows term[TERMS], out[TERMS];
  int term_place[TERMS], out_place[TERMS];
  Table t, next, last;
  const uint8_t* mask;  // [batch, patches], or null: which patches move
  const float* scales;  // [batch], or null: `scale` for all
  float scale;
  float* arrived;  // [batch, patches], or null: where the patches are now
};

struct PatchLossCall {
  Grid grid;
  int64_t batch;
  Rows pred, target;
  const float *logvar, *weight;  // [batch, patches], or null
  double nll;
  double* loss;    // [batch]: the sum over a sample's elements
  double* errors;  // [batch, patches]: the sum of (pred - target)^2
};

// Each of what it writes may be null: ids and rest both, mask, levels.
struct SelectCall {
  int64_t batch, patches, k;
  const float* score;   // [batch, patches]
  int64_t *ids, *rest;  // [batch, k], [batch, patches - k]
  uint8_t* mask;        // [batch, patches]: 1 is chosen
  float* levels;        // [parts, batch, patches]: where patches are after each part of t to t + dt
  int64_t parts;
  Table t, dt;
  uint32_t* chosen;  // [batch, patches], to work with
};

}  // namespace pydiffuse
