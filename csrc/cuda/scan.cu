// The torch binding of the selective scan on CUDA. Schemas stand in pydiffuse/_core/schemas.py.
#include "../torch/scan_args.h"
#include "../torch/scan_direct.h"
#include "scan_call.cuh"

namespace pydiffuse {
namespace {

void selective_scan_cuda(const Tensor& out, const MaybeTensor& last, const MaybeTensor& chunks,
                         const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                         const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                         const MaybeTensor& delta_bias, const MaybeTensor& initial,
                         const MaybeTensor& order, const MaybeTensor& offsets, bool softplus) {
  ScanLaunch on("selective_scan", u);
  run_scan(on, scan_call(out, last, chunks,
                         {u, delta, A, B, C, D, z, delta_bias, initial, order, offsets, softplus}));
}

void selective_scan_backward_cuda(const Tensor& du, const Tensor& ddelta, const Tensor& dA,
                                  const Tensor& dB, const Tensor& dC, const MaybeTensor& dD,
                                  const MaybeTensor& dz, const MaybeTensor& ddelta_bias,
                                  const MaybeTensor& dinitial, const Tensor& dout,
                                  const MaybeTensor& dlast, const Tensor& chunks, const Tensor& u,
                                  const Tensor& delta, const Tensor& A, const Tensor& B,
                                  const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                                  const MaybeTensor& delta_bias, const MaybeTensor& initial,
                                  const MaybeTensor& order, const MaybeTensor& offsets,
                                  bool softplus) {
  ScanLaunch on("selective_scan_backward", u);
  run_scan_backward(
      on, scan_backward_call(
              {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial}, dout, dlast, chunks,
              {u, delta, A, B, C, D, z, delta_bias, initial, order, offsets, softplus}));
}

void selective_state_update_cuda(const Tensor& out, const Tensor& state, const Tensor& x,
                                 const Tensor& dt, const Tensor& A, const Tensor& B,
                                 const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                                 const MaybeTensor& dt_bias, bool softplus) {
  ScanLaunch on("selective_state_update", x);
  run_scan(on, state_update_call(out, state, {x, dt, A, B, C, D, z, dt_bias, softplus}));
}

std::tuple<MaybeTensor, MaybeTensor> selective_scan_new_cuda(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& delta_bias,
    const MaybeTensor& initial, const MaybeTensor& order, bool softplus, bool bdl, bool with_last) {
  ScanLaunch on("selective_scan", u);
  return usual_scan({u, delta, A, B, C, D, z, delta_bias, initial, order, softplus, bdl}, with_last,
                    [&](const ScanCall& call) { run_scan(on, call); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydiffuse, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan_cuda));
  m.impl("selective_scan.new", TORCH_BOX(&selective_scan_new_cuda));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward_cuda));
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update_cuda));
}

}  // namespace pydiffuse

extern "C" long long pydiffuse_scan_backward_shared(long long states) {
  using namespace pydiffuse;
  const auto floats =
      states > 8 ? gradient_floats<4>(states > 4 * LANES) : gradient_floats<2>(false);
  return static_cast<long long>(floats) * sizeof(float);
}
