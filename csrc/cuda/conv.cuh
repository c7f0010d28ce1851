// The causal convolution in path order.
//
// A block has 64 channels of one sample and stages 64 steps, the first W - 1 of which are the steps
// before its own; the backward keeps another W - 1 at the end. Weights and what a step may look
// back on (its sequence) stand beside them in shared memory. Floor: x read once and the result
// written once; backward x and dout read, dx written.
#pragma once

#include "../conv.h"
#include "scan_sum.cuh"
#include "scan_tile.cuh"

namespace pydiffuse {
namespace {

struct ConvArgs {
  ConvCall call;
  Shares shares;
  int blocks = 0;                              // of 64 channels
  int own = 0, tiles = 0;                      // steps of a tile that are its own, tiles of a row
  Tokens dout, dx;                             // conv_backward_kernel alone
  float *dweight = nullptr, *dbias = nullptr;  // [batch, tiles, channels(, width)]; dbias or null
};

// What both kernels begin with.
struct ConvTile {
  int first;  // the step of slot 0; below 0 before the row's first
  Share share;
  int64_t sample, tile;
  int* tokens;       // [64] of the steps; -1 where there is none
  int *begin, *end;  // [64] slots: of the step's sequence
  float* weight;     // [channels, 9]: the weights and then the bias
  Tile64 all, own;   // own: without the steps of its neighbours

  static constexpr int PER = MAX_WIDTH + 1;
  static constexpr int FLOATS = 4 * STEPS + CHANNELS * PER;

  __device__ ConvTile(const ConvArgs& a, float* memory) {
    const ConvCall& call = a.call;
    int64_t block = blockIdx.x;
    share = a.shares[static_cast<int>(block % a.blocks)];
    block /= a.blocks;
    tile = block % a.tiles;
    sample = block / a.tiles;
    first = static_cast<int>(tile * a.own) - (call.width - 1);
    tokens = reinterpret_cast<int*>(memory);
    begin = tokens + STEPS;
    end = begin + STEPS;
    weight = memory + 4 * STEPS;
    all = {STEPS, share.count, tokens};
    own = {STEPS, share.count, end + STEPS};
    const int length = static_cast<int>(call.length);
    const int before = call.width - 1, last = min(length, first + before + a.own);
    set_tokens(tokens, call.order, first, length, length);
    set_tokens(end + STEPS, call.order, first, last, length);
    if (threadIdx.x < before) end[STEPS + threadIdx.x] = -1;
    const int step = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < STEPS && step >= 0 && step < length) {
      const Sequences sequences{call.offsets, call.sequences, length};
      const int s = sequences.at(step);
      begin[threadIdx.x] = sequences.begin(s) - first;
      end[threadIdx.x] = sequences.end(s) - first;
    }
    for (int i = threadIdx.x; i < share.count * PER; i += THREADS) {
      const int64_t channel = share.first + i / PER;
      const int w = i % PER;
      weight[i] = w < call.width                ? call.weight[channel * call.width + w]
                  : w == MAX_WIDTH && call.bias ? call.bias[channel]
                                                : 0.0f;
    }
    __syncthreads();
  }

