// One call of adaptive layer norm on the CPU: which work goes to which thread.
//   parallel(end, grain, f) calls f(begin, end) over pieces of [0, end), `grain` or more at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "adaln.h"
#include "capability.h"
#include "floats.h"

namespace pydiffuse {

inline const AdalnKernels& adaln_kernels() { return PYDIFFUSE_BEST(adaln); }

constexpr int64_t TOKENS_GRAIN = 32768;  // features that are worth waking a thread for
constexpr int64_t SEGMENT_FEATURES = 65536;

template <class Parallel>
void modulate(const ModulateCall& call, Parallel&& parallel) {
  if (call.tokens * call.n == 0) return;
  ModulateArgs a{call, call.tokens * call.n * bytes_of(call.y.dtype) >= STREAM_BYTES};
  const auto kernel = adaln_kernels().modulate;
  parallel(call.tokens, std::max<int64_t>(1, TOKENS_GRAIN / call.n),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Sorted by their row of the table (a counting sort), tokens are cut into segments of one row each.
// Segments depend on `row` and D alone, so neither threads nor the machine change a bit of dtable,
// and few rows or a row per token take the same path.
template <class Parallel>
void modulate_backward(const ModulateBackwardCall& call, Parallel&& parallel) {
  const int64_t K = call.table_rows, width = call.columns * call.n;
  if (call.n == 0) return;
  std::vector<int64_t> start(K + 1), order(call.tokens), of_row(K + 1);
  for (int64_t i = 0; i < call.tokens; ++i) ++start[call.row[i] + 1];
  for (int64_t k = 0; k < K; ++k) start[k + 1] += start[k];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < call.tokens; ++i) order[next[call.row[i]]++] = i;

  const int64_t length = std::clamp<int64_t>(SEGMENT_FEATURES / call.n, 16, 1024);
  std::vector<Segment> segments;
  int64_t spilled = 0;  // segments whose sums are not a whole row of dtable
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t i = start[k]; i < start[k + 1]; i += length)
      segments.push_back({i, std::min(i + length, start[k + 1]), nullptr});
    of_row[k + 1] = static_cast<int64_t>(segments.size());
    if (of_row[k + 1] - of_row[k] > 1) spilled += of_row[k + 1] - of_row[k];
  }
  const int64_t padded = (width + 15) / 16 * 16;  // on cache lines
  const Floats partial(spilled * padded);
  float* free = partial.data();
  for (int64_t k = 0; k < K; ++k)
    for (int64_t s = of_row[k]; s < of_row[k + 1]; ++s) {
      const bool alone = of_row[k + 1] - of_row[k] == 1;
      segments[s].sums = alone ? call.dtable + k * width : free;
      if (!alone) free += padded;
    }

  const int64_t written = call.tokens * call.n * bytes_of(call.dx.dtype);
  ModulateBackwardArgs a{call, order.data(), segments.data(), of_row.data(),
                         written >= STREAM_BYTES};
  const AdalnKernels& kernels = adaln_kernels();
  const int64_t grain = std::max<int64_t>(1, TOKENS_GRAIN / (length * call.n));
  if (!segments.empty())
    parallel(static_cast<int64_t>(segments.size()), grain,
             [&](int64_t begin, int64_t end) { kernels.backward(a, begin, end); });
  const int64_t blocks = (width + SUM_COLUMNS - 1) / SUM_COLUMNS;
  parallel(K * blocks, 16, [&](int64_t begin, int64_t end) { kernels.sum(a, begin, end); });
}

}  // namespace pydiffuse
