// Guidance on NumPy arrays.
#include "../cpu/guidance_call.h"

#include "arrays.h"

namespace pydiffuse {
namespace {

void guide_arrays(const Arrays& out, const Arrays& preds, const MaybeArray& x,
                  const MaybeArray& history, const MaybeArray& noise, int rule,
                  const std::vector<double>& params, bool rescaled, const MaybeArray& varied,
                  const Ints& columns, int emit) {
  check_count("predictions", preds, MAX_PREDS);
  require(rule >= 0 && rule < static_cast<int>(Rule::count), "unknown rule");
  require(params.size() <= MAX_PARAMS, "too many parameters");
  require(emit > 0 && emit < 8 && static_cast<int>(out.size()) == bits(emit),
          "one output for each result");
  GuideCall call{};
  call.rule = static_cast<Rule>(rule);
  require(!(emit & EMIT_STATE) || call.rule == Rule::apg, "only apg has a state");
  call.k = static_cast<int>(preds.size());
  call.emit = emit;
  call.rescaled = rescaled;
  call.nparams = static_cast<int>(params.size());
  require(rule_fits(call.rule, call.k, call.nparams),
          "too few or too many predictions or parameters for this rule");
  const Ints shape = shape_of(preds[0]);
  for (int i = 0; i < call.k; ++i) call.pred[i] = rows(preds[i], shape);
  call.batch = shape[0];
  call.n = call.pred[0].stride;
  for (auto [array, bit] : {std::pair{&x, HAS_X}, {&history, HAS_HISTORY}, {&noise, HAS_NOISE}})
    if (*array) {
      call.extra[bits(call.has)] = rows(**array, shape);
      call.has |= bit;
    }
  for (size_t i = 0; i < out.size(); ++i) call.out[i] = rows(out[i], shape, true);
  std::copy(params.begin(), params.end(), call.params);
  require(columns.size() <= MAX_PARAMS && columns.empty() == !varied,
          "`varied` and `columns` come together");
  for (const int64_t column : columns)
    require(column >= 0 && column < call.nparams, "no such parameter");
  std::copy(columns.begin(), columns.end(), call.columns);
  call.ncolumns = static_cast<int>(columns.size());
  call.varied = plane<const double>(varied, {call.batch, call.ncolumns});
  unlocked([&] { guide(call, HostThreads()); });
}

void mix_arrays(const Arrays& out, const Arrays& terms, const Array& matrix) {
  check_count("terms", terms, MAX_TERMS);
  check_count("outputs", out, MAX_OUTS);
  MixCall call{};
  call.terms = static_cast<int>(terms.size());
  call.outs = static_cast<int>(out.size());
  const Ints shape = shape_of(terms[0]);
  for (int m = 0; m < call.terms; ++m) call.term[m] = rows(terms[m], shape);
  for (int j = 0; j < call.outs; ++j) call.out[j] = rows(out[j], shape, true);
  call.batch = shape[0];
  call.n = call.term[0].stride;
  call.matrix = plane<const double>(matrix, {call.batch, call.outs, call.terms});
  unlocked([&] { mix(call, HostThreads()); });
}

std::pair<py::array_t<double>, py::array_t<double>> gram_arrays(const Arrays& preds) {
  check_count("predictions", preds, MAX_PREDS);
  const int k = static_cast<int>(preds.size());
  const Ints shape = shape_of(preds[0]);
  Rows p[MAX_PREDS];
  for (int i = 0; i < k; ++i) p[i] = rows(preds[i], shape);
  const int64_t batch = shape[0], n = p[0].stride;
  py::array_t<double> matrix({batch, int64_t(k), int64_t(k)}), sums({batch, int64_t(k)});
  double *g = matrix.mutable_data(), *s = sums.mutable_data();
  unlocked([&] {
    std::vector<double> packed(batch * stats(k, true));
    gram(k, true, batch, n, p, packed.data(), HostThreads());
    for (int64_t b = 0; b < batch; ++b)
      unpack(k, packed.data() + b * stats(k, true), true, g + b * k * k, s + b * k);
  });
  return {matrix, sums};
}

}  // namespace

void bind_guidance(py::module_& m) {
  m.def("guide", &guide_arrays);
  m.def("mix", &mix_arrays);
  m.def("gram", &gram_arrays);
}

}  // namespace pydiffuse
