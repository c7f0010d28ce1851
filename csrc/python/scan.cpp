// The selective scan on NumPy arrays.
#include "../cpu/scan_call.h"

#include "tokens.h"

namespace pydiffuse {
namespace {

// [B, K, G, L, N] of any strides, or constant [K, D, N].
Weights weights_of(const Array& a, ScanCall& c) {
  Weights w;
  if (a.ndim() == 3) {
    w.data = const_cast<float*>(plane<const float>(a, {c.paths, c.channels, c.states}));
    w.constant = true;
    return w;
  }
  require(a.ndim() == 5, "B and C must be [B, K, G, L, N] or [K, D, N]");
  const int64_t groups = a.shape(2);
  require(groups > 0 && c.channels % groups == 0 && (!c.groups || c.groups == groups),
          "groups must divide the channels, and be those of B and C");
  c.groups = static_cast<int>(groups);
  require(has_shape(a, {c.batch, c.paths, groups, c.length, c.states}), "B or C has another shape");
  const Ints s = strides_of(a);
  return {memory_anyhow(a), s[0], s[1], s[2], s[3], s[4], dtype_of(a), false};
}

// out, u, z: [B, L, D]; last, initial: [B, S, K, D, N]; delta: [B, K, L, D]; A: [K, D, N];
// D, delta_bias: [K, D]; order: [K, L].
void selective_scan_arrays(const Array& out, const MaybeArray& last, const Array& u,
                           const Array& delta, const Array& A, const Array& B, const Array& C,
                           const MaybeArray& D, const MaybeArray& z, const MaybeArray& delta_bias,
                           const MaybeArray& initial, const MaybeArray& order,
                           const MaybeArray& offsets, bool softplus) {
  require(u.ndim() == 3 && A.ndim() == 3, "u must be [B, L, D], A [K, D, N]");
  ScanCall c{};
  c.batch = u.shape(0);
  c.length = u.shape(1);
  c.channels = u.shape(2);
  c.paths = A.shape(0);
  require(c.paths >= 1 && A.shape(2) >= 1 && A.shape(2) <= MAX_STATES,
          "accepted: a path or more, 1 to 256 states");
  c.states = static_cast<int>(A.shape(2));
  c.u = tokens_of(u, c.batch, 0, c.length, c.channels);
  c.delta = tokens_of(delta, c.batch, c.paths, c.length, c.channels);
  if (z) c.z = tokens_of(*z, c.batch, 0, c.length, c.channels);
  c.out = tokens_of(out, c.batch, 0, c.length, c.channels, true);
  require(c.paths == 1 || c.out.dtype == DType::f32, "a sum over paths must be float32");
  c.A = plane<const float>(A, {c.paths, c.channels, c.states});
  c.B = weights_of(B, c);
  c.C = weights_of(C, c);
  if (!c.groups) c.groups = 1;
  c.D = plane<const float>(D, {c.paths, c.channels});
  c.bias = plane<const float>(delta_bias, {c.paths, c.channels});
  c.softplus = softplus;
  set_steps(c, c.paths, order, offsets);
  const Ints states{c.batch, c.sequences, c.paths, c.channels, c.states};
  c.initial = plane<const float>(initial, states);
  c.last = plane<float>(last, states);
  unlocked([&] { selective_scan(c, HostThreads()); });
}

}  // namespace

void bind_scan(py::module_& m) { m.def("selective_scan", &selective_scan_arrays); }

}  // namespace pydiffuse
