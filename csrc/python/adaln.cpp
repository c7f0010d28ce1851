// Adaptive layer norm on NumPy arrays.
#include "../cpu/adaln_call.h"

#include "arrays.h"

namespace pydiffuse {
namespace {

// x, branch, y, r: [R, D] of one dtype; table: [K, 2 or 3, D]; row: [R].
void modulate_arrays(const Array& y, const MaybeArray& r, const Array& x, const MaybeArray& branch,
                     const Array& table, const Array& row, int norm, double eps, bool factors) {
  require(x.ndim() == 2, "tokens must be [R, D]");
  const Ints shape = shape_of(x);
  ModulateCall call{};
  call.tokens = shape[0];
  call.n = shape[1];
  const DType dtype = dtype_of(x);
  const auto tokens = [&](const Array& a, bool written = false) {
    require(has_shape(a, shape) && dtype_of(a) == dtype, "tokens must have one shape and dtype");
    return Rows{memory_of(a, written), call.n, dtype};
  };
  call.x = tokens(x);
  call.y = tokens(y, true);
  if (branch) call.branch = tokens(*branch);
  if (r) call.r = tokens(*r, true);
  call.columns = branch ? 3 : 2;
  require(table.ndim() == 3, "table must be [K, 2 or 3, D]");
  call.table_rows = table.shape(0);
  call.table = plane<const float>(table, {call.table_rows, call.columns, call.n});
  call.row = plane<const int32_t>(row, {call.tokens});
  for (int64_t i = 0; i < call.tokens; ++i)
    require(call.row[i] >= 0 && call.row[i] < call.table_rows, "rows must be within the table");
  require(norm >= 0 && norm < static_cast<int>(Norm::count), "unknown norm");
  call.norm = static_cast<Norm>(norm);
  call.eps = static_cast<float>(eps);
  call.factors = factors;
  unlocked([&] { modulate(call, HostThreads()); });
}

}  // namespace

void bind_adaln(py::module_& m) { m.def("modulate", &modulate_arrays); }

}  // namespace pydiffuse
