// Token routing on XLA's buffers: tokens [.., N, C] of one dtype, ids [.., keep] int32, gate [..,
// keep] float32; what is in front is the batch.
#include "../cpu/routing_call.h"

#include "call.h"

namespace pydiffuse {
namespace {

enum Has { HAS_GATE = 1, HAS_BASE = 2, HAS_Y = 4 };

TokenRows tokens_of(const Buffer& b, const MoveCall& call, int64_t count) {
  require(dtype_of(b) == call.dtype && b.dims.size() >= 2 &&
              b.count == call.batch * count * call.n && b.dims.back() == call.n,
          "tokens must be [B, N, C] with one B, one C and one dtype");
  return {b.data, count * call.n, call.n};
}

int64_t tokens_in(const Buffer& b) {
  require(b.dims.size() >= 2, "tokens must be [B, N, C]");
  return b.dims[b.dims.size() - 2];
}

MoveCall move_of(const Buffer& out) {
  MoveCall call{};
  call.batch = leading(out, 2);
  call.n = out.dims.back();
  call.dtype = dtype_of(out);
  return call;
}

// Where each token's replacement is, -1 for none: ids are within the tokens, and none is there
// twice.
std::vector<int32_t> slots_of(const int32_t* id, int64_t batch, int64_t keep, int64_t N) {
  std::vector<int32_t> slot(batch * N, -1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < keep; ++j) {
      const int32_t at = id[b * keep + j];
      if (at < 0 || at >= N)
        refuse("ids holds " + std::to_string(at) + "; accepted: 0 to " + std::to_string(N - 1));
      int32_t& s = slot[b * N + at];
      if (s >= 0)
        refuse("ids holds " + std::to_string(at) + " twice in sample " + std::to_string(b) +
               "; accepted: unique ids");
      s = static_cast<int32_t>(j);
    }
  return slot;
}

// x, ids, gate or none -> out
void gather_tokens_xla(Call& call) {
  const int64_t has = call.integer("has");
  const Buffer x = call.input(), ids = call.input();
  const Buffer gate = has & HAS_GATE ? call.input() : Buffer(), out = call.output();
  MoveCall move = move_of(out);
  move.count = tokens_in(out);
  const int64_t N = tokens_in(x);
  move.out = tokens_of(out, move, move.count);
  move.y = tokens_of(x, move, N);
  move.index = plane<const int32_t>(ids, move.batch * move.count);
  slots_of(move.index, move.batch, move.count, N);
  if (has & HAS_GATE) {
    move.gate = plane<const float>(gate, move.batch * move.count);
    move.gates = move.count;
  }
  move_tokens(move, call.threads);
}

// base or none, y or none, ids, gate or none -> out; what is none is zeros
void scatter_tokens_xla(Call& call) {
  const int64_t has = call.integer("has");
  const Buffer base = has & HAS_BASE ? call.input() : Buffer();
  const Buffer y = has & HAS_Y ? call.input() : Buffer();
  const Buffer ids = call.input();
  const Buffer gate = has & HAS_GATE ? call.input() : Buffer(), out = call.output();
  MoveCall move = move_of(out);
  require(!ids.dims.empty(), "ids must be [B, keep]");
  const int64_t N = tokens_in(out), keep = ids.dims.back();
  move.out = tokens_of(out, move, N);
  if (has & HAS_BASE) move.base = tokens_of(base, move, N);
  if (has & HAS_Y) move.y = tokens_of(y, move, keep);
  const auto* id = plane<const int32_t>(ids, move.batch * keep);
  const auto slot = slots_of(id, move.batch, keep, N);
  if (has & HAS_GATE) {
    move.gate = plane<const float>(gate, move.batch * keep);
    move.gates = keep;
  }
  if (has & HAS_BASE && base.data == out.data) {  // the others are left alone
    move.count = keep;
    move.place = id;
  } else {
    move.count = N;
    move.index = slot.data();
    move.gate_at_index = true;
  }
  move_tokens(move, call.threads);
}

}  // namespace

std::vector<Handler> routing_handlers() {
  return {{"gather_tokens", handler<gather_tokens_xla>},
          {"scatter_tokens", handler<scatter_tokens_xla>}};
}

}  // namespace pydiffuse
