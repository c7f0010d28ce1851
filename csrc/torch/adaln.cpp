// The torch door of adaptive layer norm on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include "../cpu/adaln_call.h"
#include "tensors.h"

namespace pydiffuse {
namespace {

// A tensor [R, D] like x: of its shape and dtype, the features of each token side by side.
Rows tokens_of(const char* op, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1), op,
                  ": all tensors must have one shape [R, D]");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op,
                  ": the features of each token must lie side by side");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && !t.is_cuda(), op,
                  ": all tensors must have one dtype and be on the CPU");
  return {t.data_ptr(), t.stride(0), dtype_of(op, t)};
}

Modulation modulation(const char* op, const Tensor& x, const MaybeTensor& branch,
                      const Tensor& table, const Tensor& rows, int64_t norm, double eps,
                      bool factors) {
  Modulation m{};
  m.x = tokens_of(op, x, x);
  if (branch) m.branch = tokens_of(op, *branch, x);
  m.tokens = x.size(0);
  m.n = x.size(1);
  m.columns = branch ? 3 : 2;
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 3 &&
                      table.size(1) == m.columns && table.size(2) == m.n && table.is_contiguous() &&
                      !table.is_cuda(),
                  op, ": table must be contiguous float32 [K, ", m.columns, ", ", m.n, "]");
  m.table = static_cast<const float*>(table.data_ptr());
  m.table_rows = table.size(0);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Int && rows.dim() == 1 &&
                      rows.size(0) == m.tokens && rows.is_contiguous() && !rows.is_cuda(),
                  op, ": rows must be contiguous int32 [", m.tokens, "]");
  m.row = static_cast<const int32_t*>(rows.data_ptr());
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < m.tokens; ++i) {
    low = std::min(low, m.row[i]);
    high = std::max(high, m.row[i]);
  }
  STD_TORCH_CHECK(low >= 0 && high < m.table_rows, op, ": rows holds ", low < 0 ? low : high,
                  "; accepted: 0 to ", m.table_rows - 1, ", the rows of table");
  STD_TORCH_CHECK(norm >= 0 && norm < static_cast<int64_t>(Norm::count), op, ": unknown norm");
  m.norm = static_cast<Norm>(norm);
  m.eps = static_cast<float>(eps);
  m.factors = factors;
  return m;
}

void modulate_cpu(const Tensor& y, const MaybeTensor& r, const Tensor& x, const MaybeTensor& branch,
                  const Tensor& table, const Tensor& rows, int64_t norm, double eps, bool factors) {
  constexpr const char* op = "modulate";
  ModulateCall call{modulation(op, x, branch, table, rows, norm, eps, factors), {}, {}};
  call.y = tokens_of(op, y, x);
  if (r) call.r = tokens_of(op, *r, x);
  modulate(call, TorchThreads{});
}

void modulate_backward_cpu(const Tensor& dx, const MaybeTensor& dbranch, const Tensor& dtable,
                           const Tensor& dy, const MaybeTensor& dr, const Tensor& x,
                           const MaybeTensor& branch, const Tensor& table, const Tensor& rows,
                           int64_t norm, double eps, bool factors) {
  constexpr const char* op = "modulate_backward";
  ModulateBackwardCall call{};
  static_cast<Modulation&>(call) = modulation(op, x, branch, table, rows, norm, eps, factors);
  STD_TORCH_CHECK(dbranch.has_value() == branch.has_value(), op,
                  ": dbranch and branch come together");
  STD_TORCH_CHECK(dtable.scalar_type() == ScalarType::Float && dtable.is_contiguous() &&
                      dtable.numel() == table.numel() && !dtable.is_cuda(),
                  op, ": dtable must be contiguous float32, like table");
  call.dx = tokens_of(op, dx, x);
  call.dy = tokens_of(op, dy, x);
  if (dbranch) call.dbranch = tokens_of(op, *dbranch, x);
  if (dr) call.dr = tokens_of(op, *dr, x);
  call.dtable = static_cast<float*>(dtable.data_ptr());
  modulate_backward(call, TorchThreads{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydiffuse, CPU, m) {
  m.impl("modulate", TORCH_BOX(&modulate_cpu));
  m.impl("modulate_backward", TORCH_BOX(&modulate_backward_cpu));
}

}  // namespace pydiffuse
