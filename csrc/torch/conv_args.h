// From the arguments of the convolution ops to the structs of the kernels; CPU and CUDA alike.
#pragma once

#include "../conv.h"
#include "scan_args.h"

namespace pydiffuse {

// The arguments that the forward and the backward share, in the schema's order.
struct ConvInputs {
  const Tensor &x, &weight;
  const MaybeTensor &bias, &order, &offsets;
  bool silu;
};

// Everything but the result.
inline ConvCall conv_inputs(const ScanAccepts& accepts, const ConvInputs& in) {
  STD_TORCH_CHECK(in.x.dim() == 3 && in.weight.dim() == 2, accepts.op,
                  ": x must be [batch, tokens, channels] and weight [channels, width]");
  ConvCall c{};
  c.batch = in.x.size(0);
  c.length = in.x.size(1);
  c.channels = in.x.size(2);
  const int64_t width = in.weight.size(1);
  STD_TORCH_CHECK(width >= 1 && width <= MAX_WIDTH, accepts.op, ": weight has width ", width,
                  "; accepted: 1 to 8");
  STD_TORCH_CHECK(c.length <= INT32_MAX, accepts.op, ": x has ", c.length,
                  " tokens; accepted: below 2^31");
  c.width = static_cast<int>(width);
  c.x = accepts.tokens("x", in.x, c.batch, 0, c.length, c.channels);
  c.weight = accepts.floats("weight", in.weight, {c.channels, width});
  c.bias = accepts.floats("bias", in.bias, {c.channels});
  c.silu = in.silu;
  c.order = accepts.ints("order", in.order, {c.length});
  c.offsets = accepts.offsets(in.offsets, &c.sequences);
  return c;
}

inline ConvCall conv_call(const Tensor& out, const ConvInputs& in) {
  const ScanAccepts accepts{{"causal_conv1d", in.x}};
  ConvCall c = conv_inputs(accepts, in);
  c.out = accepts.tokens("out", out, c.batch, 0, c.length, c.channels);
  return c;
}

// The results of the backward, in the schema's order.
struct ConvGradients {
  const Tensor &dx, &dweight;
  const MaybeTensor& dbias;
};

inline ConvBackwardCall conv_backward_call(const ConvGradients& out, const Tensor& dout,
                                           const ConvInputs& in) {
  const ScanAccepts accepts{{"causal_conv1d_backward", in.x}};
  ConvBackwardCall b{};
  ConvCall& c = b.forward;
  c = conv_inputs(accepts, in);
  b.dout = accepts.tokens("dout", dout, c.batch, 0, c.length, c.channels);
  b.dx = accepts.tokens("dx", out.dx, c.batch, 0, c.length, c.channels);
  b.dweight = accepts.floats("dweight", out.dweight, {c.channels, c.width});
  b.dbias = accepts.floats("dbias", out.dbias, {c.channels});
  return b;
}

}  // namespace pydiffuse
