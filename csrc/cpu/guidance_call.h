// One guidance call on the CPU: Gram pass, coefficients, combination. Both bindings go through
// here; each brings its own way to split a range over threads:
//   parallel(end, grain, f) calls f(begin, end) over pieces of [0, end), `grain` or more at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "../guidance_rules.h"
#include "capability.h"
#include "guidance.h"

namespace pydiffuse {

inline const GuidanceKernels& guidance_kernels() { return PYDIFFUSE_BEST(guidance); }

constexpr int64_t GRAIN = 32768;  // below this many elements a thread is not worth waking

inline int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }
inline int64_t grain_of(int64_t n, int64_t tensors) {
  return std::max<int64_t>(1, 2 * GRAIN / (std::min(n, CHUNK) * tensors));
}

// The Gram pass, in pieces that one thread or all of them may run.
// packed: [batch, stats(k, sums)], each sample's partial results added in the order of its chunks.
class GramPass {
 public:
  GramPass(int k, bool sums, int64_t batch, int64_t n, const Rows* p, double* packed)
      : args_{k, sums, batch, n, chunks_of(n), {}, packed}, packed_(packed) {
    std::copy(p, p + k, args_.p);
    if (args_.chunks == 1) return;  // each sample's only part is its result
    partial_.resize(batch * args_.chunks * stats(k, sums));
    args_.partial = partial_.data();
  }
  void items(int64_t begin, int64_t end) const { guidance_kernels().gram(args_, begin, end); }
  void finish(int64_t b) const {
    if (args_.chunks == 1) return;
    const int width = stats(args_.k, args_.sums);
    for (int e = 0; e < width; ++e) {
      double sum = 0;
      for (int64_t c = 0; c < args_.chunks; ++c)
        sum += args_.partial[(b * args_.chunks + c) * width + e];
      packed_[b * width + e] = sum;
    }
  }

 private:
  GramArgs args_;
  double* packed_;
  std::vector<double> partial_;
};

template <class Parallel>
void gram(int k, bool sums, int64_t batch, int64_t n, const Rows* p, double* packed,
          Parallel&& parallel) {
  const GramPass pass(k, sums, batch, n, p, packed);
  if (batch * n > 0)
    parallel(batch * chunks_of(n), grain_of(n, k),
             [&](int64_t begin, int64_t end) { pass.items(begin, end); });
  for (int64_t b = 0; b < batch; ++b) pass.finish(b);
  if (n == 0) std::fill(packed, packed + batch * stats(k, sums), 0.0);
}

// Whether two tensors share memory, taken as the stretches from their first to their last element.
inline bool overlap(const Rows& x, const Rows& y, int64_t batch, int64_t n) {
  if (batch * n == 0) return false;
  auto end = [&](const Rows& r) {
    const int64_t size = r.dtype == DType::f32 ? 4 : 2;
    return static_cast<const char*>(r.data) + ((batch - 1) * r.stride + n) * size;
  };
  return static_cast<const char*>(x.data) < end(y) && static_cast<const char*>(y.data) < end(x);
}

inline bool disjoint(const MixArgs& a) {
  for (int j = 0; j < a.outs; ++j)
    for (int m = 0; m < a.terms; ++m)
      if (overlap(a.out[j], a.term[m], a.batch, a.n)) return false;
  return true;
}

template <class Parallel>
void mix(MixArgs& a, Parallel&& parallel) {
  if (a.batch * a.n == 0) return;
  const auto kernel = guidance_kernels().mix;
  parallel(a.batch * a.chunks, grain_of(a.n, a.terms),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Gram pass (if there is one), solve(b) for the coefficients of each sample, combination. Where the
// samples go evenly round the threads, a thread takes a sample through all three while its cache
// holds it; else all threads share each pass. The bits are the same.
template <class Solve, class Parallel>
void gram_solve_mix(const GramPass* gram, MixArgs& a, const Solve& solve, Parallel&& parallel) {
  a.disjoint = a.outs == 1 || disjoint(a);
  const int64_t threads = parallel.threads(), chunks = a.chunks;
  if (a.n > 0 && (a.batch % threads == 0 || a.batch >= 4 * threads)) {
    const auto mix_items = guidance_kernels().mix;
    const int64_t grain = std::max<int64_t>(1, 2 * GRAIN / (a.n * a.terms));
    parallel(a.batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (gram) {
          gram->items(b * chunks, (b + 1) * chunks);
          gram->finish(b);
        }
        solve(b);
        mix_items(a, b * chunks, (b + 1) * chunks);
      }
    });
    return;
  }
  if (gram && a.n > 0)
    parallel(a.batch * chunks, grain_of(a.n, a.terms),
             [&](int64_t begin, int64_t end) { gram->items(begin, end); });
  for (int64_t b = 0; b < a.batch; ++b) {
    if (gram) gram->finish(b);
    solve(b);
  }
  mix(a, parallel);
}

