// The torch binding of guidance on CUDA. Schemas stand in pydiffuse/_core/schemas.py.
#include "../torch/guidance_direct.h"
#include "guidance_mix.cuh"
#include "launch.h"

namespace pydiffuse {
namespace {

// A call's launches, and what all its kernels must agree on: the split into chunks, and one size of
// vector, so that a sum is taken in one order whichever kernel takes it.
struct Call : Launch {
  Split split;
  bool narrow = false;  // some tensor is not float32
  bool vector = true;   // all rows lie on 16-byte boundaries

  explicit Call(const Layout& layout) : Launch(layout.like), split(layout.batch, layout.n) {}

  void see(const Rows* rows, int count) {
    for (const Rows* r = rows; r < rows + count; ++r) {
      const bool wide = r->dtype == DType::f32;
      narrow = narrow || !wide;
      vector = vector && reinterpret_cast<uintptr_t>(r->data) % 16 == 0 &&
               (split.batch == 1 || r->stride * (wide ? 4 : 2) % 16 == 0);
    }
  }
  Partials partials(int k, bool sums) {
    const int width = stats(k, sums);
    return {doubles(split.batch * width * split.chunks), width};
  }
};

template <int K>
auto gram_for(bool narrow) {
  return narrow ? gram_kernel<K, 8, true> : gram_kernel<K, 4, false>;
}
template <int M>
auto mix_for(bool narrow) {
  return narrow ? mix_kernel<M, 8, true> : mix_kernel<M, 4, false>;
}
template <int K>
auto guide_for(bool narrow) {
  return narrow ? guide_kernel<K, 8, true> : guide_kernel<K, 4, false>;
}

void run_gram(Call& on, int k, bool sums, const Rows* p, const Partials& partials) {
  GramArgs a{on.split, k, sums, on.vector, {}, partials};
  std::copy(p, p + k, a.p);
  void (*const kernels[])(GramArgs) = {gram_for<1>(on.narrow), gram_for<2>(on.narrow),
                                       gram_for<3>(on.narrow), gram_for<4>(on.narrow)};
  on.run(kernels[std::min(k, 4) - 1], on.split.batch * on.split.chunks * gram_blocks(k), THREADS,
         a);
}

MixArgs mix_args(const Call& on, int terms, int outs) {
  MixArgs a{};
  a.split = on.split;
  a.vector = on.vector;
  a.terms = a.columns = terms;
  a.outs = outs;
  for (int m = 0; m < terms; ++m) a.column[m] = static_cast<uint8_t>(m);
  return a;
}

void run_mix(Call& on, MixArgs a) {
  uint32_t wanted = 0;
  for (int j = 0; j < a.outs; ++j) wanted |= a.used[j];
  int terms = 0;
  uint32_t used[MAX_OUTS] = {};
  for (int m = 0; m < a.terms; ++m) {  // leave out the terms that no output has
    if (!(wanted >> m & 1)) continue;
    for (int j = 0; j < a.outs; ++j) used[j] |= (a.used[j] >> m & 1) << terms;
    a.term[terms] = a.term[m];
    a.column[terms++] = static_cast<uint8_t>(m);
  }
  a.terms = terms;
  std::copy(used, used + MAX_OUTS, a.used);

  // Enough blocks to fill the device twice over; runs are short, so that the last tiles go first.
  const int64_t tiles = a.split.batch * a.split.tiles, most = 8 * on.multiprocessors();
  a.run = static_cast<int>(std::clamp<int64_t>((tiles + most - 1) / most, 1, 4));
  const int64_t blocks = std::min(most, (tiles + a.run - 1) / a.run);
  void (*const kernels[])(MixArgs) = {mix_for<1>(on.narrow),         mix_for<2>(on.narrow),
                                      mix_for<3>(on.narrow),         mix_for<4>(on.narrow),
                                      mix_for<5>(on.narrow),         mix_for<6>(on.narrow),
                                      mix_kernel<MAX_TERMS, 4, true>};
  on.run(kernels[std::min(terms, 7) - 1], blocks, THREADS, a);
}

template <class RuleCall>
RuleArgs rule_args(const RuleCall& call, int has, int emit) {
  RuleArgs r{call.rule, call.k, has, emit, call.rescaled, needs_gram(call.rule, call.rescaled)};
  r.n = static_cast<double>(call.n);
  r.nparams = call.nparams;
  r.ncolumns = call.ncolumns;
  r.varied = call.varied;
  std::copy(call.params, call.params + MAX_PARAMS, r.params);
  std::copy(call.columns, call.columns + call.ncolumns, r.columns);
  return r;
}

// One launch for both passes, where shared memory holds what lies between them: a sample per block,
// or, with a cooperative launch, the whole call.
bool run_guide(Call& on, const MixArgs& mix, const RuleArgs& rule) {
  const int k = rule.k;
  if (k < 2 || k > 4 || !on.vector || on.split.n % (on.narrow ? 8 : 4) != 0) return false;
  GuideArgs a{mix, rule, {nullptr, stats(k, rule.rescaled)}, 1, 0, 0, {}};
  const int64_t lane = THREADS * (on.narrow ? 8 : 4);  // elements
  a.lanes =
      static_cast<int>((std::min(on.split.n, int64_t(on.split.per) * TILE) + lane - 1) / lane);
  for (int i = 0; i < k; ++i) {
    a.plane[i] = static_cast<uint8_t>(a.planes);
    a.planes += on.narrow && mix.term[i].dtype == DType::f32 ? 2 : 1;
  }
  const int64_t chunk = int64_t(a.lanes) * a.planes * THREADS * sizeof(uint4) +
                        int64_t(WARPS) * a.partials.width * sizeof(double);  // bytes
  void (*const kernels[])(GuideArgs) = {guide_for<2>(on.narrow), guide_for<3>(on.narrow),
                                        guide_for<4>(on.narrow)};
  const auto kernel = kernels[k - 2];
  const Residency& most = on.residency(kernel, THREADS);
  if (on.split.chunks == 1) {
    if (chunk > most.shared[1]) return false;
    on.run(kernel, on.split.batch, THREADS, a, chunk);
    return true;
  }
  const int64_t chunks = on.split.batch * on.split.chunks;
  for (int share = 2; share > 0 && most.cooperative; --share) {
    const int64_t blocks = int64_t(share) * most.multiprocessors;
    a.hold = static_cast<int>(std::min<int64_t>((chunks + blocks - 1) / blocks, INT_MAX));
    if (a.hold > most.shared[share] / chunk) continue;
    a.partials = on.partials(k, rule.rescaled);
    return on.run_cooperative(kernel, (chunks + a.hold - 1) / a.hold, THREADS, a, a.hold * chunk);
  }
  return false;
}

void guide_cuda(const Tensors& out, const Tensors& preds, const MaybeTensor& x,
                const MaybeTensor& history, const MaybeTensor& noise, int64_t rule,
                const std::vector<double>& params, bool rescaled, const MaybeTensor& varied,
                const std::vector<int64_t>& columns, int64_t emit) {
  STD_TORCH_CHECK(!out.empty(), "guide: no output");
  const Layout layout("guide", out[0]);
  Call on(layout);
  on.check_device("guide", varied);
  Tensors keep;
  const GuideCall call = guide_call(layout, out, preds, x, history, noise, rule, params, rescaled,
                                    varied, columns, emit, &keep);
  if (layout.batch * layout.n == 0) return;
  const int k = call.k, extras = bits(call.has), outs = bits(call.emit);
  on.see(call.pred, k);
  on.see(call.extra, extras);
  on.see(call.out, outs);
  MixArgs a = mix_args(on, k + extras, outs);
  mix_masks(call.rule, k, call.has, call.emit, a.used);
  a.preds = k;
  a.columns = a.terms + 1;
  std::copy(call.pred, call.pred + k, a.term);
  std::copy(call.extra, call.extra + extras, a.term + k);
  std::copy(call.out, call.out + outs, a.out);

  const RuleArgs r = rule_args(call, call.has, call.emit);
  if (r.curved && run_guide(on, a, r)) return;
  if (!r.curved && !r.varied) {  // the same for all samples: known here
    double c[MAX_PREDS];
    coefficients(r.rule, Sample<double>{k, r.n, nullptr, nullptr, r.params, false}, c);
    mix_rows(k, r.has, r.emit, r.params, c, a.fixed);
    return run_mix(on, a);
  }
  SolveArgs s{on.split, r, {}, on.doubles(layout.batch * outs * a.columns), outs * a.columns};
  if (r.curved) {
    s.partials = on.partials(k, rescaled);
    run_gram(on, k, rescaled, call.pred, s.partials);
  }
  on.run(solve_kernel, layout.batch, THREADS, s);
  a.matrix = s.matrix;
  run_mix(on, a);
}

// One Gram pass over (p, y) brings G and <y, p_i> together; see cpu/guidance_call.h.
void guide_backward_cuda(const Tensors& dpreds, const MaybeTensor& dvaried, const Tensor& grad,
                         const Tensors& preds, int64_t rule, const std::vector<double>& params,
                         bool rescaled, const MaybeTensor& varied,
                         const std::vector<int64_t>& columns) {
  STD_TORCH_CHECK(!dpreds.empty(), "guide_backward: no output");
  const Layout layout("guide_backward", dpreds[0]);
  Call on(layout);
  on.check_device("guide_backward", varied);
  on.check_device("guide_backward", dvaried);
  Tensors keep;
  const GuideBackwardCall call = guide_backward_call(layout, dpreds, dvaried, grad, preds, rule,
                                                     params, rescaled, varied, columns, &keep);
  if (layout.batch == 0) return;
  const int k = call.k;
  on.see(call.pred, k);
  on.see(&call.grad, 1);
  on.see(call.dpred, k);
  MixArgs a = mix_args(on, k + 1, k);
  std::copy(call.pred, call.pred + k, a.term);
  a.term[k] = call.grad;
  std::copy(call.dpred, call.dpred + k, a.out);

  const RuleArgs r = rule_args(call, 0, 0);
  std::fill(a.used, a.used + k, r.curved ? (1u << (k + 1)) - 1 : 1u << k);
  VjpArgs v{
      on.split,    r, {}, on.doubles(layout.batch * k * (k + 1)), on.doubles(layout.batch * k),
      call.dvaried};
  if (r.curved || call.dvaried) {
    v.partials = on.partials(k + 1, rescaled);
    run_gram(on, k + 1, rescaled, a.term, v.partials);
  }
  on.run(vjp_kernel, layout.batch, VJP_THREADS, v);
  if (layout.n == 0) return;
  a.matrix = v.matrix;
  a.shift = rescaled ? v.shift : nullptr;
  run_mix(on, a);
}

void mix_cuda(const Tensors& out, const Tensors& terms, const Tensor& matrix,
              const MaybeTensor& shift) {
  STD_TORCH_CHECK(!out.empty(), "mix: no output");
  const Layout layout("mix", out[0]);
  Call on(layout);
  on.check_device("mix", matrix);
  on.check_device("mix", shift);
  Tensors keep;
  const MixCall call = mix_call(layout, out, terms, matrix, shift, &keep);
  if (layout.batch * layout.n == 0) return;
  on.see(call.term, call.terms);
  on.see(call.out, call.outs);
  MixArgs a = mix_args(on, call.terms, call.outs);
  std::copy(call.term, call.term + call.terms, a.term);
  std::copy(call.out, call.out + call.outs, a.out);
  std::fill(a.used, a.used + call.outs, (1u << call.terms) - 1);
  a.matrix = call.matrix;
  a.shift = call.shift;
  run_mix(on, a);
}

void gram_cuda(const Tensor& out, const MaybeTensor& sums, const Tensors& preds) {
  STD_TORCH_CHECK(!preds.empty() && preds.size() <= MAX_PREDS, "gram: takes 1 to 16 predictions");
  const Layout layout("gram", preds[0], false);
  const int k = static_cast<int>(preds.size());
  Call on(layout);
  on.check_device("gram", out);
  on.check_device("gram", sums);
  check_doubles("gram", out, layout.batch * k * k);
  if (sums) check_doubles("gram", *sums, layout.batch * k);
  Rows p[MAX_PREDS];
  Tensors keep;
  for (int i = 0; i < k; ++i) p[i] = layout.rows(preds[i], &keep);
  if (layout.batch == 0) return;
  on.see(p, k);
  FinishArgs f{on.split, k, on.partials(k, sums.has_value()), static_cast<double*>(out.data_ptr()),
               sums ? static_cast<double*>(sums->data_ptr()) : nullptr};
  run_gram(on, k, sums.has_value(), p, f.partials);
  on.run(finish_kernel, layout.batch, THREADS, f);
}

MaybeTensor guide_rule_cuda(const Tensors& preds, const Tensor& numbers) {
  const UsualRule r(numbers);
  const MaybeTensor none;
  if (!r || r.emit != EMIT_UPDATE) return {};
  return std::get<0>(usual_guide({preds, none, none, none, r.emit}, [&](const Tensors& out) {
    guide_cuda(out, preds, none, none, none, r.rule, r.params, r.rescaled(), none, {}, r.emit);
  }));
}

UsualGuided guide_new_cuda(const Tensors& preds, const MaybeTensor& x, const MaybeTensor& history,
                           const MaybeTensor& noise, const Tensor& numbers) {
  const UsualRule r(numbers);
  if (!r) return {};
  return usual_guide({preds, x, history, noise, r.emit}, [&](const Tensors& out) {
    guide_cuda(out, preds, x, history, noise, r.rule, r.params, r.rescaled(), {}, {}, r.emit);
  });
}

bool guide_into_cuda(const Tensors& out, const Tensors& preds, const MaybeTensor& x,
                     const MaybeTensor& history, const MaybeTensor& noise, const Tensor& numbers) {
  const UsualRule r(numbers);
  return r && usual_guide_into({preds, x, history, noise, r.emit}, out, [&](const Tensors& to) {
           guide_cuda(to, preds, x, history, noise, r.rule, r.params, r.rescaled(), {}, {}, r.emit);
         });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydiffuse, CUDA, m) {
  m.impl("guide", TORCH_BOX(&guide_cuda));
  m.impl("guide.rule", TORCH_BOX(&guide_rule_cuda));
  m.impl("guide.new", TORCH_BOX(&guide_new_cuda));
  m.impl("guide.into", TORCH_BOX(&guide_into_cuda));
  m.impl("guide_backward", TORCH_BOX(&guide_backward_cuda));
  m.impl("mix", TORCH_BOX(&mix_cuda));
  m.impl("gram", TORCH_BOX(&gram_cuda));
}

}  // namespace pydiffuse
