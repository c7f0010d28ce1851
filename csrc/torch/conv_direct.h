// `causal_conv1d.new`: one path, one sequence, tokens in the user's order of dimensions; CPU and
// CUDA alike.
#pragma once

#include "conv_args.h"
#include "scan_direct.h"

namespace pydiffuse {

// run(call): the kernel.
template <class Run>
MaybeTensor usual_conv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                       const MaybeTensor& order, bool silu, bool bdl, const Run& run) {
  const Usual usual(x);
  const TokenOrder by(bdl);
  ConvCall c{};
  if (x.dim() != 3 || x.numel() == 0 || weight.dim() != 2) return {};
  c.batch = x.size(0), c.length = x.size(by.token), c.channels = x.size(by.channel);
  c.sequences = 1;
  const int64_t width = weight.size(1);
  DType dtype;
  if (width < 1 || width > MAX_WIDTH || c.length > INT32_MAX ||
      !has_sizes(weight, {c.channels, width}) || !usual.floating(weight, &dtype) ||
      (bias && !usual.floating(*bias, &dtype)))
    return {};
  c.width = static_cast<int>(width);
  // The kernels take float32 parameters; what others become lives as long as the call.
  const auto floats = [](const Tensor& t) {
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  };
  Tensor w = weight, b = bias ? *bias : weight;
  if (w.scalar_type() != ScalarType::Float || !w.is_contiguous()) w = floats(w);
  if (bias && (b.scalar_type() != ScalarType::Float || !b.is_contiguous())) b = floats(b);
  c.weight = static_cast<const float*>(w.data_ptr());
  if (bias) {
    if (!has_sizes(b, {c.channels})) return {};
    c.bias = static_cast<const float*>(b.data_ptr());
  }
  c.silu = silu;
  if (!by.tokens(usual, x, x, &c.x) || !usual.plain(order, ScalarType::Int, {c.length}, &c.order))
    return {};
  const Tensor y = by.new_tokens(x, &c.out);
  c.out.dtype = c.x.dtype;
  run(c);
  return y;
}

}  // namespace pydiffuse
