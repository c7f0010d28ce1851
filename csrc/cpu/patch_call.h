// One patch call on the CPU, in items. Both bindings may go through here; each brings its own way
// to split a range over threads: parallel(end, grain, f) calls f(begin, end) over pieces of [0,
// end), `grain` or more at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "capability.h"
#include "patch.h"

namespace pydiffuse {

inline const PatchKernels& patch_kernels() { return PYDIFFUSE_BEST(patch); }

// Elements that make a thread worth waking.
constexpr int64_t PATCH_GRAIN = 32768;
inline int64_t patch_grain(int64_t elements_of_item) {
  return std::max<int64_t>(1, PATCH_GRAIN / std::max<int64_t>(1, elements_of_item));
}
inline int64_t strip_elements(const Grid& g, int64_t columns) {
  return g.channels * g.patch[0] * g.patch[1] * columns;
}

template <class Parallel>
void mix_patches(const MixPatchesCall& call, Parallel&& parallel) {
  const Grid& g = call.grid;
  MixPatchesArgs a{call, PATCH_TILE, 0, 1, 0, false, true};
  if (g.patch[2] <= PATCH_TILE)
    a.width = PATCH_TILE / std::max<int64_t>(1, g.patch[2]) * g.patch[2];
  a.stretches = a.width ? (g.size[2] + a.width - 1) / a.width : 0;
  if (a.stretches == 1) {
    a.width = g.size[2];
    a.height = std::max<int64_t>(1, std::min(PATCH_TILE / g.size[2], g.across(1)));
  }
  a.strips = (g.across(1) + a.height - 1) / a.height;
  a.stream = call.batch * g.elements() * bytes_of(call.out[0].dtype) >= STREAM_BYTES;
  for (int j = 0; j < call.outs; ++j)
    for (int m = 0; m < call.terms; ++m)
      a.disjoint = a.disjoint && call.out[j].data != call.term[m].data;
  const auto kernel = patch_kernels().mix;
  parallel(a.items(), patch_grain(a.height * strip_elements(g, std::min(a.width, g.size[2]))),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// A sample's loss is the sum over its items in their order.
template <class Parallel>
void patch_loss(const PatchLossCall& call, Parallel&& parallel) {
  const Grid& g = call.grid;
  PatchLossArgs a{call, 1, 0, nullptr};
  if (g.patch[2] > 0) a.group = std::max<int64_t>(1, PATCH_TILE / g.patch[2]);
  a.stretches = (g.across(2) + a.group - 1) / a.group;
  const int64_t items = a.items_of_sample();
  std::vector<double> partial(call.batch * items);
  a.partial = partial.data();
  const auto kernel = patch_kernels().loss;
  const int64_t columns = std::min(a.group * g.patch[2], g.size[2]);
  parallel(call.batch * items, patch_grain(strip_elements(g, columns)),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  for (int64_t b = 0; b < call.batch; ++b) {
    call.loss[b] = 0;
    for (int64_t i = 0; i < items; ++i) call.loss[b] += partial[b * items + i];
  }
}

template <class Parallel>
void select_patches(SelectCall call, Parallel&& parallel) {
  const auto chosen = std::make_unique_for_overwrite<uint32_t[]>(call.batch * call.patches);
  call.chosen = chosen.get();
  const auto kernel = PYDIFFUSE_BEST(patch_select).select;
  parallel(call.batch, patch_grain(8 * call.patches),
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace pydiffuse
