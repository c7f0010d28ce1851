// The torch binding of the causal convolution on the CPU. Schemas stand in
// pydiffuse/_core/schemas.py.
#include "../cpu/conv_call.h"
#include "../cpu/steps.h"
#include "conv_direct.h"

namespace pydiffuse {
namespace {

void check_steps(const char* op, const ConvCall& c) {
  const char* bad = bad_steps(c.order, c.length, c.offsets, c.sequences, c.length);
  STD_TORCH_CHECK(!bad, op, ": ", bad ? bad : "");
}

void causal_conv1d_cpu(const Tensor& out, const Tensor& x, const Tensor& weight,
                       const MaybeTensor& bias, const MaybeTensor& order,
                       const MaybeTensor& offsets, bool silu) {
  const ConvCall call = conv_call(out, {x, weight, bias, order, offsets, silu});
  check_steps("causal_conv1d", call);
  causal_conv1d(call, TorchThreads{});
}

void causal_conv1d_backward_cpu(const Tensor& dx, const Tensor& dweight, const MaybeTensor& dbias,
                                const Tensor& dout, const Tensor& x, const Tensor& weight,
                                const MaybeTensor& bias, const MaybeTensor& order,
                                const MaybeTensor& offsets, bool silu) {
  const ConvBackwardCall call =
      conv_backward_call({dx, dweight, dbias}, dout, {x, weight, bias, order, offsets, silu});
  check_steps("causal_conv1d_backward", call.forward);
  causal_conv1d_backward(call, TorchThreads{});
}

MaybeTensor causal_conv1d_new_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                  const MaybeTensor& order, bool silu, bool bdl) {
  return usual_conv(x, weight, bias, order, silu, bdl, [](const ConvCall& call) {
    check_steps("causal_conv1d", call);
    causal_conv1d(call, TorchThreads{});
  });
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d_cpu));
  m.impl("causal_conv1d.new", TORCH_BOX(&causal_conv1d_new_cpu));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward_cpu));
}

}  // namespace pydiffuse
