// Tiles of steps and channels: what the kernels of the scan and of the convolution stand on.
//
// A block of 256 threads holds 64 channels of one group, and up to 64 steps of one path at a time.
// Tensors come into shared memory as float32, channel by channel: a thread then reads four steps at
// once, and 8 channels of 16 bytes fall into different banks. Whether a tensor's channels or its
// tokens lie next to each other only decides which thread fetches which element; a path only
// decides where a step's elements are.
#pragma once

#include "../scan.h"
#include "vectors.cuh"

namespace pydiffuse {
namespace {

constexpr int CHANNELS = 64, STEPS = SCAN_CHUNK;
constexpr int PITCH = STEPS + 4;           // floats from channel to channel
constexpr int PLANE = CHANNELS * PITCH;    // floats of a tile
constexpr int LANES = THREADS / CHANNELS;  // threads of each channel: states, or steps
constexpr float LOG2E = 1.44269504089f, LN2 = 0.693147180560f;

static_assert(LANES == 4 && STEPS % LANES == 0, "four steps and four lanes go together below");

// What a chunk hands on decays by one 2^(A sum delta), so the errors of these gather over 64 steps
// at the most, however slow the decay.
__device__ __forceinline__ float exp2_fast(float x) { return exp2_approx(x); }

// log(1 + t) for t in [0, 1], relative error 2e-7 (a Chebyshev fit of log(1 + t) / t).
__device__ __forceinline__ float log1p_fast(float t) {
  float p = 5.105825607e-3f;
  p = fmaf(p, t, -2.899195626e-2f);
  p = fmaf(p, t, 7.738073915e-2f);
  p = fmaf(p, t, -1.359059960e-1f);
  p = fmaf(p, t, 1.907130927e-1f);
  p = fmaf(p, t, -2.483394593e-1f);
  p = fmaf(p, t, 3.331793547e-1f);
  p = fmaf(p, t, -4.999943674e-1f);
  return fmaf(p, t, 9.999999404e-1f) * t;
}

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2E); }

