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
  const int64_t stride = (call.channels + 15) / 16 * 16;  // on cache lines
  const Floats taps((call.width + 1) * stride);
  for (int64_t channel = 0; channel < call.channels; ++channel) {
    for (int w = 0; w < call.width; ++w)
      taps.data()[w * stride + channel] = call.weight[channel * call.width + w];
    taps.data()[call.width * stride + channel] = call.bias ? call.bias[channel] : 0.0f;
  }
  const int64_t bytes = call.batch * call.length * call.channels * bytes_of(call.out.dtype);
  const bool in_rows = call.x.channel == 1 && call.out.channel == 1;
  const ConvArgs a{call, !in_rows || call.x.dtype != call.out.dtype, bytes >= STREAM_BYTES,
                   taps.data(), stride};
  const int64_t chunks = a.staged ? 1 : a.chunks();
  parallel(call.batch * chunks * a.blocks(), 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(conv_kernels().scratch(call.length));
    conv_kernels().forward(a, begin, end, scratch.data());
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
