// One call to tile attention on the CPU: blocks of queries to threads in shares of equal work.
// `parallel` as in routing_call.h; it also has threads(), their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "capability.h"
#include "floats.h"

namespace pydiffuse {

// bfloat16 is multiplied as such where the CPU does, else as float32.
inline const AttentionKernels& attention_kernels(DType dtype) {
  const AttentionKernels& pairs = PYDIFFUSE_BEST(attention_bf16);
  return dtype == DType::bf16 && pairs.forward && multiplies_bf16() ? pairs
                                                                    : PYDIFFUSE_BEST(attention);
}
// Fewer key heads than this are cut into parts in the backward, for the threads; whatever the
// batch, so that a sample's bits do not depend on it.
constexpr int64_t BACKWARD_ITEMS = 8;

// The pairs of query and key that a plan head's blocks compute, summed up: [blocks + 1].
inline std::vector<int64_t> work_of(const Plan& plan, int64_t plan_head) {
  const PlanSide& q = plan.q;
  const int32_t* starts = q.starts + plan_head * (q.tiles + 1);
  std::vector<int64_t> seen(q.tiles), sums(q.blocks + 1);
  for (int64_t t = 0; t < q.tiles; ++t)
    for (int32_t s = starts[t]; s < starts[t + 1]; ++s)
      seen[t] += q.span[3 * int64_t(s) + 1] - q.span[3 * int64_t(s)];
  for (int64_t i = 0; i < q.blocks; ++i) {
    const int32_t* block = q.block + (plan_head * q.blocks + i) * 3;
    // A row costs something also where it sees nothing.
    sums[i + 1] = sums[i] + (block[2] - block[1]) * (seen[block[0]] + 1);
  }
  return sums;
}

template <class Parallel>
void tile_attention(const AttentionCall& c, const Parallel& parallel) {
  const int64_t blocks = c.plan.q.blocks, heads = c.batch * c.heads;
  if (!heads || !blocks) return;
  std::vector<std::vector<int64_t>> work;
  for (int64_t p = 0; p < c.plan.heads; ++p) work.push_back(work_of(c.plan, p));
  int64_t total = 0;
  for (int64_t h = 0; h < c.heads; ++h) total += work[c.plan_head(h)].back();
  total *= c.batch;

  // Item i goes to the share in which the work before it ends.
  const int64_t shares = std::min<int64_t>(parallel.threads(), heads * blocks);
  std::vector<int64_t> cuts(1, 0);
  int64_t before = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const auto& sums = work[c.plan_head(head % c.heads)];
    while (static_cast<int64_t>(cuts.size()) < shares) {
      const int64_t want = static_cast<int64_t>(double(total) * double(cuts.size()) / shares);
      if (want - before >= sums.back()) break;
      const auto at = std::lower_bound(sums.begin(), sums.end(), want - before) - sums.begin();
      cuts.push_back(head * blocks + at);
    }
    before += sums.back();
  }
  cuts.resize(shares + 1, heads * blocks);
  const auto& kernels = attention_kernels(c.q.dtype);
  parallel(shares, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(kernels.forward_scratch(c));
    kernels.forward(c, cuts[begin], cuts[end], scratch.data());
  });
}

template <class Parallel>
void tile_attention_backward(const AttentionBackwardCall& call, const Parallel& parallel) {
  const AttentionCall& c = call.forward;
  const int64_t key_heads = c.batch * c.kv_heads;
  if (!key_heads || !c.keys) return;
  const auto& kernels = attention_kernels(c.q.dtype);
  const int64_t blocks = c.plan.q.blocks;
  const int64_t parts = std::clamp<int64_t>((BACKWARD_ITEMS + c.kv_heads - 1) / c.kv_heads, 1,
                                            std::max<int64_t>(1, blocks));
  std::vector<int64_t> cuts;
  for (int64_t p = 0; p < c.plan.heads; ++p) {
    const auto sums = work_of(c.plan, p);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t want = static_cast<int64_t>(double(sums.back()) * double(part) / parts);
      cuts.push_back(std::lower_bound(sums.begin(), sums.end(), want) - sums.begin());
    }
    cuts.push_back(blocks);
  }
  const int64_t row = kernels.padded(c.dim);
  const Floats partial(parts > 1 ? key_heads * parts * 2 * c.keys * row : 0);
  const AttentionBackwardArgs a{call, parts, cuts.data(), parts > 1 ? partial.data() : nullptr};
  parallel(key_heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(kernels.backward_scratch(a));
    kernels.backward(a, begin, end, scratch.data());
  });
  if (parts == 1) return;
  parallel(key_heads * 2, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(row);
    kernels.reduce(a, begin, end, scratch.data());
  });
}

}  // namespace pydiffuse
