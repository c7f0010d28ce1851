// The backward of tile attention, for products of float32 and of pairs of bfloat16. See attention.h
// for what an item is.
//
// A block of at most 128 queries walks its chunks of 64 keys as in the forward: strips of 6 queries
// give the probabilities and their gradients of the whole block and chunk, and the queries'
// gradient at once; then two transposed products over all rows of the block add to the gradients of
// the chunk's keys and values. Five products, as many as there are: nothing is computed twice.
#pragma once

#include "attention.h"
#include "attention_tile.h"

namespace pydiffuse {
namespace {

// Words and, for pairs, what they are pairs of: a product sums over the pairs' dimension.
template <class Words>
struct BackwardScratch {
  static constexpr bool PAIRS = Words::PAIR == 2;
  float *k_columns, *v_columns;   // [chunks, dim, KEYS], pairs of features
  float* k_rows;                  // [chunks, KEYS, wide], pairs of keys
  float *dk, *dv;                 // [keys, wide]; null where partial sums are kept
  float *queries, *douts;         // [ATTENTION_BLOCK, wide], pairs of features
  float *query_rows, *dout_rows;  // the same in pairs of rows
  float* dqueries;                // [ATTENTION_BLOCK, wide]
  float *lse, *delta;             // [ATTENTION_BLOCK], delta times the scale
  float *p, *ds;                  // [ATTENTION_BLOCK, KEYS], pairs of rows
  float *strip_p, *strip_ds;      // [STRIP, KEYS]: of a strip, singles; then ds in pairs of keys
  float *stage, *row;             // [KEYS, wide], [2, wide]
  float* packed;                  // bytes [chunks]
  int64_t floats;

