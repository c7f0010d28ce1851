// The table of kernels for one kind of products.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace pydiffuse {
namespace {

template <class Words>
constexpr AttentionKernels attention_table() {
  return {forward_scratch, forward<Words>, backward_scratch<Words>, padded_dim,  backward<Words>,
          reduce,          STRIP * KEYS,   floor_scratch,           floor<Words>};
}

}  // namespace
}  // namespace pydiffuse
