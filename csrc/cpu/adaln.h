// The CPU kernels of adaptive layer norm, as the bindings call them: functions over a range of
// items.
#pragma once

#include "../adaln.h"

namespace pydiffuse {

// Tokens that share a row of the table, in their order; how many depends on D alone. One item: its
// part of the table's gradient is summed where one core's first-level cache holds it.
struct Segment {
  int64_t begin, end;  // of the sorted tokens
  float* sums;         // [columns, D]: dtable itself where the row has no other segment
};

struct ModulateArgs : ModulateCall {
  bool stream;  // the outputs are too large to be worth caching
};

struct ModulateBackwardArgs : ModulateBackwardCall {
  const int64_t* order;    // [R] tokens by their row of the table, then by position
  const Segment* segment;  // by rows of the table
  const int64_t* of_row;   // [K + 1] the segments of each row
  bool stream;
};

constexpr int64_t SUM_COLUMNS = 512;  // of [columns, D], that one item of `sum` adds up

struct AdalnKernels {
  void (*modulate)(const ModulateArgs&, int64_t begin, int64_t end);          // tokens
  void (*backward)(const ModulateBackwardArgs&, int64_t begin, int64_t end);  // segments
  void (*sum)(const ModulateBackwardArgs&, int64_t begin, int64_t end);  // columns of table rows
};

}  // namespace pydiffuse

extern "C" {
__attribute__((visibility("hidden"))) extern const pydiffuse::AdalnKernels pydiffuse_adaln_default,
    pydiffuse_adaln_avx2, pydiffuse_adaln_avx512;
}
