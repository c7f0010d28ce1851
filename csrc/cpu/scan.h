// The CPU kernels of the selective scan, as the bindings call them: functions over a range of work
// items.
//
// An item is BLOCK channels of one group and one sample (forward), or of one part of the batch
// (backward), through all steps of all paths. Items depend on the sizes alone, so the number of
// threads changes no bit of the result.
#pragma once

#include "../scan.h"

namespace pydiffuse {

constexpr int SCAN_BLOCK = 64;  // channels of an item, at most
constexpr int MAX_PARTS = 8;    // of the batch, in the backward

struct ScanArgs {
  ScanCall call;
  int rows;            // states of a packed row: the states and zeros up to whole vectors
  int64_t blocks;      // items of a group
  const float *B, *C;  // packed [batch, paths, groups, length, rows], token by token, or null: read
                       // them where they lie
  int64_t group_channels() const { return call.channels / call.groups; }
};

struct PackArgs {  // B or C to float32 rows
  Weights from;
  int64_t paths, groups, length;
  int states, rows;
  float* to;
};

struct ScanBackwardArgs {
  ScanArgs scan;
  ScanBackwardCall call;
  int64_t parts;  // of the batch
  // Partial sums: a block's of dB and dC per step, a part's of the parameters' gradients.
  float *dB, *dC;                 // [batch, paths, groups, blocks, length, rows], or null
  float *dA, *dBconst, *dCconst;  // [parts, paths, channels, states]; null if not constant
  float *dD, *dbias;              // [parts, paths, channels]
};

struct ScanKernels {
  int width;                                    // float32 lanes
  int64_t (*forward_scratch)(const ScanArgs&);  // floats that a call to `forward` needs
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);  // items: rows [batch, paths, groups]
  void (*forward)(const ScanArgs&, int64_t begin, int64_t end, float* scratch);
  // The arithmetic of the floor, in cache: per channel and step `states` exponentials and 2
  // `states` fused multiply-adds, `steps` steps of WIDTH channels.
  void (*floor)(int states, int64_t steps, float* scratch);
};

struct ScanBackwardKernels {
  int64_t (*scratch)(const ScanBackwardArgs&);
  void (*backward)(const ScanBackwardArgs&, int64_t begin, int64_t end, float* scratch);
  void (*reduce)(const ScanBackwardArgs&, int64_t begin,
                 int64_t end);  // items: [batch, paths, groups]
};

}  // namespace pydiffuse

extern "C" {
__attribute__((visibility("hidden"))) extern const pydiffuse::ScanKernels pydiffuse_scan_default,
    pydiffuse_scan_avx2, pydiffuse_scan_avx512;
__attribute__((visibility(
    "hidden"))) extern const pydiffuse::ScanBackwardKernels pydiffuse_scan_backward_default,
    pydiffuse_scan_backward_avx2, pydiffuse_scan_backward_avx512;
}
