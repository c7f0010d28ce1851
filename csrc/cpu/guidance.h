// The CPU kernels of guidance, as the bindings call them: functions over a range of work items.
// An item is CHUNK elements of one sample; chunks depend on nothing but n, so neither the number
// of threads nor the neighbours in the batch change a bit of the result.
#pragma once

#include "../guidance.h"

namespace pydiffuse {

constexpr int64_t CHUNK = 8192;

struct GramArgs {
  int k;
  bool sums;
  int64_t batch, n, chunks;
  Rows p[MAX_PREDS + 1];
  double* partial;  // [batch, chunks, stats(k, sums)]
};

struct MixArgs {  // out_j = shift_j + sum_m matrix_jm term_m, per sample
  int terms, outs;
  int64_t batch, n, chunks;
  Rows term[MAX_TERMS], out[MAX_OUTS];
  uint32_t used[MAX_OUTS];  // bit m: term m appears in out_j (a zero coefficient still counts)
  int preds;                // leading terms that are summed around one of them, if any; then the
  int columns;              // matrix has a column more, their origin (see guidance_rules.h)
  const double* matrix;     // [batch, outs, columns]
  const double* shift;      // [batch, outs], or null
  bool stream;              // the outputs are too large to be worth caching
  bool disjoint;            // no output shares memory with a term
};

struct GuidanceKernels {
  void (*gram)(const GramArgs&, int64_t begin, int64_t end);
  void (*mix)(const MixArgs&, int64_t begin, int64_t end);
};

}  // namespace pydiffuse

extern "C" {
__attribute__((
    visibility("hidden"))) extern const pydiffuse::GuidanceKernels pydiffuse_guidance_default,
    pydiffuse_guidance_avx2, pydiffuse_guidance_avx512;
}
