// The torch binding of guidance on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include "../cpu/guidance_call.h"
#include "guidance_direct.h"

namespace pydiffuse {
namespace {

void guide_cpu(const Tensors& out, const Tensors& preds, const MaybeTensor& x,
               const MaybeTensor& history, const MaybeTensor& noise, int64_t rule,
               const std::vector<double>& params, bool rescaled, const MaybeTensor& varied,
               const std::vector<int64_t>& columns, int64_t emit) {
  STD_TORCH_CHECK(!out.empty(), "guide: no output");
  const Layout layout("guide", out[0]);
  Tensors keep;
  guide(guide_call(layout, out, preds, x, history, noise, rule, params, rescaled, varied, columns,
                   emit, &keep),
        TorchThreads{});
}

void guide_backward_cpu(const Tensors& dpreds, const MaybeTensor& dvaried, const Tensor& grad,
                        const Tensors& preds, int64_t rule, const std::vector<double>& params,
                        bool rescaled, const MaybeTensor& varied,
                        const std::vector<int64_t>& columns) {
  STD_TORCH_CHECK(!dpreds.empty(), "guide_backward: no output");
  const Layout layout("guide_backward", dpreds[0]);
  Tensors keep;
  guide_backward(guide_backward_call(layout, dpreds, dvaried, grad, preds, rule, params, rescaled,
                                     varied, columns, &keep),
                 TorchThreads{});
}

void mix_cpu(const Tensors& out, const Tensors& terms, const Tensor& matrix,
             const MaybeTensor& shift) {
  STD_TORCH_CHECK(!out.empty(), "mix: no output");
  const Layout layout("mix", out[0]);
  Tensors keep;
  mix(mix_call(layout, out, terms, matrix, shift, &keep), TorchThreads{});
}

void gram_cpu(const Tensor& out, const MaybeTensor& sums, const Tensors& preds) {
  STD_TORCH_CHECK(!preds.empty() && preds.size() <= MAX_PREDS, "gram: takes 1 to 16 predictions");
  const Layout layout("gram", preds[0], false);
  const int k = static_cast<int>(preds.size());
  check_doubles("gram", out, layout.batch * k * k);
  if (sums) check_doubles("gram", *sums, layout.batch * k);
  Rows p[MAX_PREDS];
  Tensors keep;
  for (int i = 0; i < k; ++i) p[i] = layout.rows(preds[i], &keep);

  const int width = stats(k, sums.has_value());
  std::vector<double> packed(layout.batch * width), unused(k);
  gram(k, sums.has_value(), layout.batch, layout.n, p, packed.data(), TorchThreads{});
  auto* g = static_cast<double*>(out.data_ptr());
  auto* s = sums ? static_cast<double*>(sums->data_ptr()) : nullptr;
  for (int64_t b = 0; b < layout.batch; ++b)
    unpack(k, packed.data() + b * width, s != nullptr, g + b * k * k,
           s ? s + b * k : unused.data());
}

MaybeTensor guide_rule_cpu(const Tensors& preds, const Tensor& numbers) {
  const UsualRule r(numbers);
  const MaybeTensor none;
  if (!r || r.emit != EMIT_UPDATE) return {};
  return std::get<0>(usual_guide({preds, none, none, none, r.emit}, [&](const Tensors& out) {
    guide_cpu(out, preds, none, none, none, r.rule, r.params, r.rescaled(), none, {}, r.emit);
  }));
}

UsualGuided guide_new_cpu(const Tensors& preds, const MaybeTensor& x, const MaybeTensor& history,
                          const MaybeTensor& noise, const Tensor& numbers) {
  const UsualRule r(numbers);
  if (!r) return {};
  return usual_guide({preds, x, history, noise, r.emit}, [&](const Tensors& out) {
    guide_cpu(out, preds, x, history, noise, r.rule, r.params, r.rescaled(), {}, {}, r.emit);
  });
}

bool guide_into_cpu(const Tensors& out, const Tensors& preds, const MaybeTensor& x,
                    const MaybeTensor& history, const MaybeTensor& noise, const Tensor& numbers) {
  const UsualRule r(numbers);
  return r && usual_guide_into({preds, x, history, noise, r.emit}, out, [&](const Tensors& to) {
           guide_cpu(to, preds, x, history, noise, r.rule, r.params, r.rescaled(), {}, {}, r.emit);
         });
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("guide", TORCH_BOX(&guide_cpu));
  m.impl("guide.rule", TORCH_BOX(&guide_rule_cpu));
  m.impl("guide.new", TORCH_BOX(&guide_new_cpu));
  m.impl("guide.into", TORCH_BOX(&guide_into_cpu));
  m.impl("guide_backward", TORCH_BOX(&guide_backward_cpu));
  m.impl("mix", TORCH_BOX(&mix_cpu));
  m.impl("gram", TORCH_BOX(&gram_cpu));
}

}  // namespace pydiffuse
