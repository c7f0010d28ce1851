// The torch binding of token routing on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include <algorithm>

#include "../cpu/routing_call.h"
#include "direct.h"

namespace pydiffuse {
namespace {

TokenRows tokens_of(const char* op, const Tensor& t, const Tensor& like, int64_t count) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == like.size(0) && t.size(1) == count && t.size(2) == like.size(2),
      op, ": tensors must be [B, N, C] with one B and one C");
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, op,
                  ": the features of each token must lie side by side");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && !t.is_cuda(), op,
                  ": all tensors must have one dtype and be on the CPU");
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

// ids [B, keep] of N tokens, and the gate beside them.
MoveCall move_of(const char* op, const Tensor& out, const Tensor& ids, const MaybeTensor& gate,
                 int64_t N) {
  STD_TORCH_CHECK(out.dim() == 3, op, ": tensors must be [B, N, C]");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == out.size(0) && ids.is_contiguous() &&
                      ids.scalar_type() == ScalarType::Int && !ids.is_cuda(),
                  op, ": ids must be contiguous int32 [B, keep]");
  const auto* id = static_cast<const int32_t*>(ids.data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < N, op, ": ids holds ", id[i], "; accepted: 0 to ", N - 1);
  MoveCall call{};
  call.batch = out.size(0);
  call.n = out.size(2);
  call.dtype = dtype_of(op, out);
  if (gate) {
    STD_TORCH_CHECK(gate->scalar_type() == ScalarType::Float && gate->is_contiguous() &&
                        gate->dim() == 2 && gate->size(0) == ids.size(0) &&
                        gate->size(1) == ids.size(1) && !gate->is_cuda(),
                    op, ": gate must be contiguous float32 [B, keep]");
    call.gate = static_cast<const float*>(gate->data_ptr());
    call.gates = gate->size(1);
  }
  return call;
}

void gather_tokens_cpu(const Tensor& out, const Tensor& x, const Tensor& ids,
                       const MaybeTensor& gate) {
  constexpr const char* op = "gather_tokens";
  STD_TORCH_CHECK(x.dim() == 3, op, ": tensors must be [B, N, C]");
  MoveCall call = move_of(op, out, ids, gate, x.size(1));
  call.count = ids.size(1);
  call.out = tokens_of(op, out, out, call.count);
  call.y = tokens_of(op, x, out, x.size(1));
  call.index = static_cast<const int32_t*>(ids.data_ptr());
  move_tokens(call, TorchThreads{});
}

// Where each token's replacement is, -1 for none; so that every token is written once, in order.
std::vector<int32_t> slots_of(const char* op, const Tensor& ids, int64_t N) {
  const int64_t B = ids.size(0), keep = ids.size(1);
  const auto* id = static_cast<const int32_t*>(ids.data_ptr());
  std::vector<int32_t> slot(B * N, -1);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < keep; ++j) {
      int32_t& s = slot[b * N + id[b * keep + j]];
      STD_TORCH_CHECK(s < 0, op, ": ids holds ", id[b * keep + j], " twice in sample ", b);
      s = static_cast<int32_t>(j);
    }
  return slot;
}

void scatter_tokens_cpu(const Tensor& out, const MaybeTensor& base, const MaybeTensor& y,
                        const Tensor& ids, const MaybeTensor& gate) {
  constexpr const char* op = "scatter_tokens";
  STD_TORCH_CHECK(out.dim() == 3, op, ": tensors must be [B, N, C]");
  const int64_t N = out.size(1), keep = ids.dim() == 2 ? ids.size(1) : 0;
  MoveCall call = move_of(op, out, ids, gate, N);
  call.out = tokens_of(op, out, out, N);
  if (base) call.base = tokens_of(op, *base, out, N);
  if (y) call.y = tokens_of(op, *y, out, keep);
  const std::vector<int32_t> slot = slots_of(op, ids, N);
  const bool in_place = base && call.base.data == call.out.data &&
                        call.base.token == call.out.token && call.base.sample == call.out.sample;
  if (in_place) {
    call.count = keep;
    call.place = static_cast<const int32_t*>(ids.data_ptr());
  } else {
    call.count = N;
    call.index = slot.data();
    call.gate_at_index = true;
  }
  move_tokens(call, TorchThreads{});
}

