// The CPU kernels of patches, as the bindings call them: functions over a range of work items.
#pragma once

#include "../patch.h"

namespace pydiffuse {

constexpr int64_t PATCH_TILE =
    1024;  // columns, at most: their coefficients stay in the first cache

// An item of mix_patches is a strip: some rows of patches or, of long ones, a stretch of columns of
// one; in all channels. It computes the coefficients of its patches once and goes through its rows.
struct MixPatchesArgs : MixPatchesCall {
  int64_t width, stretches;  // columns of a stretch, and how many a row has
  int64_t height, strips;    // rows of patches in an item, and items down a plane
  bool stream;               // the output is too large to be worth caching
  bool disjoint;             // no output shares memory with a term

  int64_t items() const { return batch * grid.across(0) * strips * stretches; }
};

// An item of patch_loss is a stretch of whole patches of one row of patches, in all channels.
struct PatchLossArgs : PatchLossCall {
  int64_t group, stretches;  // patches of a stretch, and how many a row has
  double* partial;           // [items]

  int64_t items_of_sample() const { return grid.across(0) * grid.across(1) * stretches; }
};

struct PatchKernels {
  void (*mix)(const MixPatchesArgs&, int64_t begin, int64_t end);
  void (*loss)(const PatchLossArgs&, int64_t begin, int64_t end);
  bool (*within)(const Table&, int64_t batch, int64_t patches);  // all in [0, 1]
};

struct PatchSelectKernels {
  void (*select)(const SelectCall&, int64_t begin, int64_t end);  // an item is a sample
};

}  // namespace pydiffuse

extern "C" {
__attribute__((visibility("hidden"))) extern const pydiffuse::PatchKernels pydiffuse_patch_default,
    pydiffuse_patch_avx2, pydiffuse_patch_avx512;
__attribute__((visibility(
    "hidden"))) extern const pydiffuse::PatchSelectKernels pydiffuse_patch_select_default,
    pydiffuse_patch_select_avx2, pydiffuse_patch_select_avx512;
}
