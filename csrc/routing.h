// Tokens that take another way through a network, as the kernels see them.
#pragma once

#include "tensor.h"

namespace pydiffuse {

struct TokenRows {  // [B, N, C], the features of each token side by side
  void* data = nullptr;
  int64_t sample = 0, token = 0;  // elements from one to the next
};

// Gathering and scattering are one motion. Program (b, t) writes token p of `out`, p = place[b, t]:
//   y[b, s] with s = index[b, t],  or (1 - g) base[b, p] + g y[b, s] with a gate,
//   base[b, p] where s < 0.
// No base, no y: zeros. No place, no index: t itself.
struct MoveCall {
  int64_t batch, count, n;  // B, programs per sample, C
  DType dtype;              // of all three
  TokenRows out, base, y;
  const int32_t *index, *place;  // [B, count]
  const float* gate;             // [B, gates], at s, or at t
  int64_t gates;
  bool gate_at_index;
};

}  // namespace pydiffuse