  BackwardScratch(const AttentionBackwardArgs& a, float* memory) {
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
    query_rows = PAIRS ? w.take(block / 2 * wide) : queries;
    dout_rows = PAIRS ? w.take(block / 2 * wide) : douts;
    dqueries = w.take(block * wide);
    lse = w.take(block);
    delta = w.take(block);
    p = w.take(block * KEYS);
    ds = w.take(block * KEYS);
    strip_p = PAIRS ? w.take(STRIP * KEYS) : nullptr;
    strip_ds = PAIRS ? w.take(STRIP * KEYS) : nullptr;
    stage = w.take(KEYS * wide);
    row = w.take(2 * wide);
    packed = w.take((chunks + 3) / 4);
    floats = w.used;
  }
};

template <class Words>
int64_t backward_scratch(const AttentionBackwardArgs& a) {
  return BackwardScratch<Words>(a, nullptr).floats;
}
int64_t padded_dim(int dim) { return padded(dim); }

// s -> p = exp(scale s - lse), 0 where a key is not seen; dp -> ds = scale p (dp - delta).
template <bool MASKED>
inline void softmax_gradient(float* p, float* ds, int vectors, uint64_t bits, float scale,
                             float lse, float delta) {
  for (int i = 0; i < vectors; ++i) {
    vfloat e = vexp2((scaled(p + i * WIDTH, scale) - lse) * LOG2E);
    vfloat d = e * (load<vfloat>(ds + i * WIDTH) * scale - delta);
    if constexpr (MASKED) {
      e = where_set(bits >> i * WIDTH, e, 0.0f);
      d = where_set(bits >> i * WIDTH, d, 0.0f);
    }
    store(p + i * WIDTH, e);
    store(ds + i * WIDTH, d);
  }
}

#if defined(__AVX512BF16__)
// Rows of singles [count, KEYS] -> pairs of rows [count / 2, KEYS].
inline void pairs_of_rows(const float* from, int64_t count, int before, int vectors, float* to) {
  for (int64_t r = 0; r < count; r += 2, from += 2 * KEYS, to += KEYS)
    for (int i = before; i < before + vectors * WIDTH; i += WIDTH)
      store(to + i, Pairs::pair(load<vfloat>(from + i), load<vfloat>(from + KEYS + i)));
}
// Rows of singles -> pairs of keys, in place.
inline void pairs_of_keys(float* rows, int64_t count, int before, int vectors) {
  for (int64_t r = 0; r < count; ++r, rows += KEYS)
    for (int i = 0; i < vectors; i += 2) {
      const float* from = rows + before + i * WIDTH;
      const vfloat high = i + 1 < vectors ? load<vfloat>(from + WIDTH) : vfloat{};
      store(rows + (before + i * WIDTH) / 2, Pairs::pairs(load<vfloat>(from), high));
    }
}
#endif

// rows: a multiple of PAIR; `real` of them are queries, one more may be zeros.
template <class Words>
void attend(const AttentionCall& c, const BackwardScratch<Words>& s, const Seen& seen, int64_t rows,
            int64_t real, float scale, bool wild_keys, bool wild_rows, float* dk, float* dv) {
  constexpr int PAIR = Words::PAIR;
  const int64_t wide = padded(c.dim), at = seen.chunk * KEYS, dim = c.dim / PAIR;
  const int vectors = seen.vectors(), before = seen.first_vector() * WIDTH;
  const int first = seen.lo / PAIR, keys = (seen.hi + PAIR - 1) / PAIR - first;  // in words
  const int count = seen.hi - seen.lo;
  const float* all = s.k_rows + (at / PAIR + first) * wide;
  const bool careful = wild_keys && seen.words;
  const float* k_rows = careful ? all : own_rows<Words>(all, seen, wide, s.stage);
  uint64_t copied = 0;
  for (int64_t r = 0; r < rows; r += STRIP) {
    const int64_t strip = rows - r < STRIP ? rows - r : STRIP;
    float* p = PAIR == 1 ? s.p + r * KEYS : s.strip_p;
    float* ds = PAIR == 1 ? s.ds + r * KEYS : s.strip_ds;
    uint64_t bits[STRIP];
    product<Words>(s.queries + r * wide, wide, s.k_columns + at * dim + before, KEYS, dim, strip,
                   vectors, p + before, KEYS, false);
    product<Words>(s.douts + r * wide, wide, s.v_columns + at * dim + before, KEYS, dim, strip,
                   vectors, ds + before, KEYS, false);
    for (int64_t i = 0; i < strip; ++i) {
      float *row = p + i * KEYS + before, *grad = ds + i * KEYS + before;
      const float lse = s.lse[r + i], delta = s.delta[r + i];
      if (seen.whole()) {
        softmax_gradient<false>(row, grad, vectors, 0, scale, lse, delta);
      } else {
        bits[i] = r + i < real ? seen.bits(r + i) : 0;
        softmax_gradient<true>(row, grad, vectors, bits[i] >> before, scale, lse, delta);
      }
    }
#if defined(__AVX512BF16__)
    if constexpr (PAIR == 2) {
      pairs_of_rows(p, strip, before, vectors, s.p + r / 2 * KEYS);
      pairs_of_rows(ds, strip, before, vectors, s.ds + r / 2 * KEYS);
      pairs_of_keys(ds, strip, before, vectors);
    }
#endif
    if (careful)
      product_seen<Words>(ds + first, k_rows, seen, bits, strip, wide, s.dqueries + r * wide,
                          s.stage, &copied);
    else
      product<Words>(ds + first, KEYS, k_rows, wide, keys, strip, wide / WIDTH,
                     s.dqueries + r * wide, wide, true);
  }
  if (wild_rows && seen.words) {
    product_seen_transposed<Words>(s.p, s.dout_rows, seen, rows / PAIR, real, wide, dv + at * wide,
                                   s.row);
    product_seen_transposed<Words>(s.ds, s.query_rows, seen, rows / PAIR, real, wide,
                                   dk + at * wide, s.row);
    return;
  }
  const int64_t key = (at + seen.lo) * wide;
  product<Words, true>(s.p + seen.lo, KEYS, s.dout_rows, wide, rows / PAIR, count, wide / WIDTH,
                       dv + key, wide, true);
  product<Words, true>(s.ds + seen.lo, KEYS, s.query_rows, wide, rows / PAIR, count, wide / WIDTH,
                       dk + key, wide, true);
}

// Reads a block's queries and what its rows of scores need; `rows` is `real` and what fills a pair.
// True where a mask must keep one of them out of products.
template <class Words>
bool open_block(const AttentionBackwardCall& call, const BackwardScratch<Words>& s, int64_t b,
                int64_t h, int64_t first, int64_t real, int64_t rows, float scale) {
  const AttentionCall& c = call.forward;
  const int64_t wide = padded(c.dim);
  for (int64_t r = 0; r < real; ++r) {
    const int64_t token = c.plan.token(first + r);
    const int64_t row = (b * c.heads + h) * c.queries + token;
    const int64_t out = c.out.at(b, h, token), dout = call.dout.at(b, h, token);
    read_words<Words>(c.q, c.q.at(b, h, token), c.dim, s.queries + r * wide, wide);
    read_words<Words>(call.dout, dout, c.dim, s.douts + r * wide, wide);
    read_token(c.out, out, c.dim, s.row, wide);
    read_token(call.dout, dout, c.dim, s.row + wide, wide);
    vfloat sum{};
    for (int64_t i = 0; i < wide; i += WIDTH)
      sum += load<vfloat>(s.row + i) * load<vfloat>(s.row + wide + i);
    float delta = 0.0f;
    for (int i = 0; i < WIDTH; ++i) delta += sum[i];
    s.delta[r] = scale * (delta - (call.dlse ? call.dlse[row] : 0.0f));
    const float lse = c.lse[row];  // a row that sees nothing has probabilities of 0
    s.lse[r] = lse == -__builtin_inff() ? __builtin_inff() : lse;
  }
  for (int64_t r = real; r < rows; ++r) {
    std::memset(s.queries + r * wide, 0, wide * sizeof(float));
    std::memset(s.douts + r * wide, 0, wide * sizeof(float));
    s.delta[r] = 0.0f;
    s.lse[r] = __builtin_inff();
  }
  if constexpr (Words::PAIR == 2) {
    interleave(s.queries, rows, wide, s.query_rows);
    interleave(s.douts, rows, wide, s.dout_rows);
  }
  std::memset(s.dqueries, 0, rows * wide * sizeof(float));
  return c.plan.masks &&
         (any_wild<Words>(s.queries, rows * wide) || any_wild<Words>(s.douts, rows * wide));
}

template <class Words>
void backward(const AttentionBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const BackwardScratch<Words> s(a, scratch);
  const AttentionCall& c = a.call.forward;
  const Plan& plan = c.plan;
  const int64_t wide = padded(c.dim), size = c.keys * wide, group = c.heads / c.kv_heads;
  PackedHead<Words> head{{c.k, plan, -1, -1, c.keys, c.dim, s.k_rows, s.k_columns, s.stage},
                         {c.v, plan, -1, -1, c.keys, c.dim, nullptr, s.v_columns, s.stage},
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
      const float scale = c.scale_of(h);
      for (int64_t i = cut[0]; i < cut[1]; ++i) {
        const int32_t* block = plan.q.block + (p * plan.q.blocks + i) * 3;
        const int64_t first = block[1], real = block[2] - first;
        const int64_t rows = (real + Words::PAIR - 1) / Words::PAIR * Words::PAIR;
        const bool wild_rows = open_block(a.call, s, b, h, first, real, rows, scale);
        for_seen(plan, p, block, [&](const Seen& seen) {
          const bool wild_keys = head.need(seen.chunk);
          attend(c, s, seen, rows, real, scale, wild_keys, wild_rows, dk, dv);
        });
        for (int64_t r = 0; r < real; ++r)
          write_token(s.dqueries + r * wide, 1.0f, a.call.dq,
                      a.call.dq.at(b, h, plan.token(first + r)), c.dim);
      }
    }
    if (a.partial) continue;
    for (int64_t i = 0; i < c.keys; ++i) {
      const int64_t token = plan.token(i);
      write_token(dk + i * wide, 1.0f, a.call.dk, a.call.dk.at(b, hk, token), c.dim);
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
      write_token(sum, 1.0f, out, out.at(b, hk, c.plan.token(i)), c.dim);
    }
  }
}

}  // namespace
}  // namespace pydiffuse
