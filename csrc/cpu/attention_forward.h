// The forward of tile attention, for products of float32 and of pairs of bfloat16. See attention.h
// for what an item is.
//
// A block of at most 128 queries walks its chunks of 64 keys; per chunk, strips of 6 queries:
// scores by one product, their exponentials, and the sum of values by a second product, onto sums
// that stay in the first cache.
#pragma once

#include "attention.h"
#include "attention_tile.h"

namespace pydiffuse {
namespace {

// A row's reference point moves only when its scores outgrow it by this much: sums are rescaled in
// the first chunk and nearly never again. exp(7) is far from what float32 overflows at.
constexpr float SLACK = 7.0f;

struct ForwardScratch {
  float *columns, *values;  // packed keys [chunks, dim, KEYS], values [chunks, KEYS, wide]
  float* queries;           // [ATTENTION_BLOCK, dim]
  float* sums;              // [ATTENTION_BLOCK, wide]
  float* totals;            // [ATTENTION_BLOCK, WIDTH]: of exponentials, lane by lane
  float* reference;         // [ATTENTION_BLOCK]
  float* scores;            // [STRIP, KEYS]
  float* stage;             // [KEYS, wide]
  float* packed;            // bytes [chunks]
  int64_t floats;

  ForwardScratch(const AttentionCall& c, float* memory) {
    const int64_t chunks = chunks_of(c.keys), wide = padded(c.dim), block = ATTENTION_BLOCK;
    Workspace w{memory};
    columns = w.take(chunks * KEYS * c.dim);
    values = w.take(chunks * KEYS * wide);
    queries = w.take(block * c.dim);
    sums = w.take(block * wide);
    totals = w.take(block * WIDTH);
    reference = w.take(block);
    scores = w.take(STRIP * KEYS);
    stage = w.take(KEYS * wide);
    packed = w.take((chunks + 3) / 4);
    floats = w.used;
  }
};

int64_t forward_scratch(const AttentionCall& c) { return ForwardScratch(c, nullptr).floats; }

// Moves a row's reference point to its largest score; NaN is passed over.
__attribute__((noinline)) void move_reference(vfloat high, float* reference, float* totals,
                                              float* sums, int64_t wide) {
  const float from = *reference;
  float to = from;
  for (int i = 0; i < WIDTH; ++i) to = high[i] > to ? high[i] : to;
  *reference = to;
  if (from == -__builtin_inff()) return;  // its sums are zeros, still
  const vfloat factor = vexp2(splat((from - to) * LOG2E));
  store(totals, load<vfloat>(totals) * factor);
  for (int64_t i = 0; i < wide; i += WIDTH) store(sums + i, load<vfloat>(sums + i) * factor);
}

struct Row {  // what a query carries from chunk to chunk
  float *reference, *totals, *sums;
};

// scores [vectors WIDTH] -> exp(scale scores - reference) as words, 0 where a key is not seen.
template <class Words, bool MASKED>
inline void exponentials(float* scores, int vectors, uint64_t bits, float scale, const Row& row,
                         int64_t wide) {
  const float none = -__builtin_inff();
  vfloat s[KEY_VECTORS], high = splat(none);
  for (int i = 0; i < vectors; ++i) {
    s[i] = scaled(scores + i * WIDTH, scale);
    if constexpr (MASKED) s[i] = where_set(bits >> i * WIDTH, s[i], none);
    high = s[i] > high ? s[i] : high;
  }
  const auto outgrown = high > *row.reference + SLACK;
  bool moves = false;
#if defined(__AVX512F__)
  moves = _mm512_test_epi32_mask((__m512i)outgrown, (__m512i)outgrown);
#else
  for (int i = 0; i < WIDTH; ++i) moves |= outgrown[i] != 0;
#endif
  if (__builtin_expect(moves, 0)) move_reference(high, row.reference, row.totals, row.sums, wide);
  const float m = *row.reference == none ? 0.0f : *row.reference;
  vfloat total = load<vfloat>(row.totals);
  for (int i = 0; i < vectors; ++i) {
    s[i] = vexp2((s[i] - m) * LOG2E);
    total += s[i];
    if constexpr (Words::PAIR == 1) store(scores + i * WIDTH, s[i]);
  }
  if constexpr (Words::PAIR == 2) {
    if (vectors % 2) s[vectors] = vfloat{};
    for (int i = 0; i < vectors; i += 2)
      store(scores + i / 2 * WIDTH, Words::pairs(s[i], s[i + 1]));
  }
  store(row.totals, total);
}

template <class Words>
void attend(const AttentionCall& c, const ForwardScratch& s, const Seen& seen, int64_t rows,
            float scale, bool wild) {
  constexpr int PAIR = Words::PAIR;
  const int64_t wide = padded(c.dim), dim = c.dim / PAIR;
  const int vectors = seen.vectors(), before = seen.first_vector() * WIDTH;
  const int first = seen.lo / PAIR, keys = (seen.hi + PAIR - 1) / PAIR - first;  // in words
  const float* columns = s.columns + seen.chunk * KEYS * dim + before;
  const float* all = s.values + (seen.chunk * KEYS / PAIR + first) * wide;
  const bool careful = wild && seen.words;
  const float* values = careful ? all : own_rows<Words>(all, seen, wide, s.stage);
  uint64_t copied = 0;
  for (int64_t r = 0; r < rows; r += STRIP) {
    const int64_t count = rows - r < STRIP ? rows - r : STRIP;
    uint64_t bits[STRIP], any = 0;
    if (!seen.whole()) {
      for (int64_t i = 0; i < count; ++i) any |= bits[i] = seen.bits(r + i);
      if (!any) continue;
    }
    product<Words>(s.queries + r * dim, dim, columns, KEYS, dim, count, vectors, s.scores, KEYS,
                   false);
    for (int64_t i = 0; i < count; ++i) {
      float* scores = s.scores + i * KEYS;
      const Row row{s.reference + r + i, s.totals + (r + i) * WIDTH, s.sums + (r + i) * wide};
      if (seen.whole())
        exponentials<Words, false>(scores, vectors, 0, scale, row, wide);
      else
        exponentials<Words, true>(scores, vectors, bits[i] >> before, scale, row, wide);
    }
    const float* weights = s.scores + first - before / PAIR;
    if (careful)
      product_seen<Words>(weights, values, seen, bits, count, wide, s.sums + r * wide, s.stage,
                          &copied);
    else
      product<Words>(weights, KEYS, values, wide, keys, count, wide / WIDTH, s.sums + r * wide,
                     wide, true);
  }
}

template <class Words>
void forward(const AttentionCall& c, int64_t begin, int64_t end, float* scratch) {
  const ForwardScratch s(c, scratch);
  const Plan& plan = c.plan;
  const int64_t wide = padded(c.dim), dim = c.dim / Words::PAIR;
  PackedHead<Words> head{{c.k, plan, -1, -1, c.keys, c.dim, nullptr, s.columns, s.stage},
                         {c.v, plan, -1, -1, c.keys, c.dim, s.values, nullptr, s.stage},
                         reinterpret_cast<uint8_t*>(s.packed)};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / plan.q.blocks / c.heads, h = item / plan.q.blocks % c.heads;
    const int64_t p = c.plan_head(h);
    const int32_t* block = plan.q.block + (p * plan.q.blocks + item % plan.q.blocks) * 3;
    const int64_t first = block[1], rows = block[2] - first;
    const float scale = c.scale_of(h);
    for (int64_t r = 0; r < rows; ++r) {
      read_words<Words>(c.q, c.q.at(b, h, plan.token(first + r)), c.dim, s.queries + r * dim, dim);
      s.reference[r] = -__builtin_inff();
    }
    std::memset(s.sums, 0, rows * wide * sizeof(float));
    std::memset(s.totals, 0, rows * WIDTH * sizeof(float));
    head.open(b, c.kv_head(h));
    for_seen(plan, p, block, [&](const Seen& seen) {
      const bool wild = head.need(seen.chunk);
      attend<Words>(c, s, seen, rows, scale, wild);
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = plan.token(first + r);
      float total = 0.0f;
      for (int i = 0; i < WIDTH; ++i) total += s.totals[r * WIDTH + i];
      write_token(s.sums + r * wide, total == 0.0f ? 0.0f : 1.0f / total, c.out,
                  c.out.at(b, h, token), c.dim);
      if (c.lse) {
        const float m = s.reference[r];  // infinite where a score is: the total is no number then
        c.lse[(b * c.heads + h) * c.queries + token] =
            m == __builtin_inff() ? m : m + __builtin_logf(total);
      }
    }
  }
}

int64_t floor_scratch(int dim) { return (STRIP + KEYS) * padded(dim) + STRIP * KEYS; }

template <class Words>
void floor(int dim, int products, int exponentials, int64_t strips, float* scratch) {
  float *a = scratch, *b = a + STRIP * padded(dim), *c = b + KEYS * padded(dim);
  for (int64_t i = 0; i < strips; ++i) {
    for (int n = 0; n < products; ++n)
      product<Words>(a, dim / Words::PAIR, b, KEYS, dim / Words::PAIR, STRIP, KEY_VECTORS, c, KEYS,
                     false);
    for (int n = 0; n < exponentials; ++n)
      for (int j = 0; j < STRIP * KEYS; j += WIDTH) store(c + j, vexp2(load<vfloat>(c + j)));
  }
}

}  // namespace
}  // namespace pydiffuse
