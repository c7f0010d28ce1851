// The causal convolution on XLA's buffers: x, y as tokens; weight [D, W], bias [D] float32; order
// [1, L]; offsets [S + 1].
#include "../cpu/conv_call.h"

#include "tokens.h"

namespace pydiffuse {
namespace {

enum Has { HAS_BIAS, HAS_ORDER, HAS_OFFSETS };

struct ConvArrays {
  Buffer x, weight;
  Maybe bias, order, offsets;

  ConvArrays(Call& call, Arrays& given)
      : x(call.input()),
        weight(call.input()),
        bias(given.maybe(HAS_BIAS)),
        order(given.maybe(HAS_ORDER)),
        offsets(given.maybe(HAS_OFFSETS)) {}
};

ConvCall common_of(const Call& call, const ConvArrays& arrays, const Mapped& mapped) {
  const bool last = call.flag("channels_last");
  ConvCall c{};
  c.batch = size_from_end(arrays.x, 3);
  c.length = size_from_end(arrays.x, last ? 2 : 1);
  c.channels = size_from_end(arrays.x, last ? 1 : 2);
  const int64_t width = size_from_end(arrays.weight, 1);
  require(width >= 1 && width <= MAX_WIDTH, "weight must be 1 to 8 wide");
  c.width = static_cast<int>(width);
  c.silu = call.flag("silu");
  set_steps(c, mapped, 1, arrays.order, arrays.offsets);
  return c;
}

TokensOf tokens_of(const Call& call, const ConvCall& c, const Mapped& mapped) {
  return {mapped, call.flag("channels_last"), c.batch, c.length, c.channels};
}

void set_inputs(ConvCall& c, const ConvArrays& arrays, const Mapped& mapped, const TokensOf& tokens,
                int64_t v) {
  c.x = tokens(arrays.x, v);
  c.weight = mapped.plane<const float>(arrays.weight, v, {c.channels, c.width});
  if (arrays.bias) c.bias = mapped.plane<const float>(*arrays.bias, v, {c.channels});
}

void causal_conv1d_xla(Call& call) {
  Arrays given(call, call.integer("has"));
  const ConvArrays arrays(call, given);
  const Buffer out = call.output();
  const Mapped mapped(out, 3);
  ConvCall c = common_of(call, arrays, mapped);
  const TokensOf tokens = tokens_of(call, c, mapped);
  // Where only the batch is mapped the calls are one.
  const bool folds = mapped.whole(arrays.x) && mapped.shared(arrays.weight) &&
                     (!arrays.bias || mapped.shared(*arrays.bias));
  const int64_t calls = folds ? std::min<int64_t>(1, mapped.count()) : mapped.count();
  for (int64_t v = 0; v < calls; ++v) {
    set_inputs(c, arrays, mapped, tokens, v);
    c.out = tokens(out, v);
    if (folds) c.batch *= mapped.count();
    causal_conv1d(c, call.threads);
  }
}

// the forward's arrays, dy -> dx, dweight, dbias or none
void causal_conv1d_backward_xla(Call& call) {
  Arrays given(call, call.integer("has"));
  const ConvArrays arrays(call, given);
  const Buffer dy = call.input(), dx = call.output(), dweight = call.output();
  const Maybe dbias = given.maybe_output(HAS_BIAS);
  const Mapped mapped(dx, 3);
  ConvBackwardCall b{};
  ConvCall& c = b.forward;
  c = common_of(call, arrays, mapped);
  const TokensOf tokens = tokens_of(call, c, mapped);
  for (int64_t v = 0; v < mapped.count(); ++v) {
    set_inputs(c, arrays, mapped, tokens, v);
    b.dout = tokens(dy, v);
    b.dx = tokens(dx, v);
    b.dweight = mapped.plane<float>(dweight, v, {c.channels, c.width});
    if (dbias) b.dbias = mapped.plane<float>(*dbias, v, {c.channels});
    causal_conv1d_backward(b, call.threads);
  }
}

}  // namespace

std::vector<Handler> conv_handlers() {
  return {{"causal_conv1d", handler<causal_conv1d_xla>},
          {"causal_conv1d_backward", handler<causal_conv1d_backward_xla>}};
}

}  // namespace pydiffuse
