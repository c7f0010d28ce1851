// A plan of tile attention, unpacked and checked before memory is touched.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../attention.h"

namespace pydiffuse {

// What the kernels would read out of bounds, in words; null where all is well. `other` is the
// length of the side that is seen.
inline const char* bad_side(const PlanSide& s, const Plan& plan, int64_t length, int64_t other) {
  if (s.tiles < 1 || s.bounds[0] != 0 || s.bounds[s.tiles] != length)
    return "bounds must rise from 0 to the number of tokens";
  for (int64_t t = 0; t < s.tiles; ++t)
    if (s.bounds[t] >= s.bounds[t + 1]) return "bounds must rise from 0 to the number of tokens";
  for (int64_t p = 0; p < plan.heads; ++p) {
    const int32_t* starts = s.starts + p * (s.tiles + 1);
    for (int64_t t = 0; t < s.tiles; ++t)
      if (starts[t] < 0 || starts[t] > starts[t + 1] || starts[t + 1] > s.spans)
        return "starts must rise within the spans";
    for (int64_t i = 0; i < s.blocks; ++i) {
      const int32_t* b = s.block + (p * s.blocks + i) * 3;
      if (b[0] < 0 || b[0] >= s.tiles || b[1] < s.bounds[b[0]] || b[2] > s.bounds[b[0] + 1] ||
          b[1] >= b[2] || b[2] - b[1] > ATTENTION_BLOCK)
        return "blocks must lie within their tiles and have 1 to 128 rows";
    }
  }
  for (int64_t i = 0; i < s.spans; ++i) {
    const int32_t* span = s.span + 3 * i;
    if (span[0] < 0 || span[0] >= span[1] || span[1] > other || span[2] < FULL ||
        span[2] >= plan.masks)
      return "spans must lie within the tokens, their masks within the masks";
  }
  return nullptr;
}

// Every row must be in one block, or an output would stay unwritten or be written twice.
inline const char* bad_blocks(const PlanSide& s, const Plan& plan, int64_t length) {
  std::vector<char> seen(length);
  for (int64_t p = 0; p < plan.heads; ++p) {
    std::fill(seen.begin(), seen.end(), 0);
    int64_t rows = 0;
    for (int64_t i = 0; i < s.blocks; ++i) {
      const int32_t* b = s.block + (p * s.blocks + i) * 3;
      const int64_t count = b[2] - b[1];
      if (std::memchr(seen.data() + b[1], 1, count)) return "blocks must cover each row once";
      std::memset(seen.data() + b[1], 1, count);
      rows += count;
    }
    if (rows != length) return "blocks must cover each row once";
  }
  return nullptr;
}

inline const char* bad_order(const int32_t* order, int64_t length) {
  std::vector<char> seen(length);
  for (int64_t i = 0; i < length; ++i) {
    if (order[i] < 0 || order[i] >= length || seen[order[i]]) return "order must be a permutation";
    seen[order[i]] = 1;
  }
  return nullptr;
}

// Every mask that a tile of queries names must have its words.
inline const char* bad_masks(const Plan& plan) {
  for (int64_t p = 0; p < plan.heads; ++p)
    for (int64_t t = 0; t < plan.q.tiles; ++t)
      for (int32_t i = plan.q.starts[p * (plan.q.tiles + 1) + t];
           i < plan.q.starts[p * (plan.q.tiles + 1) + t + 1]; ++i) {
        const int32_t* span = plan.q.span + 3 * int64_t(i);
        if (span[2] == FULL) continue;
        const int64_t rows = plan.q.bounds[t + 1] - plan.q.bounds[t];
        const int64_t at = plan.mask_at[span[2]], size = rows * ((span[1] - span[0] + 31) / 32);
        if (at < 0 || at > plan.words - size) return "masks must lie within the words";
      }
  return nullptr;
}

inline const char* bad_plan(const Plan& plan, int64_t queries, int64_t keys) {
  const char* bad = bad_side(plan.q, plan, queries, keys);
  if (!bad) bad = bad_side(plan.k, plan, keys, queries);
  if (!bad) bad = bad_blocks(plan.q, plan, queries);
  if (!bad) bad = bad_masks(plan);
  if (!bad && plan.order && keys != queries) bad = "an order is for as many keys as queries";
  if (!bad && plan.order) bad = bad_order(plan.order, queries);
  return bad;
}

// A plan in one array of int32, as pydiffuse/_core/spans.py packs it: 12 sizes, then the arrays one
// after the other. False where they do not fill it.
inline bool unpacked(const int32_t* packed, int64_t size, Plan* plan) {
  constexpr int HEAD = 12;
  if (size < HEAD) return false;
  const int32_t *head = packed, *at = head + HEAD, *end = head + size;
  for (int i = 0; i < HEAD; ++i)
    if (head[i] < 0) return false;
  bool fits = true;
  const auto take = [&](int64_t count, int64_t rows = 1) {
    const int32_t* mine = at;
    fits = fits && (rows == 0 || count <= (end - at) / rows);
    if (fits) at += count * rows;
    return mine;
  };
  plan->heads = head[0];
  plan->masks = head[1], plan->words = head[2];
  plan->mask_at = reinterpret_cast<const int64_t*>(take(2 * plan->masks));
  for (PlanSide* side : {&plan->q, &plan->k}) {
    const int32_t* sizes = head + (side == &plan->q ? 4 : 7);
    side->tiles = sizes[0], side->spans = sizes[1], side->blocks = sizes[2];
    side->bounds = take(side->tiles + 1);
    side->starts = take(side->tiles + 1, plan->heads);
    side->span = take(3 * side->spans);
    side->block = take(3 * side->blocks, plan->heads);
  }
  plan->word = take(plan->words);
  plan->order = head[3] ? take(head[3]) : nullptr;
  return fits && at == end && (!plan->order || head[3] == plan->q.bounds[plan->q.tiles]);
}

}  // namespace pydiffuse
