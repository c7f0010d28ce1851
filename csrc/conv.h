// The causal convolution in path order, channel by channel:
//
//   y_l = act(bias + sum_w weight_w x_(l - W + 1 + w)),   zeros before a sequence's first step
//
// Step l reads and writes token order[l].
#pragma once

#include "scan.h"

namespace pydiffuse {

constexpr int MAX_WIDTH = 8;

struct ConvCall {
  int64_t batch, length, channels;
  int width, sequences;
  Tokens x, out;           // no paths
  const float* weight;     // [channels, width]
  const float* bias;       // [channels], or null
  bool silu;               // else no activation
  const int32_t* order;    // [length], or null: the identity
  const int32_t* offsets;  // [sequences + 1] steps, or null for one sequence
};

struct ConvBackwardCall {
  ConvCall forward;  // out is not used
  Tokens dout, dx;
  float* dweight;  // [channels, width]
  float* dbias;    // [channels], or null
};

}  // namespace pydiffuse