inline MixArgs mix_args(int terms, int64_t batch, int64_t n) {
  MixArgs a{};
  a.terms = a.columns = terms;
  a.batch = batch;
  a.n = n;
  a.chunks = chunks_of(n);
  a.stream = batch * n * int64_t(sizeof(float)) >= STREAM_BYTES;
  return a;
}

template <class Parallel>
void mix(const MixCall& call, Parallel&& parallel) {
  MixArgs a = mix_args(call.terms, call.batch, call.n);
  a.outs = call.outs;
  std::copy(call.term, call.term + call.terms, a.term);
  std::copy(call.out, call.out + call.outs, a.out);
  std::fill(a.used, a.used + a.outs, (1u << a.terms) - 1);
  a.matrix = call.matrix;
  a.shift = call.shift;
  a.disjoint = a.outs == 1 || disjoint(a);
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
  MixArgs a = mix_args(k + bits(call.has), call.batch, call.n);
  a.outs = mix_masks(call.rule, k, call.has, call.emit, a.used);
  a.preds = k;
  a.columns = a.terms + 1;
  std::copy(call.pred, call.pred + k, a.term);
  std::copy(call.extra, call.extra + bits(call.has), a.term + k);
  std::copy(call.out, call.out + a.outs, a.out);

  const bool curved = needs_gram(call.rule, call.rescaled);
  const int64_t rows = int64_t(a.outs) * a.columns;
  std::vector<double> work(call.batch * (rows + width));
  double *matrix = work.data(), *packed = matrix + call.batch * rows;
  a.matrix = matrix;
  auto solve = [&](int64_t b) {
    double params[MAX_PARAMS], g[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], c[MAX_PREDS];
    sample_params(call, b, params);
    if (curved) unpack(k, packed + b * width, call.rescaled, g, sums);
    coefficients(call.rule, Sample<double>{k, double(call.n), g, sums, params, call.rescaled}, c);
    mix_rows(k, call.has, call.emit, params, c, matrix + b * rows);
  };
  if (!curved) return gram_solve_mix(nullptr, a, solve, parallel);
  const GramPass pass(k, call.rescaled, call.batch, call.n, call.pred, packed);
  gram_solve_mix(&pass, a, solve, parallel);
}

// g = sum_i c_i(G, s) p_i and its gradient y: dp_i = c_i y + sum_j dG_ij p_j + ds_i, where dG and
// ds come from dc_i = <y, p_i>. One Gram pass over (p, y) brings G and dc together.
template <class Parallel>
void guide_backward(const GuideBackwardCall& call, Parallel&& parallel) {
  const int k = call.k, width = stats(k + 1, call.rescaled);
  MixArgs a = mix_args(k + 1, call.batch, call.n);
  a.outs = k;
  std::copy(call.pred, call.pred + k, a.term);
  a.term[k] = call.grad;
  std::copy(call.dpred, call.dpred + k, a.out);
  const bool curved = needs_gram(call.rule, call.rescaled);
  std::fill(a.used, a.used + k, curved ? (1u << (k + 1)) - 1 : 1u << k);

  const int64_t rows = int64_t(k) * (k + 1);
  std::vector<double> work(call.batch * (width + rows + k));
  double *packed = work.data(), *matrix = packed + call.batch * width;
  double* shift = matrix + call.batch * rows;
  a.matrix = matrix;
  a.shift = call.rescaled ? shift : nullptr;
  auto solve = [&](int64_t b) {
    double params[MAX_PARAMS], g[MAX_PREDS * MAX_PREDS], sums[MAX_PREDS], dc[MAX_PREDS] = {};
    Dual c[MAX_PREDS];
    sample_params(call, b, params);
    unpack_vjp(k, packed + b * width, call.rescaled, g, sums, dc);
    const Sample<Dual> sample{k, double(call.n), g, sums, params, call.rescaled};
    const int parts = vjp_parts(k, call.dvaried ? call.ncolumns : 0);
    for (int part = 0; part < parts; ++part)
      vjp_part(part, call.rule, sample, dc, call.columns, matrix + b * rows, shift + b * k,
               call.dvaried ? call.dvaried + b * call.ncolumns : nullptr, c);
  };
  if (!curved && !call.dvaried) return gram_solve_mix(nullptr, a, solve, parallel);
  const GramPass pass(k + 1, call.rescaled, call.batch, call.n, a.term, packed);
  gram_solve_mix(&pass, a, solve, parallel);
}

}  // namespace pydiffuse