// ids [B, keep] as contiguous int32: each within a sample's N tokens, none of them twice. Empty
// where they are not.
std::vector<int32_t> ids_of(const Tensor& ids, int64_t B, int64_t N) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  if (!ids.is_cpu() || ids.dim() != 2 || ids.size(0) != B ||
      (!wide && ids.scalar_type() != ScalarType::Int))
    return {};
  const int64_t keep = ids.size(1), sample = ids.stride(0), next = ids.stride(1);
  std::vector<int32_t> found(B * keep);
  std::vector<char> seen(N);
  for (int64_t b = 0; b < B; ++b) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t j = 0; j < keep; ++j) {
      const int64_t at = b * sample + j * next;
      const int64_t id = wide ? static_cast<const int64_t*>(ids.data_ptr())[at]
                              : static_cast<const int32_t*>(ids.data_ptr())[at];
      if (id < 0 || id >= N || seen[id]) return {};
      seen[id] = 1;
      found[b * keep + j] = static_cast<int32_t>(id);
    }
  }
  return found;
}

// Contiguous [B, N, ...]; n: elements of a token.
bool usual_tokens(const Usual& usual, const Tensor& t, DType* dtype, int64_t* n) {
  if (t.dim() < 2 || !usual.floating(t, dtype) || !t.is_contiguous() || t.numel() == 0)
    return false;
  *n = t.numel() / (t.size(0) * t.size(1));
  return true;
}

// A result [B, count, ...] like x.
Tensor new_tokens(const Tensor& x, int64_t count) {
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS], next = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    sizes[d] = d == 1 ? count : x.size(d);
    strides[d] = next;
    next *= sizes[d];
  }
  return new_tensor(x, dtype_code(x), sizes, strides, x.dim());
}

MaybeTensor gather_tokens_new_cpu(const Tensor& x, const Tensor& ids) {
  const Usual usual(x);
  MoveCall call{};
  if (x.dim() > MAX_DIMS || !usual_tokens(usual, x, &call.dtype, &call.n)) return {};
  call.batch = x.size(0);
  const std::vector<int32_t> index = ids_of(ids, call.batch, x.size(1));
  if (index.empty()) return {};
  call.count = ids.size(1);
  const Tensor out = new_tokens(x, call.count);
  call.out = {out.data_ptr(), call.count * call.n, call.n};
  call.y = {x.data_ptr(), x.size(1) * call.n, call.n};
  call.index = index.data();
  move_tokens(call, TorchThreads{});
  return out;
}

MaybeTensor scatter_tokens_new_cpu(const Tensor& base, const Tensor& y, const Tensor& ids) {
  const Usual usual(base);
  MoveCall call{};
  DType dtype;
  int64_t n;
  if (base.dim() > MAX_DIMS || !usual_tokens(usual, base, &call.dtype, &call.n) ||
      !usual_tokens(usual, y, &dtype, &n) || dtype != call.dtype || y.dim() != base.dim())
    return {};
  for (int64_t d = 0; d < y.dim(); ++d)
    if (d != 1 && y.size(d) != base.size(d)) return {};
  const int64_t N = base.size(1), keep = y.size(1);
  call.batch = base.size(0);
  const std::vector<int32_t> id = ids_of(ids, call.batch, N);
  if (id.empty() || ids.size(1) != keep) return {};
  std::vector<int32_t> slot(call.batch * N, -1);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t j = 0; j < keep; ++j) slot[b * N + id[b * keep + j]] = static_cast<int32_t>(j);
  const Tensor out = new_like(base);
  call.out = {out.data_ptr(), N * call.n, call.n};
  call.base = {base.data_ptr(), N * call.n, call.n};
  call.y = {y.data_ptr(), keep * call.n, call.n};
  call.count = N;
  call.index = slot.data();
  move_tokens(call, TorchThreads{});
  return out;
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens_cpu));
  m.impl("gather_tokens.new", TORCH_BOX(&gather_tokens_new_cpu));
  m.impl("scatter_tokens.new", TORCH_BOX(&scatter_tokens_new_cpu));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens_cpu));
}

}  // namespace pydiffuse
