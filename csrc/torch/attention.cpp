// The torch binding of tile attention on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include <cstring>
#include <vector>

#include "../cpu/attention_call.h"
#include "../cpu/attention_plan.h"
#include "accepts.h"
#include "direct.h"

namespace pydiffuse {
namespace {

// The plan's tensors, in the schema's order.
struct PlanInputs {
  const Tensor &bounds, &starts, &spans, &blocks, &k_bounds, &k_starts, &k_spans, &k_blocks, &words,
      &mask_at;
  const MaybeTensor& order;
};

struct AttentionInputs {
  const Tensor &q, &k, &v;
  const MaybeTensor& scales;
  double scale;
};

Heads heads(const Accepts& accepts, const char* name, const Tensor& t,
            std::initializer_list<int64_t> sizes) {
  accepts.shape(name, t, sizes);
  STD_TORCH_CHECK(t.numel() == 0 || t.stride(3) == 1, accepts.op, ": ", name,
                  " must have a token's features side by side");
  STD_TORCH_CHECK(t.scalar_type() == accepts.like.scalar_type(), accepts.op, ": ", name,
                  " has another dtype than q; accepted: q's");
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}, dtype_of(accepts.op, t)};
}

PlanSide side(const Accepts& accepts, const Tensor& bounds, const Tensor& starts,
              const Tensor& spans, const Tensor& blocks, int64_t plan_heads) {
  PlanSide s;
  s.tiles = bounds.numel() - 1;
  s.spans = spans.size(0);
  s.blocks = blocks.dim() == 3 ? blocks.size(1) : 0;
  s.bounds = accepts.ints("bounds", bounds, {s.tiles + 1});
  s.starts = accepts.ints("starts", starts, {plan_heads, s.tiles + 1});
  s.span = accepts.ints("spans", spans, {s.spans, 3});
  s.block = accepts.ints("blocks", blocks, {plan_heads, s.blocks, 3});
  return s;
}

Plan plan_of(const Accepts& accepts, const PlanInputs& in, int64_t heads, int64_t queries,
             int64_t keys) {
  Plan plan;
  STD_TORCH_CHECK(in.starts.dim() == 2 && (in.starts.size(0) == 1 || in.starts.size(0) == heads),
                  accepts.op, ": the plan must be for 1 or ", heads, " heads");
  plan.heads = in.starts.size(0);
  plan.words = in.words.numel();
  plan.masks = in.mask_at.numel();
  plan.q = side(accepts, in.bounds, in.starts, in.spans, in.blocks, plan.heads);
  plan.k = side(accepts, in.k_bounds, in.k_starts, in.k_spans, in.k_blocks, plan.heads);
  plan.word = accepts.ints("words", in.words, {plan.words});
  accepts.shape("mask_at", in.mask_at, {plan.masks});
  STD_TORCH_CHECK(in.mask_at.scalar_type() == ScalarType::Long && in.mask_at.is_contiguous(),
                  accepts.op, ": mask_at must be contiguous int64");
  plan.mask_at = static_cast<const int64_t*>(in.mask_at.data_ptr());
  plan.order = accepts.ints("order", in.order, {queries});
  const char* bad = bad_plan(plan, queries, keys);
  STD_TORCH_CHECK(!bad, accepts.op, ": ", bad ? bad : "");
  return plan;
}

AttentionCall attention_call(const Accepts& accepts, const AttentionInputs& in,
                             const PlanInputs& plan, const Tensor& out) {
  const Tensor& q = in.q;
  STD_TORCH_CHECK(q.dim() == 4 && in.k.dim() == 4, accepts.op,
                  ": q and k must be [batch, heads, tokens, dim]");
  AttentionCall c{};
  c.batch = q.size(0), c.heads = q.size(1), c.queries = q.size(2);
  c.kv_heads = in.k.size(1), c.keys = in.k.size(2);
  const int64_t dim = q.size(3);
  STD_TORCH_CHECK(dim >= 8 && dim % 8 == 0 && dim <= MAX_HEAD_DIM, accepts.op, ": head_dim ", dim,
                  " is not a multiple of 8 from 8 to 256");
  STD_TORCH_CHECK(c.kv_heads > 0 && c.heads % c.kv_heads == 0, accepts.op, ": k has ", c.kv_heads,
                  " heads; accepted: a divisor of q's ", c.heads);
  c.dim = static_cast<int>(dim);
  c.q = heads(accepts, "q", q, {c.batch, c.heads, c.queries, dim});
  c.k = heads(accepts, "k", in.k, {c.batch, c.kv_heads, c.keys, dim});
  c.v = heads(accepts, "v", in.v, {c.batch, c.kv_heads, c.keys, dim});
  c.out = heads(accepts, "out", out, {c.batch, c.heads, c.queries, dim});
  c.scales = accepts.floats("scales", in.scales, {c.heads});
  c.scale = static_cast<float>(in.scale);
  c.plan = plan_of(accepts, plan, c.heads, c.queries, c.keys);
  return c;
}

