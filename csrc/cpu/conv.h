// The CPU kernels of the causal convolution, as the bindings call them: functions over a range of
// work items. An item is CONV_STEPS steps of CONV_ROW channels of one sample (forward), or
// CONV_BLOCK channels of one sample (forward of tensors whose tokens are next to each other) or of
// one part of the batch (backward).
#pragma once

#include "../conv.h"

namespace pydiffuse {

constexpr int CONV_STEPS = 64, CONV_ROW = 512;  // at most
constexpr int CONV_BLOCK = 64;                  // channels, at most
constexpr int CONV_PARTS = 8;                   // of the batch, in the backward

struct ConvArgs {
  ConvCall call;
  bool staged;  // x or out has its tokens next to each other, or they differ in their elements
  bool stream;  // the output goes past the caches
  // The weights and the bias of all channels, a row for each tap: [width + 1][tap_stride].
  const float* taps;
  int64_t tap_stride;

  int64_t chunks() const { return (call.length + CONV_STEPS - 1) / CONV_STEPS; }
  int64_t blocks() const {
    const int most = staged ? CONV_BLOCK : CONV_ROW;
    return (call.channels + most - 1) / most;
  }
};

struct ConvBackwardArgs {
  ConvBackwardCall call;
  int64_t parts;           // of the batch
  float *dweight, *dbias;  // partial sums [parts, channels, width], [parts, channels]
};

struct ConvKernels {
  int64_t (*scratch)(int64_t length);  // floats that a call needs
  void (*forward)(const ConvArgs&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const ConvBackwardArgs&, int64_t begin, int64_t end, float* scratch);
};

}  // namespace pydiffuse

extern "C" {
__attribute__((visibility("hidden"))) extern const pydiffuse::ConvKernels pydiffuse_conv_default,
    pydiffuse_conv_avx2, pydiffuse_conv_avx512;
}
