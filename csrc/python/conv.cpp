// The causal convolution on NumPy arrays.
#include "../cpu/conv_call.h"

#include "tokens.h"

namespace pydiffuse {
namespace {

// out, x: [B, L, D]; weight: [D, W]; bias: [D]; order: [1, L].
void causal_conv1d_arrays(const Array& out, const Array& x, const Array& weight,
                          const MaybeArray& bias, const MaybeArray& order,
                          const MaybeArray& offsets, bool silu) {
  require(x.ndim() == 3 && weight.ndim() == 2, "x must be [B, L, D], weight [D, W]");
  ConvCall c{};
  c.batch = x.shape(0);
  c.length = x.shape(1);
  c.channels = x.shape(2);
  require(weight.shape(1) >= 1 && weight.shape(1) <= MAX_WIDTH, "weight must be 1 to 8 wide");
  c.width = static_cast<int>(weight.shape(1));
  c.x = tokens_of(x, c.batch, 0, c.length, c.channels);
  c.out = tokens_of(out, c.batch, 0, c.length, c.channels, true);
  c.weight = plane<const float>(weight, {c.channels, c.width});
  c.bias = plane<const float>(bias, {c.channels});
  c.silu = silu;
  set_steps(c, 1, order, offsets);
  unlocked([&] { causal_conv1d(c, HostThreads()); });
}

}  // namespace

void bind_conv(py::module_& m) { m.def("causal_conv1d", &causal_conv1d_arrays); }

}  // namespace pydiffuse
