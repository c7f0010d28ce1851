// Tile attention on XLA's buffers: q, out [B, H, S, D]; k, v [B, Hk, Sk, D]; scales [H] float32, or
// none; the plan, packed; lse [B, H, S] float32.
#include "../cpu/attention_call.h"
#include "../cpu/attention_plan.h"

#include "mapped.h"

namespace pydiffuse {
namespace {

enum Has { HAS_SCALES = 1, HAS_LSE = 2 };

struct AttentionArrays {
  Buffer q, k, v;
  Buffer scales, plan;  // no scales: no memory

  AttentionArrays(Call& call, bool with_scales)
      : q(call.input()), k(call.input()), v(call.input()) {
    if (with_scales) scales = call.input();
    plan = call.input();
  }
};

class AttentionOf {
 public:
  AttentionOf(const Call& call, const AttentionArrays& arrays, const Mapped& mapped)
      : arrays_(arrays), mapped_(mapped), dtype_(dtype_of(arrays.q)) {
    const auto sizes = [](const Buffer& b) { return b.dims.last(4); };
    require(arrays.q.dims.size() >= 4 && arrays.k.dims.size() >= 4, "q and k must be [B, H, S, D]");
    AttentionCall& c = common_;
    const auto q = sizes(arrays.q), k = sizes(arrays.k);
    c.batch = q[0], c.heads = q[1], c.queries = q[2];
    c.kv_heads = k[1], c.keys = k[2];
    const int64_t dim = q[3];
    require(dim >= 8 && dim % 8 == 0 && dim <= MAX_HEAD_DIM,
            "head_dim must be a multiple of 8 up to 256");
    require(c.kv_heads > 0 && c.heads % c.kv_heads == 0, "k's heads must divide q's");
    c.dim = static_cast<int>(dim);
    c.scale = static_cast<float>(call.get<double>("scale"));
    const int64_t size = arrays.plan.dims.empty() ? 0 : arrays.plan.dims.back();
    require(unpacked(mapped.plane<const int32_t>(arrays.plan, 0, {size}), size, &c.plan),
            "the plan is damaged");
    require(c.plan.heads == 1 || c.plan.heads == c.heads,
            "the plan is for another number of heads");
    const char* bad = bad_plan(c.plan, c.queries, c.keys);
    require(!bad, bad);
    fold({&arrays.q, &arrays.k, &arrays.v});
  }

  // Where only the batch of all arrays [B, ...] is mapped, the calls are one.
  void fold(std::initializer_list<const Buffer*> more) {
    for (const Buffer* b : more) folded_ = folded_ && mapped_.whole(*b);
    folded_ = folded_ && (!arrays_.scales.data || mapped_.shared(arrays_.scales));
  }
  int64_t calls() const {
    return folded_ ? std::min<int64_t>(1, mapped_.count()) : mapped_.count();
  }
  Heads queries(const Buffer& b, int64_t v) const {
    return heads(b, v, common_.heads, common_.queries);
  }
  Heads keys(const Buffer& b, int64_t v) const {
    return heads(b, v, common_.kv_heads, common_.keys);
  }
  float* rows(const Buffer& b, int64_t v) const {
    return mapped_.plane<float>(b, v, {common_.batch, common_.heads, common_.queries});
  }
  AttentionCall at(int64_t v) const {
    AttentionCall c = common_;
    c.q = queries(arrays_.q, v);
    c.k = keys(arrays_.k, v);
    c.v = keys(arrays_.v, v);
    if (arrays_.scales.data) c.scales = mapped_.plane<const float>(arrays_.scales, v, {c.heads});
    if (folded_) c.batch *= mapped_.count();
    return c;
  }

 private:
  Heads heads(const Buffer& b, int64_t v, int64_t count, int64_t tokens) const {
    require(dtype_of(b) == dtype_, "q, k, v and out must have one dtype");
    const int64_t dim = common_.dim;
    return {mapped_.at(b, v, {common_.batch, count, tokens, dim}),
            {count * tokens * dim, tokens * dim, dim},
            dtype_};
  }

  const AttentionArrays& arrays_;
  const Mapped& mapped_;
  const DType dtype_;
  AttentionCall common_{};
  bool folded_ = true;
};

void tile_attention_xla(Call& call) {
  const int64_t has = call.integer("has");
  const AttentionArrays arrays(call, has & HAS_SCALES);
  const Buffer out = call.output();
  const Buffer lse = has & HAS_LSE ? call.output() : Buffer();
  const Mapped mapped(out, 4);
  const AttentionOf attention(call, arrays, mapped);
  for (int64_t v = 0; v < attention.calls(); ++v) {
    AttentionCall c = attention.at(v);
    c.out = attention.queries(out, v);
    if (has & HAS_LSE) c.lse = attention.rows(lse, v);
    tile_attention(c, call.threads);
  }
}

// the forward's arrays, out, lse, dout, dlse or none -> dq, dk, dv
void tile_attention_backward_xla(Call& call) {
  const int64_t has = call.integer("has");
  const AttentionArrays arrays(call, has & HAS_SCALES);
  const Buffer out = call.input(), lse = call.input(), dout = call.input();
  const Buffer dlse = has & HAS_LSE ? call.input() : Buffer();
  const Buffer dq = call.output(), dk = call.output(), dv = call.output();
  const Mapped mapped(dq, 4);
  AttentionOf attention(call, arrays, mapped);
  attention.fold({&out, &lse, &dout});
  if (has & HAS_LSE) attention.fold({&dlse});
  for (int64_t v = 0; v < attention.calls(); ++v) {
    AttentionBackwardCall b{};
    AttentionCall& c = b.forward;
    c = attention.at(v);
    require(attention.calls() != 1 || mapped.count() == 1 ||
                (mapped.whole(out) && mapped.whole(lse) && mapped.whole(dout)),
            "gradients must be mapped as the results are");
    c.out = attention.queries(out, v);
    c.lse = attention.rows(lse, v);
    b.dout = attention.queries(dout, v);
    if (has & HAS_LSE) b.dlse = attention.rows(dlse, v);
    b.dq = attention.queries(dq, v);
    b.dk = attention.keys(dk, v);
    b.dv = attention.keys(dv, v);
    tile_attention_backward(b, call.threads);
  }
}

}  // namespace

std::vector<Handler> attention_handlers() {
  return {{"tile_attention", handler<tile_attention_xla>},
          {"tile_attention_backward", handler<tile_attention_backward_xla>}};
}

}  // namespace pydiffuse
