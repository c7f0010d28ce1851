// Token routing on NumPy arrays.
#include "../cpu/routing_call.h"

#include "arrays.h"

namespace pydiffuse {
namespace {

struct Tokens3 {
  TokenRows rows;
  int64_t count;
};

// [B, count, C], of the batch, features and dtype of `call`.
Tokens3 tokens_of(const Array& a, const MoveCall& call, bool written = false) {
  require(a.ndim() == 3 && a.shape(0) == call.batch && a.shape(2) == call.n &&
              dtype_of(a) == call.dtype,
          "tokens must be [B, N, C] with one B, one C and one dtype");
  const int64_t count = a.shape(1);
  return {{memory_of(a, written), count * call.n, call.n}, count};
}

MoveCall move_of(const Array& out) {
  require(out.ndim() == 3, "tokens must be [B, N, C]");
  MoveCall call{};
  call.batch = out.shape(0);
  call.n = out.shape(2);
  call.dtype = dtype_of(out);
  return call;
}

// ids [B, keep], each one of N tokens.
const int32_t* ids_of(const Array& ids, int64_t batch, int64_t keep, int64_t N) {
  const auto* id = plane<const int32_t>(ids, {batch, keep});
  for (int64_t i = 0; i < batch * keep; ++i)
    require(id[i] >= 0 && id[i] < N, "ids must be within the tokens");
  return id;
}

void gather_tokens_arrays(const Array& out, const Array& x, const Array& ids) {
  MoveCall call = move_of(out);
  const auto [to, keep] = tokens_of(out, call, true);
  const auto [from, N] = tokens_of(x, call);
  call.out = to;
  call.y = from;
  call.count = keep;
  call.index = ids_of(ids, call.batch, keep, N);
  unlocked([&] { move_tokens(call, HostThreads()); });
}

// base with token ids[b, j] replaced by y[b, j]; where out is base, the others are left alone.
void scatter_tokens_arrays(const Array& out, const Array& base, const Array& y, const Array& ids,
                           const MaybeArray& gate) {
  MoveCall call = move_of(out);
  const auto [to, N] = tokens_of(out, call, true);
  const auto [under, same] = tokens_of(base, call);
  const auto [from, keep] = tokens_of(y, call);
  require(N == same, "base must have as many tokens as out");
  call.out = to;
  call.base = under;
  call.y = from;
  const int32_t* id = ids_of(ids, call.batch, keep, N);
  call.gate = plane<const float>(gate, {call.batch, keep});
  call.gates = keep;
  std::vector<int32_t> slot;
  if (to.data == under.data) {
    call.count = keep;
    call.place = id;
  } else {
    slot.assign(call.batch * N, -1);  // where each token's replacement is
    for (int64_t i = 0; i < call.batch * keep; ++i)
      slot[i / keep * N + id[i]] = static_cast<int32_t>(i % keep);
    call.count = N;
    call.index = slot.data();
    call.gate_at_index = true;
  }
  unlocked([&] { move_tokens(call, HostThreads()); });
}

}  // namespace

void bind_routing(py::module_& m) {
  m.def("gather_tokens", &gather_tokens_arrays);
  m.def("scatter_tokens", &scatter_tokens_arrays);
}

}  // namespace pydiffuse
