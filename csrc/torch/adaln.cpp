// The torch binding of adaptive layer norm on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include "../cpu/adaln_call.h"
#include "direct.h"

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

// rows as int32, one for each token: from int32 or int64 that broadcast to x's tokens, all within
// the table. Empty where they are not.
std::vector<int32_t> rows_of(const Tensor& rows, const Tensor& x, int64_t table_rows) {
  const int64_t dims = x.dim() - 1, own = rows.dim();
  const bool wide = rows.scalar_type() == ScalarType::Long;
  if (!rows.is_cpu() || own > dims || dims >= MAX_DIMS ||
      (!wide && rows.scalar_type() != ScalarType::Int))
    return {};
  int64_t strides[MAX_DIMS] = {}, at[MAX_DIMS] = {}, offset = 0, tokens = 1;
  for (int64_t d = 0; d < dims; ++d) {
    tokens *= x.size(d);
    const int64_t mine = d - (dims - own);
    if (mine < 0 || rows.size(mine) == 1) continue;
    if (rows.size(mine) != x.size(d)) return {};
    strides[d] = rows.stride(mine);
  }
  std::vector<int32_t> found(tokens);
  const void* data = rows.data_ptr();
  for (int32_t& row : found) {
    const int64_t value = wide ? static_cast<const int64_t*>(data)[offset]
                               : static_cast<const int32_t*>(data)[offset];
    if (value < 0 || value >= table_rows) return {};
    row = static_cast<int32_t>(value);
    for (int64_t d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++at[d] < x.size(d)) break;
      offset -= at[d] * strides[d];
      at[d] = 0;
    }
  }
  return found;
}

// Contiguous tokens [..., D]; y, and r where there is a branch.
std::tuple<MaybeTensor, MaybeTensor> modulate_new_cpu(const Tensor& x, const MaybeTensor& branch,
                                                      const Tensor& table, const Tensor& rows,
                                                      int64_t norm, double eps) {
  const Usual usual(x);
  ModulateCall call{};
  DType dtype, of_table;
  if (!usual.floating(x, &dtype) || x.dim() < 1 || !x.is_contiguous() || x.numel() == 0) return {};
  call.n = x.size(x.dim() - 1);
  call.tokens = x.numel() / call.n;
  call.columns = branch ? 3 : 2;
  call.table_rows = table.dim() == 3 ? table.size(0) : 0;
  if (!usual.floating(table, &of_table) ||
      !has_sizes(table, {call.table_rows, call.columns, call.n}))
    return {};
  if (branch && (!same_sizes(*branch, x) || branch->scalar_type() != x.scalar_type() ||
                 !usual.here(*branch) || !branch->is_contiguous()))
    return {};
  if (norm < 0 || norm >= static_cast<int64_t>(Norm::count) || !(eps >= 0)) return {};
  const std::vector<int32_t> row = rows_of(rows, x, call.table_rows);
  if (row.empty()) return {};
  Tensor floats = table;
  if (of_table != DType::f32) floats = torch::stable::to(floats, ScalarType::Float);
  if (!floats.is_contiguous()) floats = torch::stable::contiguous(floats);
  call.table = static_cast<const float*>(floats.data_ptr());
  call.row = row.data();
  call.norm = static_cast<Norm>(norm);
  call.eps = static_cast<float>(eps);
  call.x = {x.data_ptr(), call.n, dtype};
  const Tensor y = new_like(x);
  call.y = {y.data_ptr(), call.n, dtype};
  MaybeTensor r;
  if (branch) {
    call.branch = {branch->data_ptr(), call.n, dtype};
    r = new_like(x);
    call.r = {r->data_ptr(), call.n, dtype};
  }
  modulate(call, TorchThreads{});
  return {y, r};
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

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("modulate", TORCH_BOX(&modulate_cpu));
  m.impl("modulate.new", TORCH_BOX(&modulate_new_cpu));
  m.impl("modulate_backward", TORCH_BOX(&modulate_backward_cpu));
}

}  // namespace pydiffuse