void tile_attention_cpu(const Tensor& out, const MaybeTensor& lse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const MaybeTensor& scales, double scale,
                        const Tensor& bounds, const Tensor& starts, const Tensor& spans,
                        const Tensor& blocks, const Tensor& k_bounds, const Tensor& k_starts,
                        const Tensor& k_spans, const Tensor& k_blocks, const Tensor& words,
                        const Tensor& mask_at, const MaybeTensor& order) {
  const Accepts accepts{"tile_attention", q};
  AttentionCall call = attention_call(
      accepts, {q, k, v, scales, scale},
      {bounds, starts, spans, blocks, k_bounds, k_starts, k_spans, k_blocks, words, mask_at, order},
      out);
  call.lse = accepts.floats("lse", lse, {call.batch, call.heads, call.queries});
  tile_attention(call, TorchThreads{});
}

// A result like t: a token's heads next to each other where t's are, else a head's tokens.
Tensor new_heads(const Tensor& t) {
  const int64_t sizes[] = {t.size(0), t.size(1), t.size(2), t.size(3)};
  const int64_t H = sizes[1], S = sizes[2], D = sizes[3];
  const bool by_token = t.stride(1) > 0 && t.stride(1) < t.stride(2);
  const int64_t strides[] = {H * S * D, by_token ? D : S * D, by_token ? H * D : D, 1};
  return new_tensor(t, dtype_code(t), sizes, strides, 4);
}

// False where the tensor is no packed plan.
bool unpacked(const Tensor& packed, Plan* plan) {
  return packed.is_cpu() && packed.scalar_type() == ScalarType::Int && packed.is_contiguous() &&
         unpacked(static_cast<const int32_t*>(packed.data_ptr()), packed.numel(), plan);
}

std::tuple<MaybeTensor, MaybeTensor> tile_attention_new_cpu(const Tensor& q, const Tensor& k,
                                                            const Tensor& v, double scale,
                                                            const Tensor& packed, bool with_lse) {
  const Usual usual(q);
  AttentionCall c{};
  if (q.dim() != 4 || k.dim() != 4 || !same_sizes(k, v) || q.numel() == 0 || k.numel() == 0)
    return {};
  c.batch = q.size(0), c.heads = q.size(1), c.queries = q.size(2);
  c.kv_heads = k.size(1), c.keys = k.size(2);
  const int64_t D = q.size(3);
  if (D < 8 || D % 8 || D > MAX_HEAD_DIM || k.size(0) != c.batch || k.size(3) != D ||
      c.heads % c.kv_heads)
    return {};
  c.dim = static_cast<int>(D);
  c.scale = static_cast<float>(scale);
  const auto heads = [&](const Tensor& t, Heads* h) {
    *h = {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}, DType::f32};
    return usual.floating(t, &h->dtype) && t.scalar_type() == q.scalar_type() && t.stride(3) == 1;
  };
  if (!heads(q, &c.q) || !heads(k, &c.k) || !heads(v, &c.v) || !unpacked(packed, &c.plan) ||
      (c.plan.heads != 1 && c.plan.heads != c.heads) || bad_plan(c.plan, c.queries, c.keys))
    return {};
  const Tensor out = new_heads(q);
  heads(out, &c.out);
  MaybeTensor lse;
  if (with_lse) {
    lse = new_tensor(q, aoti_torch_dtype_float32(), {c.batch, c.heads, c.queries});
    c.lse = static_cast<float*>(lse->data_ptr());
  }
  tile_attention(c, TorchThreads{});
  return {out, lse};
}

void tile_attention_backward_cpu(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                 const Tensor& dout, const MaybeTensor& dlse, const Tensor& out,
                                 const Tensor& lse, const Tensor& q, const Tensor& k,
                                 const Tensor& v, const MaybeTensor& scales, double scale,
                                 const Tensor& bounds, const Tensor& starts, const Tensor& spans,
                                 const Tensor& blocks, const Tensor& k_bounds,
                                 const Tensor& k_starts, const Tensor& k_spans,
                                 const Tensor& k_blocks, const Tensor& words, const Tensor& mask_at,
                                 const MaybeTensor& order) {
  const Accepts accepts{"tile_attention_backward", q};
  AttentionBackwardCall b{};
  AttentionCall& c = b.forward;
  c = attention_call(
      accepts, {q, k, v, scales, scale},
      {bounds, starts, spans, blocks, k_bounds, k_starts, k_spans, k_blocks, words, mask_at, order},
      out);
  c.lse = accepts.floats("lse", lse, {c.batch, c.heads, c.queries});
  b.dlse = accepts.floats("dlse", dlse, {c.batch, c.heads, c.queries});
  b.dout = heads(accepts, "dout", dout, {c.batch, c.heads, c.queries, c.dim});
  b.dq = heads(accepts, "dq", dq, {c.batch, c.heads, c.queries, c.dim});
  b.dk = heads(accepts, "dk", dk, {c.batch, c.kv_heads, c.keys, c.dim});
  b.dv = heads(accepts, "dv", dv, {c.batch, c.kv_heads, c.keys, c.dim});
  tile_attention_backward(b, TorchThreads{});
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("tile_attention", TORCH_BOX(&tile_attention_cpu));
  m.impl("tile_attention.new", TORCH_BOX(&tile_attention_new_cpu));
  m.impl("tile_attention_backward", TORCH_BOX(&tile_attention_backward_cpu));
}

}  // namespace pydiffuse
