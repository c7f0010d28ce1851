// Tile attention on NumPy arrays.
#include "../cpu/attention_call.h"
#include "../cpu/attention_plan.h"
#include "arrays.h"

namespace pydiffuse {
namespace {

// [batch, heads, tokens, dim], a token's features side by side; the other strides are whole
// elements, forwards.
Heads heads_of(const Array& a, const Ints& shape, DType dtype, bool written = false) {
  require(has_shape(a, shape) && dtype_of(a) == dtype, "q, k, v and out do not fit together");
  require(!written || a.writeable(), "an array to write to is read-only");
  const Ints s = strides_of(a);
  require(a.size() == 0 || s[3] == 1, "a token's features must lie side by side");
  return {memory_anyhow(a), {s[0], s[1], s[2]}, dtype};
}

// out, q: [B, H, S, D]; k, v: [B, Hk, Sk, D]; lse: [B, H, S]; scales: [H]; packed: the plan.
void tile_attention_arrays(const Array& out, const MaybeArray& lse, const Array& q, const Array& k,
                           const Array& v, const MaybeArray& scales, double scale,
                           const Array& packed) {
  require(q.ndim() == 4 && k.ndim() == 4, "q and k must be [B, H, S, D]");
  AttentionCall c{};
  c.batch = q.shape(0), c.heads = q.shape(1), c.queries = q.shape(2);
  c.kv_heads = k.shape(1), c.keys = k.shape(2);
  const int64_t dim = q.shape(3);
  require(dim >= 8 && dim % 8 == 0 && dim <= MAX_HEAD_DIM, "dim must be a multiple of 8 up to 256");
  require(c.kv_heads > 0 && c.heads % c.kv_heads == 0, "k's heads must divide q's");
  c.dim = static_cast<int>(dim);
  const DType dtype = dtype_of(q);
  const Ints queries{c.batch, c.heads, c.queries, dim}, keys{c.batch, c.kv_heads, c.keys, dim};
  c.q = heads_of(q, queries, dtype);
  c.k = heads_of(k, keys, dtype);
  c.v = heads_of(v, keys, dtype);
  c.out = heads_of(out, queries, dtype, true);
  c.lse = plane<float>(lse, {c.batch, c.heads, c.queries});
  c.scales = plane<const float>(scales, {c.heads});
  c.scale = static_cast<float>(scale);
  const int64_t size = packed.size();
  require(unpacked(plane<const int32_t>(packed, {size}), size, &c.plan), "the plan is damaged");
  require(c.plan.heads == 1 || c.plan.heads == c.heads, "the plan is for another number of heads");
  const char* bad = bad_plan(c.plan, c.queries, c.keys);
  require(!bad, bad);
  unlocked([&] { tile_attention(c, HostThreads()); });
}

}  // namespace

void bind_attention(py::module_& m) { m.def("tile_attention", &tile_attention_arrays); }

}  // namespace pydiffuse
