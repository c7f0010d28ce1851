// One call to the causal convolution on the CPU; `parallel` as in guidance_call.h.
#pragma once

#include "capability.h"
#include "conv.h"
#include "floats.h"

namespace pydiffuse {

inline const ConvKernels& conv_kernels() { return PYDIFFUSE_BEST(conv); }

inline int64_t conv_blocks(const ConvCall& call) {
  return (call.channels + CONV_BLOCK - 1) / CONV_BLOCK;
}

template <class Parallel>
void causal_conv1d(const ConvCall& call, const Parallel& parallel) {
  parallel(conv_blocks(call) * call.batch, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(conv_kernels().scratch(call.length));
    conv_kernels().forward(call, begin, end, scratch.data());
  });
}

template <class Parallel>
void causal_conv1d_backward(const ConvBackwardCall& call, const Parallel& parallel) {
  const ConvCall& c = call.forward;
  ConvBackwardArgs a{call, std::max<int64_t>(1, std::min<int64_t>(CONV_PARTS, c.batch)), nullptr,
                     nullptr};
  const int64_t weights = c.channels * c.width;
  const Floats partial(a.parts * (weights + c.channels));
  a.dweight = partial.data();
  a.dbias = partial.data() + a.parts * weights;
  parallel(conv_blocks(c) * a.parts, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(conv_kernels().scratch(c.length));
    conv_kernels().backward(a, begin, end, scratch.data());
  });
  add_parts(a.dweight, a.parts, weights, call.dweight);
  if (call.dbias) add_parts(a.dbias, a.parts, c.channels, call.dbias);
}

}  // namespace pydiffuse
