// The backward of tile attention. See csrc/cpu/attention.h for what an item is.
//
// A block of at most 128 queries walks its chunks of 64 keys as in the forward: strips of 6 queries
// give the probabilities and their gradients of the whole block and chunk, and the queries'
// gradient at once; then two transposed products over all rows of the block add to the gradients of
// the chunk's keys and values. Five products, as many as there are: nothing is computed twice.
#include "attention.h"
#include "attention_tile.h"

namespace pydiffuse {
namespace {

struct Scratch {
  float *k_columns, *k_rows, *v_columns;     // packed
  float *dk, *dv;                            // [keys, wide]; null where partial sums are kept
  float *queries, *douts, *dqueries, *outs;  // [ATTENTION_BLOCK, wide]; outs: one row
  float *lse, *delta;                        // [ATTENTION_BLOCK], lse in base 2
  float *probabilities, *gradients;          // [ATTENTION_BLOCK, KEYS]
  float* packed;                             // bytes [chunks]
  int64_t floats;

  Scratch(const AttentionBackwardArgs& a, float* memory) {
    const AttentionCall& c = a.call.forward;
    const int64_t chunks = chunks_of(c.keys), wide = padded(c.dim), block = ATTENTION_BLOCK;
    Workspace w{memory};
    k_columns = w.take(chunks * KEYS * c.dim);
    v_columns = w.take(chunks * KEYS * c.dim);
    k_rows = w.take(chunks * KEYS * wide);
    dk = a.partial ? nullptr : w.take(c.keys * wide);
    dv = a.partial ? nullptr : w.take(c.keys * wide);
    queries = w.take(block * wide);
    douts = w.take(block * wide);
    dqueries = w.take(block * wide);
    outs = w.take(KEYS * wide);
    lse = w.take(block);
    delta = w.take(block);
    probabilities = w.take(block * KEYS);
    gradients = w.take(block * KEYS);
    packed = w.take((chunks + 3) / 4);
    floats = w.used;
  }
};

int64_t scratch_floats(const AttentionBackwardArgs& a) { return Scratch(a, nullptr).floats; }
int64_t padded_dim(int dim) { return padded(dim); }

// scores -> p = exp2(scores - lse), 0 where a key is not seen; dp -> ds = p (dp - delta).
template <bool MASKED>
inline void softmax_gradient(float* p, float* ds, int vectors, uint64_t bits, float lse,
                             float delta) {
  for (int i = 0; i < vectors; ++i) {
    vfloat e = vexp2(load<vfloat>(p + i * WIDTH) - lse);
    vfloat d = e * (load<vfloat>(ds + i * WIDTH) - delta);
    if constexpr (MASKED) {
      e = where_set(bits >> i * WIDTH, e, 0.0f);
      d = where_set(bits >> i * WIDTH, d, 0.0f);
    }
    store(p + i * WIDTH, e);
    store(ds + i * WIDTH, d);
  }
}

void attend(const AttentionCall& c, const Scratch& s, const Seen& seen, int64_t rows, float* dk,
            float* dv) {
  const int64_t wide = padded(c.dim), at = seen.chunk * KEYS;
  const int first = seen.first_vector(), vectors = seen.vectors(), before = first * WIDTH;
  const int count = seen.hi - seen.lo;
  for (int64_t r = 0; r < rows; r += STRIP) {
    const int64_t strip = rows - r < STRIP ? rows - r : STRIP;
    float *p = s.probabilities + r * KEYS, *ds = s.gradients + r * KEYS;
    product<false>(s.queries + r * wide, wide, s.k_columns + at * c.dim + before, KEYS, c.dim,
                   strip, vectors, p + before, KEYS, false);
    product<false>(s.douts + r * wide, wide, s.v_columns + at * c.dim + before, KEYS, c.dim, strip,
                   vectors, ds + before, KEYS, false);
    for (int64_t i = 0; i < strip; ++i) {
      float *row = p + i * KEYS + before, *grad = ds + i * KEYS + before;
      const float lse = s.lse[r + i], delta = s.delta[r + i];
      if (seen.whole())
        softmax_gradient<false>(row, grad, vectors, 0, lse, delta);
      else
        softmax_gradient<true>(row, grad, vectors, seen.bits(r + i) >> before, lse, delta);
    }
    product<false>(ds + seen.lo, KEYS, s.k_rows + (at + seen.lo) * wide, wide, count, strip,
                   wide / WIDTH, s.dqueries + r * wide, wide, true);
  }
  const int64_t key = (at + seen.lo) * wide;
  product<true>(s.probabilities + seen.lo, KEYS, s.douts, wide, rows, count, wide / WIDTH, dv + key,
                wide, true);
  product<true>(s.gradients + seen.lo, KEYS, s.queries, wide, rows, count, wide / WIDTH, dk + key,
                wide, true);
}

// Reads a block's queries and what its rows of scores need.
void open_block(const AttentionBackwardCall& call, const Scratch& s, int64_t b, int64_t h,
                int64_t first, int64_t rows) {
  const AttentionCall& c = call.forward;
  const int64_t wide = padded(c.dim);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = c.plan.token(first + r);
    const int64_t row = (b * c.heads + h) * c.queries + token;
    read_token(c.q, c.q.at(b, h, token), c.dim, c.scale_of(h) * LOG2E, s.queries + r * wide, wide);
    read_token(call.dout, call.dout.at(b, h, token), c.dim, 1.0f, s.douts + r * wide, wide);
    read_token(c.out, c.out.at(b, h, token), c.dim, 1.0f, s.outs, wide);
    vfloat sum{};
    for (int64_t i = 0; i < wide; i += WIDTH)
      sum += load<vfloat>(s.outs + i) * load<vfloat>(s.douts + r * wide + i);
    float delta = 0.0f;
    for (int i = 0; i < WIDTH; ++i) delta += sum[i];
    s.delta[r] = delta - (call.dlse ? call.dlse[row] : 0.0f);
    const float lse = c.lse[row];  // a row that sees nothing has probabilities of 0
    s.lse[r] = lse == -__builtin_inff() ? __builtin_inff() : lse * LOG2E;
  }
  std::memset(s.dqueries, 0, rows * wide * sizeof(float));
}

void backward(const AttentionBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Scratch s(a, scratch);
  const AttentionCall& c = a.call.forward;
  const Plan& plan = c.plan;
  const int64_t wide = padded(c.dim), size = c.keys * wide, group = c.heads / c.kv_heads;
  PackedHead head{{c.k, plan, -1, -1, c.keys, c.dim, s.k_rows, s.k_columns, nullptr},
                  {c.v, plan, -1, -1, c.keys, c.dim, nullptr, s.v_columns, s.outs},
                  reinterpret_cast<uint8_t*>(s.packed)};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % a.parts, key_head = item / a.parts;
    const int64_t b = key_head / c.kv_heads, hk = key_head % c.kv_heads;
    float* dk = a.partial ? a.partial + item * 2 * size : s.dk;
    float* dv = a.partial ? dk + size : s.dv;
    std::memset(dk, 0, size * sizeof(float));
    std::memset(dv, 0, size * sizeof(float));
    head.open(b, hk);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      const int64_t p = c.plan_head(h);
      const int64_t* cut = a.cuts + p * (a.parts + 1) + part;
      for (int64_t i = cut[0]; i < cut[1]; ++i) {
        const int32_t* block = plan.q.block + (p * plan.q.blocks + i) * 3;
        const int64_t first = block[1], rows = block[2] - first;
        open_block(a.call, s, b, h, first, rows);
        for_seen(plan, p, block, [&](const Seen& seen) {
          head.need(seen.chunk);
          attend(c, s, seen, rows, dk, dv);
        });
        for (int64_t r = 0; r < rows; ++r)
          write_token(s.dqueries + r * wide, c.scale_of(h), a.call.dq,
                      a.call.dq.at(b, h, plan.token(first + r)), c.dim);
      }
    }
    if (a.partial) continue;
    for (int64_t i = 0; i < c.keys; ++i) {
      const int64_t token = plan.token(i);
      write_token(dk + i * wide, 1.0f / LOG2E, a.call.dk, a.call.dk.at(b, hk, token), c.dim);
      write_token(dv + i * wide, 1.0f, a.call.dv, a.call.dv.at(b, hk, token), c.dim);
    }
  }
}

void reduce(const AttentionBackwardArgs& a, int64_t begin, int64_t end, float* sum) {
  const AttentionCall& c = a.call.forward;
  const int64_t wide = padded(c.dim), size = c.keys * wide;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t which = item % 2, key_head = item / 2;
    const int64_t b = key_head / c.kv_heads, hk = key_head % c.kv_heads;
    const Heads& out = which ? a.call.dv : a.call.dk;
    const float* parts = a.partial + (key_head * a.parts * 2 + which) * size;
    for (int64_t i = 0; i < c.keys; ++i) {
      for (int64_t j = 0; j < wide; j += WIDTH) {
        vfloat v = load<vfloat>(parts + i * wide + j);
        for (int64_t part = 1; part < a.parts; ++part)
          v += load<vfloat>(parts + part * 2 * size + i * wide + j);
        store(sum + j, v);
      }
      write_token(sum, which ? 1.0f : 1.0f / LOG2E, out, out.at(b, hk, c.plan.token(i)), c.dim);
    }
  }
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(AttentionBackwardKernels, attention_backward) = {
    pydiffuse::scratch_floats, pydiffuse::padded_dim, pydiffuse::backward, pydiffuse::reduce};