__device__ __forceinline__ float softplus(float x) {
  // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). Nothing is contracted into the sum, so that every
  // kernel has one and the same delta.
  return x > 20.0f ? x : __fadd_rn(fmaxf(x, 0.0f), log1p_fast(exp_fast(-fabsf(x))));
}

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + exp_fast(-z)); }
__device__ __forceinline__ float silu(float z) { return __fdividef(z, 1.0f + exp_fast(-z)); }
__device__ __forceinline__ float silu_slope(float z) {
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// The sequences of a row: where they begin and end, in steps.
struct Sequences {
  const int32_t* offsets;  // [count + 1], or null for one
  int count, length;

  __device__ int at(int step) const {  // the one that has this step
    if (!offsets) return 0;
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (offsets[middle] <= step)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  __device__ int begin(int s) const { return offsets ? offsets[s] : 0; }
  __device__ int end(int s) const { return offsets ? offsets[s + 1] : length; }
  __device__ bool start_within(int first, int steps) const {
    return begin(at(first + steps - 1)) >= first;
  }
};

// The channels of a block.
struct Share {
  int64_t first;  // channel
  int group, index, count;
};

struct Shares {  // how the channels of a call fall into blocks
  int64_t size;  // channels of a group
  int per;       // blocks of a group

  __device__ Share operator[](int block) const {
    Share s{0, block / per, block % per, 0};
    const int64_t from = int64_t(s.index) * CHANNELS;
    s.first = s.group * size + from;
    s.count = static_cast<int>(min(int64_t(CHANNELS), size - from));
    return s;
  }
};

struct Tile64 {       // what a block holds of a path
  int span;           // 16, 32 or 64 steps are looked at
  int channels;       // that there are
  const int* tokens;  // [64] of its steps, in shared memory; -1 where there is none
};

__device__ __forceinline__ int span_of(int steps) {
  return steps <= 16 ? 16 : steps <= 32 ? 32 : 64;
}

// The tokens of the steps from `first` on, by all threads; first may be negative.
__device__ __forceinline__ void set_tokens(int* tokens, const int32_t* order, int first, int last,
                                           int64_t length) {
  const int i = threadIdx.x;
  if (i >= STEPS) return;
  const int step = first + i;
  int token = -1;
  if (step >= 0 && step < last) {
    token = order ? order[step] : step;
    if (token < 0 || token >= length) token = -1;
  }
  tokens[i] = token;
}

// One tensor, [tokens, channels] of a sample and path, from the block's first channel on.
struct Plane {
  char* data;
  uint32_t token, channel;  // bytes from one to the next
  DType dtype;
  bool turned;  // tokens lie next to each other

  __device__ Plane(const Tokens& t, int64_t sample, int64_t path, int64_t first)
      : dtype(t.dtype), turned(t.token == 1 && t.channel != 1) {
    const int size = bytes<true>(t.dtype);
    data =
        static_cast<char*>(t.data) + (sample * t.batch + path * t.path + first * t.channel) * size;
    token = static_cast<uint32_t>(t.token * size);
    channel = static_cast<uint32_t>(t.channel * size);
  }
};

constexpr int BATCH = 8;  // elements of a tensor that a thread has under way at once

// A thread's elements of a tile, in batches. Along channels: four steps of one channel, and four
// more; along tokens (turned): one step of several channels, consecutive threads having consecutive
// steps. So a thread's elements of a tensor lie along a line, and differ in `index`, a token or a
// channel.
template <bool TURNED>
struct Batch {
  const Tile64& tile;
  int step, channel, stride;  // of the first element; stride: channels to the next one
  int index[BATCH];           // -1 where there is none

  __device__ explicit Batch(const Tile64& t) : tile(t) {
    const int thread = threadIdx.x;
    if (TURNED) {
      const int log = t.span == 64 ? 6 : t.span == 32 ? 5 : 4;
      step = thread & (t.span - 1);
      channel = thread >> log;
      stride = THREADS >> log;
    } else {
      step = 4 * (thread / CHANNELS);
      channel = thread % CHANNELS;
      stride = 0;
    }
  }
  __device__ void look() {
    if (TURNED) {
      const bool there = tile.tokens[step] >= 0;
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        index[i] = there && channel_of(i) < tile.channels ? channel_of(i) : -1;
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; i += 4) {
        const int4 t = reinterpret_cast<const int4&>(tile.tokens[step_of(i)]);
        index[i] = t.x, index[i + 1] = t.y, index[i + 2] = t.z, index[i + 3] = t.w;
      }
      if (channel >= tile.channels) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) index[i] = -1;
      }
    }
  }
  __device__ void next() { TURNED ? channel += BATCH* stride : step += BATCH * LANES; }
  __device__ bool has(int i) const { return index[i] >= 0; }
  __device__ int step_of(int i) const { return TURNED ? step : step + i / 4 * 4 * LANES + i % 4; }
  __device__ int channel_of(int i) const { return TURNED ? channel + i * stride : channel; }
};

// Where a thread's elements of a tensor are.
template <bool TURNED>
struct Line {
  char* data;
  uint32_t stride;  // bytes for each of `index`
  DType dtype;

  __device__ Line(const Plane& p, const Batch<TURNED>& first)
      : stride(TURNED ? p.channel : p.token), dtype(p.dtype) {
    const int token = TURNED ? max(first.tile.tokens[first.step], 0) : 0;
    data = p.data + (TURNED ? uint64_t(token) * p.token : uint64_t(first.channel) * p.channel);
  }
  __device__ char* at(int index) const { return data + uint64_t(uint32_t(index)) * stride; }
};

struct Fetched {  // a batch of a tensor, as it lies in memory; 0 where there is none
  uint32_t raw[BATCH];

  template <bool TURNED>
  __device__ Fetched(const Line<TURNED>& line, const Batch<TURNED>& batch) {
    if (line.dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        raw[i] = batch.has(i) ? *reinterpret_cast<const uint32_t*>(line.at(batch.index[i])) : 0;
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        raw[i] = batch.has(i) ? *reinterpret_cast<const uint16_t*>(line.at(batch.index[i])) : 0;
    }
  }
  __device__ void widen(DType dtype, float (&x)[BATCH]) const {
    if (dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) x[i] = __uint_as_float(raw[i]);
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) x[i] = pydiffuse::widen(raw[i], dtype).x;
    }
  }
};

