// The torch binding of the selective scan on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include "../cpu/scan_call.h"
#include "scan_args.h"
#include "scan_direct.h"

namespace pydiffuse {
namespace {

void check_steps(const char* op, const ScanCall& c) {
  const char* bad = bad_steps(c.order, c.paths * c.length, c.offsets, c.sequences, c.length);
  STD_TORCH_CHECK(!bad, op, ": ", bad ? bad : "");
}

void selective_scan_cpu(const Tensor& out, const MaybeTensor& last, const MaybeTensor& chunks,
                        const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                        const MaybeTensor& delta_bias, const MaybeTensor& initial,
                        const MaybeTensor& order, const MaybeTensor& offsets, bool softplus) {
  const ScanCall call = scan_call(
      out, last, chunks, {u, delta, A, B, C, D, z, delta_bias, initial, order, offsets, softplus});
  check_steps("selective_scan", call);
  selective_scan(call, TorchThreads{});
}

void selective_scan_backward_cpu(const Tensor& du, const Tensor& ddelta, const Tensor& dA,
                                 const Tensor& dB, const Tensor& dC, const MaybeTensor& dD,
                                 const MaybeTensor& dz, const MaybeTensor& ddelta_bias,
                                 const MaybeTensor& dinitial, const Tensor& dout,
                                 const MaybeTensor& dlast, const Tensor& chunks, const Tensor& u,
                                 const Tensor& delta, const Tensor& A, const Tensor& B,
                                 const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                                 const MaybeTensor& delta_bias, const MaybeTensor& initial,
                                 const MaybeTensor& order, const MaybeTensor& offsets,
                                 bool softplus) {
  const ScanBackwardCall call = scan_backward_call(
      {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial}, dout, dlast, chunks,
      {u, delta, A, B, C, D, z, delta_bias, initial, order, offsets, softplus});
  check_steps("selective_scan_backward", call.forward);
  selective_scan_backward(call, TorchThreads{});
}

void selective_state_update_cpu(const Tensor& out, const Tensor& state, const Tensor& x,
                                const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                const MaybeTensor& D, const MaybeTensor& z,
                                const MaybeTensor& dt_bias, bool softplus) {
  selective_scan(state_update_call(out, state, {x, dt, A, B, C, D, z, dt_bias, softplus}),
                 TorchThreads{});
}

std::tuple<MaybeTensor, MaybeTensor> selective_scan_new_cpu(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& delta_bias,
    const MaybeTensor& initial, const MaybeTensor& order, bool softplus, bool bdl, bool with_last) {
  return usual_scan({u, delta, A, B, C, D, z, delta_bias, initial, order, softplus, bdl}, with_last,
                    [](const ScanCall& call) {
                      check_steps("selective_scan", call);
                      selective_scan(call, TorchThreads{});
                    });
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan_cpu));
  m.impl("selective_scan.new", TORCH_BOX(&selective_scan_new_cpu));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward_cpu));
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update_cpu));
}

}  // namespace pydiffuse
