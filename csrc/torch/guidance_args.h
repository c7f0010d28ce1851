// From the arguments of the guidance ops to the structs of the kernels; CPU and CUDA alike.
#pragma once

#include <algorithm>

#include "../guidance.h"
#include "tensors.h"

namespace pydiffuse {

// What guide and guide_backward share.
template <class Call>
void set_rule(const char* op, Call& call, const Layout& layout, const Tensors& preds, int64_t rule,
              const std::vector<double>& params, bool rescaled, const MaybeTensor& varied,
              const std::vector<int64_t>& columns, Tensors* keep) {
  STD_TORCH_CHECK(rule >= 0 && rule < static_cast<int>(Rule::count), op, ": unknown rule");
  STD_TORCH_CHECK(!preds.empty() && preds.size() <= MAX_PREDS, op, ": takes 1 to 16 predictions");
  STD_TORCH_CHECK(params.size() <= MAX_PARAMS, op, ": too many parameters");
  STD_TORCH_CHECK(columns.size() <= MAX_PARAMS && columns.empty() == !varied.has_value(), op,
                  ": `varied` and `columns` come together");
  call.rule = static_cast<Rule>(rule);
  call.k = static_cast<int>(preds.size());
  call.rescaled = rescaled;
  call.batch = layout.batch;
  call.n = layout.n;
  for (int i = 0; i < call.k; ++i) call.pred[i] = layout.rows(preds[i], keep);
  std::fill(call.params, call.params + MAX_PARAMS, 0.0);
  std::copy(params.begin(), params.end(), call.params);
  call.nparams = static_cast<int>(params.size());
  call.varied = nullptr;
  call.ncolumns = static_cast<int>(columns.size());
  for (int i = 0; i < call.ncolumns; ++i) {
    STD_TORCH_CHECK(columns[i] >= 0 && columns[i] < call.nparams, op, ": no such parameter");
    call.columns[i] = columns[i];
  }
  if (varied) {
    check_doubles(op, *varied, layout.batch * call.ncolumns);
    call.varied = static_cast<const double*>(varied->data_ptr());
  }
  STD_TORCH_CHECK(rule_fits(call.rule, call.k, call.nparams), op,
                  ": too few or too many predictions or parameters for this rule");
}

inline GuideCall guide_call(const Layout& layout, const Tensors& out, const Tensors& preds,
                            const MaybeTensor& x, const MaybeTensor& history,
                            const MaybeTensor& noise, int64_t rule,
                            const std::vector<double>& params, bool rescaled,
                            const MaybeTensor& varied, const std::vector<int64_t>& columns,
                            int64_t emit, Tensors* keep) {
  GuideCall call;
  set_rule("guide", call, layout, preds, rule, params, rescaled, varied, columns, keep);
  call.emit = static_cast<int>(emit & 7);
  call.has = 0;
  STD_TORCH_CHECK(static_cast<int>(out.size()) == bits(call.emit) && !out.empty(),
                  "guide: one output for each bit of `emit`");
  STD_TORCH_CHECK(!(call.emit & EMIT_STATE) || call.rule == Rule::apg,
                  "guide: only apg has a state");
  for (auto [tensor, bit] : {std::pair{&x, HAS_X}, {&history, HAS_HISTORY}, {&noise, HAS_NOISE}})
    if (*tensor) {
      call.extra[bits(call.has)] = layout.rows(**tensor, keep);
      call.has |= bit;
    }
  for (size_t i = 0; i < out.size(); ++i) call.out[i] = layout.rows(out[i], nullptr);
  return call;
}

inline GuideBackwardCall guide_backward_call(const Layout& layout, const Tensors& dpreds,
                                             const MaybeTensor& dvaried, const Tensor& grad,
                                             const Tensors& preds, int64_t rule,
                                             const std::vector<double>& params, bool rescaled,
                                             const MaybeTensor& varied,
                                             const std::vector<int64_t>& columns, Tensors* keep) {
  GuideBackwardCall call;
  set_rule("guide_backward", call, layout, preds, rule, params, rescaled, varied, columns, keep);
  STD_TORCH_CHECK(dpreds.size() == preds.size(), "guide_backward: one gradient per prediction");
  call.grad = layout.rows(grad, keep);
  for (int i = 0; i < call.k; ++i) call.dpred[i] = layout.rows(dpreds[i], nullptr);
  call.dvaried = nullptr;
  if (dvaried) {
    check_doubles("guide_backward", *dvaried, layout.batch * call.ncolumns);
    call.dvaried = static_cast<double*>(dvaried->data_ptr());
  }
  return call;
}

inline MixCall mix_call(const Layout& layout, const Tensors& out, const Tensors& terms,
                        const Tensor& matrix, const MaybeTensor& shift, Tensors* keep) {
  STD_TORCH_CHECK(!terms.empty() && terms.size() <= MAX_TERMS, "mix: takes 1 to 19 terms");
  STD_TORCH_CHECK(!out.empty() && out.size() <= MAX_OUTS, "mix: gives 1 to 16 outputs");
  MixCall call;
  call.terms = static_cast<int>(terms.size());
  call.outs = static_cast<int>(out.size());
  call.batch = layout.batch;
  call.n = layout.n;
  for (int m = 0; m < call.terms; ++m) call.term[m] = layout.rows(terms[m], keep);
  for (int j = 0; j < call.outs; ++j) call.out[j] = layout.rows(out[j], nullptr);
  check_doubles("mix", matrix, layout.batch * call.outs * call.terms);
  call.matrix = static_cast<const double*>(matrix.data_ptr());
  call.shift = nullptr;
  if (shift) {
    check_doubles("mix", *shift, layout.batch * call.outs);
    call.shift = static_cast<const double*>(shift->data_ptr());
  }
  return call;
}

}  // namespace pydiffuse
