// The CPU kernel of token routing, as the bindings call it. An item is one token that is written.
#pragma once

#include "../routing.h"

namespace pydiffuse {

struct MoveArgs : MoveCall {
  bool stream;  // the output is too large to be worth caching
};

struct RoutingKernels {
  void (*move)(const MoveArgs&, int64_t begin, int64_t end);
};

}  // namespace pydiffuse

extern "C" {
__attribute__((
    visibility("hidden"))) extern const pydiffuse::RoutingKernels pydiffuse_routing_default,
    pydiffuse_routing_avx2, pydiffuse_routing_avx512;
}
