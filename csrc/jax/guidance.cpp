// Guidance on XLA's buffers. Predictions are [.., *sample]: attribute `inner` is how many
// dimensions a sample has, those in front of them are the batch.
#include "../cpu/guidance_call.h"

#include "call.h"

namespace pydiffuse {
namespace {

struct Samples {  // of arrays that are alike in shape
  int64_t batch, n;

  Samples(const Buffer& b, int64_t inner) : batch(leading(b, inner)), n(1) {
    for (int64_t size : b.dims.last(inner)) n *= size;
  }
  Rows rows(const Buffer& b) const {
    require(b.count == batch * n, "arrays must have one shape [B, ...]");
    return {b.data, n, dtype_of(b)};
  }
};

int count_of(const Call& call, int64_t most) {
  const int64_t k = call.integer("k");
  require(k >= 1 && k <= most, "too many arrays");
  return static_cast<int>(k);
}

// What guide and its backward share: predictions, then the parameters that vary over the batch.
template <class To>
Samples set_rule(Call& call, To& to) {
  const int64_t rule = call.integer("rule");
  require(rule >= 0 && rule < static_cast<int>(Rule::count), "unknown rule");
  to.rule = static_cast<Rule>(rule);
  to.k = count_of(call, MAX_PREDS);
  to.rescaled = call.flag("rescaled");
  const auto params = call.list<double>("params");
  const auto columns = call.list<int64_t>("columns");
  require(params.size() <= MAX_PARAMS && columns.size() <= MAX_PARAMS, "too many parameters");
  std::copy(params.begin(), params.end(), to.params);
  to.nparams = static_cast<int>(params.size());
  require(rule_fits(to.rule, to.k, to.nparams),
          "too few or too many predictions or parameters for this rule");
  for (int64_t column : columns) {
    require(column >= 0 && column < to.nparams, "no such parameter");
    to.columns[to.ncolumns++] = column;
  }
  const Buffer& first = call.input();
  const Samples samples(first, call.integer("inner"));
  to.pred[0] = samples.rows(first);
  for (int i = 1; i < to.k; ++i) to.pred[i] = samples.rows(call.input());
  to.batch = samples.batch;
  to.n = samples.n;
  return samples;
}

template <class To>
std::vector<double> set_varied(Call& call, To& to) {
  if (!to.ncolumns) return {};
  auto varied = doubles(call.input(), to.batch * to.ncolumns);
  to.varied = varied.data();
  return varied;
}

void guide_xla(Call& call) {
  GuideCall to{};
  const Samples samples = set_rule(call, to);
  to.has = static_cast<int>(call.integer("has") & 7);
  to.emit = static_cast<int>(call.integer("emit") & 7);
  require(to.emit && call.outputs() == bits(to.emit), "one output for each result");
  require(!(to.emit & EMIT_STATE) || to.rule == Rule::apg, "only apg has a state");
  for (int i = 0; i < bits(to.has); ++i) to.extra[i] = samples.rows(call.input());
  const auto varied = set_varied(call, to);
  for (int i = 0; i < bits(to.emit); ++i) to.out[i] = samples.rows(call.output());
  guide(to, call.threads);
}

// predictions, the gradient of g, varied -> gradients of the predictions, of varied
void guide_backward_xla(Call& call) {
  GuideBackwardCall to{};
  const Samples samples = set_rule(call, to);
  to.grad = samples.rows(call.input());
  const auto varied = set_varied(call, to);
  for (int i = 0; i < to.k; ++i) to.dpred[i] = samples.rows(call.output());
  std::vector<double> dvaried(varied.size());
  to.dvaried = to.ncolumns ? dvaried.data() : nullptr;
  guide_backward(to, call.threads);
  if (to.ncolumns) store(dvaried, call.output());
}

// terms, matrix [.., outs, terms], shift [.., outs] or none -> outputs
void mix_xla(Call& call) {
  MixCall to{};
  to.terms = count_of(call, MAX_TERMS);
  require(call.outputs() >= 1 && call.outputs() <= MAX_OUTS, "too many outputs");
  to.outs = static_cast<int>(call.outputs());
  const Buffer& first = call.input();
  const Samples samples(first, call.integer("inner"));
  to.batch = samples.batch;
  to.n = samples.n;
  to.term[0] = samples.rows(first);
  for (int m = 1; m < to.terms; ++m) to.term[m] = samples.rows(call.input());
  const auto matrix = doubles(call.input(), to.batch * to.outs * to.terms);
  to.matrix = matrix.data();
  std::vector<double> shift;
  if (call.inputs()) {
    shift = doubles(call.input(), to.batch * to.outs);
    to.shift = shift.data();
  }
  for (int j = 0; j < to.outs; ++j) to.out[j] = samples.rows(call.output());
  mix(to, call.threads);
}

// predictions -> G [.., k, k], sums [.., k]
void gram_xla(Call& call) {
  const int k = count_of(call, MAX_PREDS + 1);  // and a gradient
  const Buffer& first = call.input();
  const Samples samples(first, call.integer("inner"));
  Rows p[MAX_PREDS + 1];
  p[0] = samples.rows(first);
  for (int i = 1; i < k; ++i) p[i] = samples.rows(call.input());
  const int64_t batch = samples.batch, width = stats(k, true);
  std::vector<double> packed(batch * width), g(batch * k * k), sums(batch * k);
  gram(k, true, batch, samples.n, p, packed.data(), call.threads);
  for (int64_t b = 0; b < batch; ++b)
    unpack(k, packed.data() + b * width, true, g.data() + b * k * k, sums.data() + b * k);
  store(g, call.output());
  store(sums, call.output());
}

}  // namespace

std::vector<Handler> guidance_handlers() {
  return {{"guide", handler<guide_xla>},
          {"guide_backward", handler<guide_backward_xla>},
          {"mix", handler<mix_xla>},
          {"gram", handler<gram_xla>}};
}

}  // namespace pydiffuse
