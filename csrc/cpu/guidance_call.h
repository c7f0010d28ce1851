// One guidance call on the CPU: Gram pass, coefficients, combination. Both doors go through here;
// each brings its own way to split a range over threads:
//   parallel(end, grain, f) calls f(begin, end) over pieces of [0, end), `grain` or more at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "../guidance_rules.h"
#include "capability.h"
#include "guidance.h"

namespace pydiffuse {

struct GuideCall {
  Rule rule;
  int k, has, emit;
  bool rescaled;
  int64_t batch, n;
  Rows pred[MAX_PREDS], extra[3], out[3];
  double params[MAX_PARAMS];
  int nparams;
  const double* varied;           // [batch, ncolumns]: parameters with a value per sample
  int64_t columns[MAX_PARAMS];    // the parameters they stand for
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
  double* dvaried;                // [batch, ncolumns], or null
};

struct MixCall {
  int terms, outs;
  int64_t batch, n;
  Rows term[MAX_TERMS], out[MAX_OUTS];
  const double* matrix;           // [batch, outs, terms]
  const double* shift;            // [batch, outs], or null
};

inline const GuidanceKernels& guidance_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return pydiffuse_guidance_avx512;
  if (capability() == Capability::avx2) return pydiffuse_guidance_avx2;
#endif
  return pydiffuse_guidance_default;
}

// Below this many elements a thread is not worth waking; above this many bytes written, an output
// will be gone from the caches before anyone reads it, so its lines are not fetched for writing.
constexpr int64_t GRAIN = 32768;
constexpr int64_t STREAM_BYTES = int64_t(4) << 20;

inline int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }
inline int64_t grain_of(int64_t n, int64_t tensors) {
  return std::max<int64_t>(1, 2 * GRAIN / (std::min(n, CHUNK) * tensors));
}

// packed: [batch, stats(k, sums)], each sample's partial results added in the order of its chunks.
template <class Parallel>
void gram(int k, bool sums, int64_t batch, int64_t n, const Rows* p, double* packed,
          Parallel&& parallel) {
  const int width = stats(k, sums);
  GramArgs a{k, sums, batch, n, chunks_of(n), {}, packed};
  std::copy(p, p + k, a.p);
  std::vector<double> partial;
  if (a.chunks != 1) {
    partial.resize(batch * a.chunks * width);
    a.partial = partial.data();
  }
  const auto kernel = guidance_kernels().gram;
  if (batch * a.chunks > 0)
    parallel(batch * a.chunks, grain_of(n, k),
             [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (a.chunks == 1) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int e = 0; e < width; ++e) {
      double sum = 0;
      for (int64_t c = 0; c < a.chunks; ++c) sum += a.partial[(b * a.chunks + c) * width + e];
      packed[b * width + e] = sum;
    }
}

template <class Parallel>
void mix(MixArgs& a, Parallel&& parallel) {
  a.chunks = chunks_of(a.n);
  if (a.batch * a.chunks == 0) return;
  a.stream = a.batch * a.n * int64_t(sizeof(float)) >= STREAM_BYTES;
  const auto kernel = guidance_kernels().mix;
  parallel(a.batch * a.chunks, grain_of(a.n, a.terms),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

template <class Parallel>
void mix(const MixCall& call, Parallel&& parallel) {
  MixArgs a{};
  a.terms = call.terms;
  a.outs = call.outs;
  a.batch = call.batch;
  a.n = call.n;
  std::copy(call.term, call.term + call.terms, a.term);
  std::copy(call.out, call.out + call.outs, a.out);
  std::fill(a.used, a.used + a.outs, (1u << a.terms) - 1);
  a.matrix = call.matrix;
  a.shift = call.shift;
  mix(a, parallel);
}

// This sample's parameters: the common ones, with those that vary put in.
template <class Call>
void sample_params(const Call& call, int64_t b, double* params) {
  std::copy(call.params, call.params + call.nparams, params);
  for (int i = 0; i < call.ncolumns; ++i)
    params[call.columns[i]] = call.varied[b * call.ncolumns + i];
}

template <class Parallel>
void guide(const GuideCall& call, Parallel&& parallel) {
  const int k = call.k, width = stats(k, call.rescaled);
  MixArgs a{};
  a.terms = k + bits(call.has);
  a.outs = mix_masks(call.rule, k, call.has, call.emit, a.used);
  a.batch = call.batch;
  a.n = call.n;
  std::copy(call.pred, call.pred + k, a.term);
  std::copy(call.extra, call.extra + bits(call.has), a.term + k);
  std::copy(call.out, call.out + a.outs, a.out);

  const bool curved = needs_gram(call.rule, call.rescaled);
  const int64_t rows = int64_t(a.outs) * a.terms;
  std::vector<double> work(call.batch * (rows + width));
  double *matrix = work.data(), *packed = matrix + call.batch * rows;
  if (curved) gram(k, call.rescaled, call.batch, call.n, call.pred, packed, parallel);
  for (int64_t b = 0; b < call.batch; ++b) {
    double params[MAX_PARAMS], g[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], c[MAX_PREDS];
    sample_params(call, b, params);
    if (curved) unpack(k, packed + b * width, call.rescaled, g, sums);
    coefficients(call.rule, Sample<double>{k, double(call.n), g, sums, params, call.rescaled}, c);
    mix_rows(k, call.has, call.emit, params, c, matrix + b * rows);
  }
  a.matrix = matrix;
  mix(a, parallel);
}

// g = sum_i c_i(G, s) p_i and its gradient y: dp_i = c_i y + sum_j dG_ij p_j + ds_i, where dG and ds
// come from dc_i = <y, p_i>. One Gram pass over (p, y) brings G and dc together.
template <class Parallel>
void guide_backward(const GuideBackwardCall& call, Parallel&& parallel) {
  const int k = call.k, width = stats(k + 1, call.rescaled);
  MixArgs a{};
  a.terms = k + 1;
  a.outs = k;
  a.batch = call.batch;
  a.n = call.n;
  std::copy(call.pred, call.pred + k, a.term);
  a.term[k] = call.grad;
  std::copy(call.dpred, call.dpred + k, a.out);
  const bool curved = needs_gram(call.rule, call.rescaled);
  std::fill(a.used, a.used + k, curved ? (1u << (k + 1)) - 1 : 1u << k);

  const int64_t rows = int64_t(k) * (k + 1);
  std::vector<double> work(call.batch * (width + rows + k));
  double *packed = work.data(), *matrix = packed + call.batch * width;
  double* shift = matrix + call.batch * rows;
  if (curved || call.dvaried)
    gram(k + 1, call.rescaled, call.batch, call.n, a.term, packed, parallel);
  for (int64_t b = 0; b < call.batch; ++b) {
    double params[MAX_PARAMS];
    sample_params(call, b, params);
    vjp_rows(call.rule, k, double(call.n), packed + b * width, call.rescaled, params, call.nparams,
             call.columns, call.ncolumns, matrix + b * rows, shift + b * k,
             call.dvaried ? call.dvaried + b * call.ncolumns : nullptr);
  }
  a.matrix = matrix;
  a.shift = call.rescaled ? shift : nullptr;
  mix(a, parallel);
}

}  // namespace pydiffuse