// A batch of one tensor, or of two; zeros for the second where there is none.
template <bool TURNED>
__device__ __forceinline__ void fetch(const Batch<TURNED>& batch, const Line<TURNED>& first,
                                      const Line<TURNED>& second, bool two, float (&x)[BATCH],
                                      float (&y)[BATCH]) {
  const Fetched one(first, batch);
#pragma unroll
  for (int i = 0; i < BATCH; ++i) y[i] = 0.0f;
  if (two) Fetched(second, batch).widen(second.dtype, y);
  one.widen(first.dtype, x);
}

template <bool TURNED, class Value>
__device__ __forceinline__ void put_as(float* plane, const Tile64& t, const Plane& first,
                                       const Plane& second, bool two, Value value) {
  Batch<TURNED> batch(t);
  const Line<TURNED> one(first, batch), other(second, batch);
#pragma unroll 1
  for (int done = 0; 4 * done < t.span; done += BATCH, batch.next()) {
    float x[BATCH], y[BATCH];
    batch.look();
    fetch(batch, one, other, two, x, y);
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      x[i] = batch.has(i) ? value(batch.channel_of(i), x[i], y[i]) : 0.0f;
    float* const to = plane + batch.channel * PITCH + batch.step;
    if (TURNED) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (batch.channel_of(i) < CHANNELS) to[i * batch.stride * PITCH] = x[i];
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; i += 4)
        reinterpret_cast<float4&>(to[i * LANES]) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  }
}

// value(channel, element, element of the second tensor) into a tile in shared memory; 0 outside.
template <class Value>
__device__ __forceinline__ void put(float* plane, const Tile64& t, const Plane& first,
                                    const Plane& second, bool two, Value value) {
  first.turned ? put_as<true>(plane, t, first, second, two, value)
               : put_as<false>(plane, t, first, second, two, value);
}

__device__ __forceinline__ void put_plain(float* to, const Tile64& t, const Plane& p) {
  put(to, t, p, p, false, [](int, float x, float) { return x; });
}

template <bool TURNED, class Value>
__device__ __forceinline__ void give_as(const Plane& to, const Tile64& t, bool onto, int sources,
                                        const Plane& first, const Plane& second, Value value) {
  Batch<TURNED> batch(t);
  const Line<TURNED> line(to, batch), one(first, batch), other(second, batch);
#pragma unroll 1
  for (int done = 0; 4 * done < t.span; done += BATCH, batch.next()) {
    float x[BATCH] = {}, y[BATCH] = {}, before[BATCH] = {};
    batch.look();
    if (sources) fetch(batch, one, other, sources == 2, x, y);
    if (onto) Fetched(line, batch).widen(line.dtype, before);
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (batch.has(i)) x[i] = value(batch.channel_of(i), batch.step_of(i), x[i], y[i]) + before[i];
    if (line.dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (batch.has(i)) *reinterpret_cast<float*>(line.at(batch.index[i])) = x[i];
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (batch.has(i))
          *reinterpret_cast<uint16_t*>(line.at(batch.index[i])) =
              static_cast<uint16_t>(narrow(x[i], 0.0f, line.dtype));
    }
  }
}

// value(channel, step, elements of up to two sources) to a tensor, or onto what is there.
template <class Value>
__device__ __forceinline__ void give(const Plane& to, const Tile64& t, bool onto, int sources,
                                     const Plane& first, const Plane& second, Value value) {
  to.turned ? give_as<true>(to, t, onto, sources, first, second, value)
            : give_as<false>(to, t, onto, sources, first, second, value);
}

__device__ __forceinline__ float pick(const float4& x, int i) {
  return i & 2 ? (i & 1 ? x.w : x.z) : (i & 1 ? x.y : x.x);
}

// x[i] of step i, summed over a channel's four lanes; lane i gets step i's.
__device__ __forceinline__ float sum_lanes(const float (&x)[4]) {
  const bool two = threadIdx.x & 2, one = threadIdx.x & 1;
  const float a = (two ? x[2] : x[0]) + __shfl_xor_sync(0xffffffffu, two ? x[0] : x[2], 2);
  const float b = (two ? x[3] : x[1]) + __shfl_xor_sync(0xffffffffu, two ? x[1] : x[3], 2);
  return (one ? b : a) + __shfl_xor_sync(0xffffffffu, one ? a : b, 1);
}

// The sum over a channel's four lanes, for all of them.
__device__ __forceinline__ float sum_lanes(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  return x + __shfl_xor_sync(0xffffffffu, x, 1);
}

}  // namespace
}  // namespace pydiffuse
