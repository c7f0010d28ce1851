// The CPU kernels of the causal convolution, as the doors call them: functions over a range of work
// items. An item is CONV_BLOCK channels of one sample (forward), or of one part of the batch
// (backward).
#pragma once

#include "../conv.h"

namespace pydiffuse {

constexpr int CONV_BLOCK = 64;  // channels of an item, at most
constexpr int CONV_PARTS = 8;   // of the batch, in the backward

struct ConvBackwardArgs {
  ConvBackwardCall call;
  int64_t parts;           // of the batch
  float *dweight, *dbias;  // partial sums [parts, channels, width], [parts, channels]
};

struct ConvKernels {
  int64_t (*scratch)(int64_t length);  // floats that a call needs
  void (*forward)(const ConvCall&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const ConvBackwardArgs&, int64_t begin, int64_t end, float* scratch);
};

}  // namespace pydiffuse

extern "C" {
__attribute__((visibility("hidden"))) extern const pydiffuse::ConvKernels pydiffuse_conv_default,
    pydiffuse_conv_avx2, pydiffuse_conv_avx512;
}
