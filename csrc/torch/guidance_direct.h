// `guide.new` and `guide.into`: contiguous tensors and numbers for parameters; CPU and CUDA alike.
#pragma once

#include <tuple>

#include "direct.h"
#include "guidance_args.h"

namespace pydiffuse {

struct UsualGuide {
  const Tensors& preds;
  const MaybeTensor &x, &history, &noise;
  int64_t emit;

  const Tensor& like() const { return x ? *x : preds[0]; }

  // Predictions of one dtype, everything of one shape.
  bool fits() const {
    const Tensor& first = preds[0];
    const Usual usual(first);
    DType dtype;
    if (first.dim() < 1 || first.dim() > MAX_DIMS || first.numel() == 0) return false;
    for (const Tensor& t : preds)
      if (!usual.floating(t, &dtype) || t.scalar_type() != first.scalar_type() ||
          !same_sizes(t, first) || !t.is_contiguous())
        return false;
    for (const MaybeTensor* t : {&x, &history, &noise})
      if (*t && (!usual.floating(**t, &dtype) || !same_sizes(**t, first) || !(*t)->is_contiguous()))
        return false;
    return true;
  }

  // Outputs like what they stand for, each with memory of its own or exactly an input's.
  bool fits(const Tensors& out) const {
    if (static_cast<int>(out.size()) != bits(static_cast<int>(emit & 7))) return false;
    const Usual usual(preds[0]);
    for (size_t i = 0; i < out.size(); ++i) {
      const bool state = emit & EMIT_STATE && i + 1 == out.size();
      const Tensor& t = out[i];
      const Tensor& own = state ? preds[0] : like();
      DType dtype;
      if (!usual.floating(t, &dtype) || t.scalar_type() != own.scalar_type() ||
          !same_sizes(t, own) || !t.is_contiguous())
        return false;
      for (size_t j = 0; j < i; ++j)
        if (!apart(t, out[j])) return false;
      for (const Tensor& p : preds)
        if (!apart(t, p) && !same(t, p)) return false;
      for (const MaybeTensor* e : {&x, &history, &noise})
        if (*e && !apart(t, **e) && !same(t, **e)) return false;
    }
    return true;
  }

 private:
  static int64_t bytes(const Tensor& t) {
    return t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 2);
  }
  static bool apart(const Tensor& a, const Tensor& b) {
    const char *p = static_cast<const char*>(a.data_ptr()),
               *q = static_cast<const char*>(b.data_ptr());
    return p + bytes(a) <= q || q + bytes(b) <= p;
  }
  static bool same(const Tensor& a, const Tensor& b) {
    return a.data_ptr() == b.data_ptr() && a.scalar_type() == b.scalar_type();
  }
};

// What a call is made of beside its tensors: the rule's code, what it emits, the parameters.
struct UsualRule {
  int64_t rule = -1, emit = 0;
  std::vector<double> params;

  explicit UsualRule(const Tensor& numbers) {
    const double* data = numbers_of(numbers, 2 + param::RULE);
    if (!data) return;
    rule = static_cast<int64_t>(data[0]), emit = static_cast<int64_t>(data[1]);
    params.assign(data + 2, data + numbers.numel());
  }
  explicit operator bool() const { return rule >= 0 && emit > 0; }
  bool rescaled() const { return params[param::phi] != 0; }
};

using UsualGuided = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>;

// run(out): the op that writes. The results in the order of `emit`'s bits.
template <class Run>
UsualGuided usual_guide(const UsualGuide& in, const Run& run) {
  if (in.preds.empty() || !in.fits()) return {};
  Tensors out;
  for (const int bit : {EMIT_UPDATE, EMIT_PREDICT, EMIT_STATE})
    if (in.emit & bit) out.push_back(new_like(bit == EMIT_STATE ? in.preds[0] : in.like()));
  run(out);
  const auto at = [&](size_t i) { return i < out.size() ? MaybeTensor(out[i]) : MaybeTensor(); };
  return {at(0), at(1), at(2)};
}

template <class Run>
bool usual_guide_into(const UsualGuide& in, const Tensors& out, const Run& run) {
  if (in.preds.empty() || !in.fits() || !in.fits(out)) return false;
  run(out);
  return true;
}

}  // namespace pydiffuse