  // bias + sum_w weight_w x_(slot - W + 1 + w), for a slot whose step exists.
  __device__ float sum(const ConvCall& call, const float* x, int channel, int slot) const {
    const float* own = weight + channel * PER;
    float y = own[MAX_WIDTH];
    for (int w = 0; w < call.width; ++w) {
      const int from = slot - (call.width - 1) + w;
      if (from >= begin[slot]) y = fmaf(own[w], x[channel * PITCH + from], y);
    }
    return y;
  }
};

// block = (sample, own steps, 64 channels)
__global__ void __launch_bounds__(THREADS, 4) conv_kernel(const __grid_constant__ ConvArgs a) {
  extern __shared__ float4 block_memory[];
  float* const x = reinterpret_cast<float*>(block_memory);  // [channels, steps]
  const ConvTile t(a, x + PLANE);
  put_plain(x, t.all, Plane(a.call.x, t.sample, 0, t.share.first));
  __syncthreads();
  const Plane out(a.call.out, t.sample, 0, t.share.first);
  give(out, t.own, false, 0, out, out, [&](int channel, int step, float, float) {
    const float y = t.sum(a.call, x, channel, step);
    return a.call.silu ? silu(y) : y;
  });
}

// dx_l = sum_w weight_w g_(l + W - 1 - w), with g = dout act'(the sum before it); four threads
// share the steps of a channel for dweight and dbias.
__global__ void __launch_bounds__(THREADS, 4)
    conv_backward_kernel(const __grid_constant__ ConvArgs a) {
  extern __shared__ float4 block_memory[];
  const ConvCall& call = a.call;
  float* const x = reinterpret_cast<float*>(block_memory);  // [channels, steps]
  float* const g = x + PLANE;
  const ConvTile t(a, g + PLANE);
  put_plain(x, t.all, Plane(call.x, t.sample, 0, t.share.first));
  put_plain(g, t.all, Plane(a.dout, t.sample, 0, t.share.first));
  __syncthreads();

  const int before = call.width - 1, channel = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  float parts[MAX_WIDTH + 1] = {};
  if (channel < t.share.count) {
    for (int slot = before + lane; slot < STEPS; slot += LANES) {
      if (t.tokens[slot] < 0) continue;
      float& here = g[channel * PITCH + slot];
      if (call.silu) here *= silu_slope(t.sum(call, x, channel, slot));
      if (t.own.tokens[slot] < 0) continue;  // another block's
      parts[MAX_WIDTH] += here;
#pragma unroll
      for (int w = 0; w < MAX_WIDTH; ++w) {
        const int from = slot - before + w;
        if (w <= before && from >= t.begin[slot])
          parts[w] = fmaf(here, x[channel * PITCH + from], parts[w]);
      }
    }
  }
#pragma unroll
  for (int w = 0; w <= MAX_WIDTH; ++w) parts[w] = sum_lanes(parts[w]);
  if (channel < t.share.count && lane == 0) {
    const int64_t at = (t.sample * a.tiles + t.tile) * call.channels + t.share.first + channel;
#pragma unroll
    for (int w = 0; w < MAX_WIDTH; ++w)
      if (w <= before) a.dweight[at * call.width + w] = parts[w];
    if (a.dbias) a.dbias[at] = parts[MAX_WIDTH];
  }
  __syncthreads();
  const Plane dx(a.dx, t.sample, 0, t.share.first);
  give(dx, t.own, false, 0, dx, dx, [&](int channel, int step, float, float) {
    float sum = 0.0f;
    for (int w = 0; w <= before; ++w) {
      const int to = step + before - w;
      if (to < t.end[step])
        sum = fmaf(t.weight[channel * ConvTile::PER + w], g[channel * PITCH + to], sum);
    }
    return sum;
  });
}

inline ConvArgs conv_args(const ConvCall& call,
                          int around) {  // steps of a tile that are not its own
  ConvArgs a;
  a.call = call;
  a.shares = {call.channels, static_cast<int>((call.channels + CHANNELS - 1) / CHANNELS)};
  a.blocks = a.shares.per;
  a.own = STEPS - around;
  a.tiles = static_cast<int>((call.length + a.own - 1) / a.own);
  return a;
}

inline void run_conv(ScanLaunch& on, const ConvCall& call) {
  if (call.batch * call.length * call.channels == 0) return;
  for (const Tokens& t : {call.x, call.out}) on.check_strides(t, call.length, call.channels);
  const ConvArgs a = conv_args(call, call.width - 1);
  on.launch(conv_kernel, call.batch * a.tiles * a.blocks, a, PLANE + ConvTile::FLOATS);
}

inline void run_conv_backward(ScanLaunch& on, const ConvBackwardCall& call) {
  const ConvCall& f = call.forward;
  for (const Tokens& t : {f.x, call.dout, call.dx}) on.check_strides(t, f.length, f.channels);
  ConvArgs a = conv_args(f, 2 * (f.width - 1));
  a.dout = call.dout;
  a.dx = call.dx;
  const int64_t places = f.channels ? f.batch * a.tiles : 0;
  a.dweight = on.floats(places * f.channels * f.width);
  if (call.dbias) a.dbias = on.floats(places * f.channels);
  if (places) on.launch(conv_backward_kernel, places * a.blocks, a, 2 * PLANE + ConvTile::FLOATS);
  SumArgs sums;
  sums.add({a.dweight, call.dweight, 1, places, f.channels * f.width, 1, 0});
  sums.add({a.dbias, call.dbias, 1, places, f.channels, 1, 0});
  run_sums(on, sums);
}

}  // namespace
}  // namespace pydiffuse
