// Which patches advance, and where the dual loop takes all of them, compiled once per instruction
// set. An item is a sample: its row belongs to one thread, lanes are neighbouring patches.
#include <algorithm>

#include "patch.h"
#include "simd.h"

namespace pydiffuse {
namespace {

constexpr int64_t TILE = PATCH_TILE;

// Scores as integers in the same order: -0 is 0, NaN is below all numbers.
inline uint32_t key_of(float score) {
  const uint32_t u = float_to_bits(score + 0.0f);
  const uint32_t key = u >> 31 ? ~u : u | 0x80000000u;
  return score != score ? 0 : key;
}

int64_t count(const uint32_t* key, int64_t n, uint32_t least) {
  int64_t total = 0;
  for (int64_t start = 0; start < n; start += TILE) {
    int32_t part = 0;
    for (int64_t i = start; i < std::min(start + TILE, n); ++i) part += key[i] >= least;
    total += part;
  }
  return total;
}

// Replaces the keys of a sample by 1 where a patch is chosen and by 0 where not. The k-th highest
// key is found bit by bit, each from a count over all keys, until exactly k are as high.
void choose(uint32_t* __restrict key, int64_t n, int64_t k) {
  uint32_t least = 0;
  int64_t as_high = n;
  for (int bit = 31; bit >= 0 && as_high != k; --bit) {
    const uint32_t more = least | uint32_t(1) << bit;
    const int64_t seen = count(key, n, more);
    if (seen >= k) least = more, as_high = seen;
  }
  if (as_high == k) {
    for (int64_t i = 0; i < n; ++i) key[i] = key[i] >= least;
    return;
  }
  // Of those equal to the least, the first.
  int64_t ties = k - (least == ~uint32_t(0) ? 0 : count(key, n, least + 1));
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = key[i] == least;
    key[i] = (key[i] > least) | (equal & (ties > 0));
    ties -= equal;
  }
}

// A stretch of a sample's row: where it lies, or a copy.
const float* stretch(const Table& table, int64_t sample, int64_t start, int64_t n, float* to) {
  const float* from = table.data + sample * table.stride[0] + start * table.stride[1];
  if (table.stride[1] == 1) return from;
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * table.stride[1]];
  return to;
}

// Chosen patches are at t + dt after the first part, the others in equal parts.
void lay_levels(const SelectCall& a, int64_t sample, const uint32_t* chosen) {
  alignas(64) float scratch[2][TILE];
  for (int64_t start = 0; start < a.patches; start += TILE) {
    const int64_t n = std::min(TILE, a.patches - start);
    const float* t = stretch(a.t, sample, start, n, scratch[0]);
    const float* dt = stretch(a.dt, sample, start, n, scratch[1]);
    for (int64_t part = 0; part < a.parts; ++part) {
      float* __restrict to = a.levels + (part * a.batch + sample) * a.patches + start;
      const uint32_t last = part + 1 == a.parts;
      const float share = float(part + 1) / float(a.parts);
      for (int64_t i = 0; i < n; ++i) {
        const float sum = t[i] + dt[i], goal = sum > 1.0f ? 1.0f : sum;
        const float along = t[i] + (goal - t[i]) * share;
        to[i] = (last | chosen[start + i]) || !(along < goal) ? goal : along;
      }
    }
  }
}

void select_sample(const SelectCall& a, int64_t sample) {
  const float* score = a.score + sample * a.patches;
  uint32_t* __restrict chosen = a.chosen + sample * a.patches;
  for (int64_t i = 0; i < a.patches; ++i) chosen[i] = key_of(score[i]);
  choose(chosen, a.patches, a.k);
  if (a.mask) {
    uint8_t* __restrict mask = a.mask + sample * a.patches;
    for (int64_t i = 0; i < a.patches; ++i) mask[i] = uint8_t(chosen[i]);
  }
  if (a.levels) lay_levels(a, sample, chosen);
  if (!a.ids && !a.rest) return;  // one of them is empty where k is 0 or all
  int64_t *id = a.ids + sample * a.k, *other = a.rest + sample * (a.patches - a.k);
  for (int64_t i = 0; i < a.patches; ++i) {
    // Spelled out as arithmetic: a branch on what is chosen is guessed wrong every other time.
    const auto to = reinterpret_cast<uintptr_t>(id), or_to = reinterpret_cast<uintptr_t>(other);
    *reinterpret_cast<int64_t*>(or_to ^ ((to ^ or_to) & -uintptr_t(chosen[i]))) = i;
    id += chosen[i];
    other += 1 - chosen[i];
  }
}

void select(const SelectCall& a, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) select_sample(a, sample);
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(PatchSelectKernels, patch_select) = {pydiffuse::select};
