// One call of token routing on the CPU: tokens to threads.
//   parallel(end, grain, f) calls f(begin, end) over pieces of [0, end), `grain` or more at a time.
#pragma once

#include <algorithm>

#include "capability.h"
#include "routing.h"

namespace pydiffuse {

inline const RoutingKernels& routing_kernels() { return PYDIFFUSE_BEST(routing); }

constexpr int64_t MOVE_GRAIN = 65536;  // bytes that are worth waking a thread for

template <class Parallel>
void move_tokens(const MoveCall& call, Parallel&& parallel) {
  const int64_t tokens = call.batch * call.count, bytes = call.n * bytes_of(call.dtype);
  if (tokens * bytes == 0) return;
  const MoveArgs a{call, tokens * bytes >= STREAM_BYTES};
  const auto kernel = routing_kernels().move;
  parallel(tokens, std::max<int64_t>(1, MOVE_GRAIN / bytes),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace pydiffuse
