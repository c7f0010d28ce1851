// The torch binding of the causal convolution on CUDA. Schemas stand in pydiffuse/_core/schemas.py.
#include "../torch/conv_direct.h"
#include "conv.cuh"

namespace pydiffuse {
namespace {

void causal_conv1d_cuda(const Tensor& out, const Tensor& x, const Tensor& weight,
                        const MaybeTensor& bias, const MaybeTensor& order,
                        const MaybeTensor& offsets, bool silu) {
  ScanLaunch on("causal_conv1d", x);
  run_conv(on, conv_call(out, {x, weight, bias, order, offsets, silu}));
}

void causal_conv1d_backward_cuda(const Tensor& dx, const Tensor& dweight, const MaybeTensor& dbias,
                                 const Tensor& dout, const Tensor& x, const Tensor& weight,
                                 const MaybeTensor& bias, const MaybeTensor& order,
                                 const MaybeTensor& offsets, bool silu) {
  ScanLaunch on("causal_conv1d_backward", x);
  run_conv_backward(
      on, conv_backward_call({dx, dweight, dbias}, dout, {x, weight, bias, order, offsets, silu}));
}

MaybeTensor causal_conv1d_new_cuda(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                   const MaybeTensor& order, bool silu, bool bdl) {
  ScanLaunch on("causal_conv1d", x);
  return usual_conv(x, weight, bias, order, silu, bdl,
                    [&](const ConvCall& call) { run_conv(on, call); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydiffuse, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d_cuda));
  m.impl("causal_conv1d.new", TORCH_BOX(&causal_conv1d_new_cuda));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward_cuda));
}

}  // namespace pydiffuse
