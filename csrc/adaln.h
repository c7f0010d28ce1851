// Adaptive layer norm by rows of a small table, as the kernels see a call.
#pragma once

#include "tensor.h"

namespace pydiffuse {

enum class Norm : int { none, layer, rms, count };  // as in pydiffuse/adaln/arguments.py

// v = x, or v = x + gate branch;  y = norm(v) factor + shift.
// Token i takes its shift, factor and gate from row[i] of the table.
struct Modulation {
  int64_t tokens, n;   // R, D
  Rows x, branch;      // [R, D]; no branch, no gate
  const float* table;  // [K, columns, D]: shift, then scale or factor = 1 + scale, then gate
  const int32_t* row;  // [R], 0 .. K - 1
  int64_t table_rows;  // K
  int columns;         // 2, or 3 with a gate
  Norm norm;
  float eps;
  bool factors;  // the table holds factors
};

struct ModulateCall : Modulation {
  Rows y, r;  // [R, D]; r = v, where asked for
};

struct ModulateBackwardCall : Modulation {
  Rows dx, dbranch;  // [R, D]
  float* dtable;     // [K, columns, D]
  Rows dy, dr;       // [R, D]; dr may be missing
};

}  // namespace pydiffuse
