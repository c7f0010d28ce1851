// The selective scan: the vocabulary that the CPU kernels, the CUDA kernels and the bindings share.
//
//   h_l = exp(delta_l A) h_(l-1) + delta_l B_l u_l;   y_l = (<C_l, h_l> + D u_l) silu(z_l)
//
// for every sample, path and channel, over N states. Step l of path k reads and writes token
// order[k][l]; the results of several paths add up, token by token. At the steps `offsets` name,
// the state starts anew (from `initial`): the sequences of a batch row.
#pragma once

#include "tensor.h"

namespace pydiffuse {

constexpr int MAX_STATES = 256;
constexpr int SCAN_CHUNK = 64;  // steps from one saved state to the next

// Elements from one to the next along each dimension. A dimension that a tensor shares has stride
// 0.
struct Tokens {  // [batch, paths, tokens, channels]
  void* data = nullptr;
  int64_t batch = 0, path = 0, token = 0, channel = 0;
  DType dtype = DType::f32;
};

struct Weights {  // B or C: [batch, paths, groups, tokens, states], or constant [paths, channels,
                  // states]
  void* data = nullptr;
  int64_t batch = 0, path = 0, group = 0, token = 0, state = 0;
  DType dtype = DType::f32;
  bool constant = false;  // then float32 and contiguous
};

struct ScanCall {
  int64_t batch, paths, length, channels;
  int states, groups, sequences;
  Tokens u, delta, z, out;  // z.data may be null; u, z and out have no paths
  const float* A;           // [paths, channels, states]
  Weights B, C;
  const float* D;          // [paths, channels], or null
  const float* bias;       // [paths, channels], or null: added to delta
  bool softplus;           // of delta + bias; the identity above 20
  const float* initial;    // [batch, sequences, paths, channels, states], or null for 0
  const int32_t* order;    // [paths, length], or null: the identity
  const int32_t* offsets;  // [sequences + 1] steps, from 0 up to length, or null for one sequence
  float* last;             // as initial, or null
  // The state before step SCAN_CHUNK c, as the step before left it: [batch, paths, chunks,
  // channels, states]; written by the forward (or null), read by the backward.
  float* chunks;

  int64_t chunk_count() const { return (length + SCAN_CHUNK - 1) / SCAN_CHUNK; }
};

struct ScanBackwardCall {
  ScanCall forward;        // out and last are not used
  Tokens dout;             // [batch, tokens, channels]
  const float* dlast;      // [batch, sequences, paths, channels, states], or null for 0
  Tokens du, ddelta, dz;   // du, dz: sums over the paths; dz.data is null where z's is
  float *dA, *dD, *dbias;  // [paths, channels(, states)]; dD and dbias may be null
  float *dB,
      *dC;  // contiguous [batch, paths, groups, tokens, states], or [paths, channels, states]
  float* dinitial;  // as initial, or null
};

}  // namespace pydiffuse
