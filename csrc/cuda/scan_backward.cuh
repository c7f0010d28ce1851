// The selective scan backward: g_l = C_l dy_l + a_(l+1) g_(l+1), and what follows from g and h.
//
// Threads as in the forward. carry_kernel finds what each chunk passes to the one before it from a
// carry of zero, combine_kernel strings the chunks together, and gradient_kernel takes each chunk
// by itself: forward once, keeping the state before every 8th step in shared memory, then backward
// 8 steps at a time, their states and decays in registers. Sums over states are taken by a
// channel's four lanes, sums over channels (dB, dC) by the 8 channels of a warp, the 8 warps of a
// block and, from workspace, the blocks of a group: always in that order. Floor: three 2^x per
// state and step, 16 a clock and multiprocessor.
#pragma once

#include "scan_forward.cuh"

namespace pydiffuse {
namespace {

constexpr int PART = 8;              // steps whose states are in registers at once
constexpr int PARTS = STEPS / PART;  // of a chunk
constexpr int KEPT = 4 * LANES;      // states of a block, and as many of C: 32 values a step
static_assert(PART * 2 * KEPT == THREADS, "one sum over the warps for each thread");

struct GradientArgs {
  ScanArgs scan;        // states: the carries, each in its chunk's place
  const float* before;  // [batch, paths, chunks, channels, states]: the forward's chunk states
  Tokens du, ddelta, dz;
  // One for each sample and chunk: [channels, states] and [channels]. constant_B and constant_C are
  // null where B and C are not constant.
  float *A, *constant_B, *constant_C, *D, *bias;
  float *B, *C;  // [batch, blocks, tokens, states], or null where they are constant
};

// dy = dout silu(z), in the order of dout.
__device__ __forceinline__ void put_dy(float* to, const ScanArgs& a, const Share& share,
                                       const Tile64& t, int64_t sample) {
  const Plane dout(a.dout, sample, 0, share.first), z(a.call.z, sample, 0, share.first);
  put(to, t, dout, z, a.call.z.data != nullptr,
      [&](int, float x, float gate) { return a.call.z.data ? x * silu(gate) : x; });
}

// Going back through the sequences: what reaches the state after a step.
template <int NB>
struct Reverse {
  int sequence, begin;

  // e: what the next chunk passes back; kept unless a sequence ends with this chunk.
  __device__ Reverse(const ScanArgs& a, const Lane<NB>& own, int64_t sample, int end,
                     float (&e)[NB]) {
    const Sequences sequences = a.sequences();
    sequence = sequences.at(end - 1);
    begin = sequences.begin(sequence);
    if (sequences.end(sequence) == end) own.get(a.state_of(a.dlast, sample, sequence), e);
  }
  // After step `begin`, a sequence's first. e has been multiplied by the step's decay.
  __device__ void leave(const ScanArgs& a, const Lane<NB>& own, int64_t sample, int first,
                        float* dinitial, float (&e)[NB]) {
    own.set(a.state_of(dinitial, sample, sequence), e);
    if (begin > first) {
      const Sequences sequences = a.sequences();
      sequence = sequences.at(begin - 1);
      begin = sequences.begin(sequence);
      own.get(a.state_of(a.dlast, sample, sequence), e);
    } else {
#pragma unroll
      for (int j = 0; j < NB; ++j) e[j] = 0.0f;
      begin = -1;
    }
  }
};

template <int NB>
constexpr int carry_floats() {
  return 2 * PLANE + WEIGHTS<NB> + STEPS;
}

// Chunks 1 and later; block = (sample, chunk, 64 channels).
template <int NB>
__global__ void __launch_bounds__(THREADS, 2) carry_kernel(const __grid_constant__ ScanArgs a) {
  extern __shared__ float4 block_memory[];
  const ScanCall& call = a.call;
  const int state_blocks = (call.states + LANES * NB - 1) / (LANES * NB);
  float* const delta = reinterpret_cast<float*>(block_memory);  // [channels, steps]
  float* const dy = delta + PLANE;
  float* const C = dy + PLANE;  // [steps, states]
  int* const tokens = reinterpret_cast<int*>(C + WEIGHTS<NB>);

  int64_t block = blockIdx.x;
  const Share share = a.shares[static_cast<int>(block % a.blocks)];
  block /= a.blocks;
  const int chunk = static_cast<int>(block % (a.chunks - 1)) + 1, first = chunk * STEPS,
            steps = static_cast<int>(min(int64_t(STEPS), call.length - first));
  const int64_t sample = block / (a.chunks - 1);
  const int row = threadIdx.x / LANES * PITCH;
  const Tile64 tile{span_of(steps), share.count, tokens};
  set_tokens(tokens, a.order(), first, first + steps, call.length);
  __syncthreads();
  put_delta(delta, a, share, tile, sample);
  put_dy(dy, a, share, tile, sample);

  for (int states = 0; states < state_blocks; ++states) {
    if (states > 0) __syncthreads();  // the block before is done with C
    put_weights<NB>(C, call.C, a, share, tile, sample, states);
    __syncthreads();
    const WeightRows<NB> rows_C(call.C, C);
    const Lane<NB> own(a, share, states);
    float A[NB], e[NB] = {}, sum = 0.0f;
    own.get(call.A + a.path * a.floats(), A);
#pragma unroll
    for (int j = 0; j < NB; ++j) A[j] *= LOG2E;
    Reverse<NB> at(a, own, sample, first + steps, e);

#pragma unroll 1
    for (int four = (steps - 1) / 4 * 4; four >= 0; four -= 4) {
      const float4 delta4 = reinterpret_cast<const float4&>(delta[row + four]),
                   dy4 = reinterpret_cast<const float4&>(dy[row + four]);
      const bool event = at.begin >= first + four;
      add(sum, delta4);
      float decay[4][NB], c[4][NB];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows_C.get(four + i, c[i]);
#pragma unroll
        for (int j = 0; j < NB; ++j) decay[i][j] = exp2_fast(pick(delta4, i) * A[j]);
      }
#pragma unroll
      for (int i = 3; i >= 0; --i) {
#pragma unroll
        for (int j = 0; j < NB; ++j) e[j] = decay[i][j] * fmaf(c[i][j], pick(dy4, i), e[j]);
        if (event && first + four + i == at.begin) at.leave(a, own, sample, first, nullptr, e);
      }
    }
    own.set(a.state(sample, chunk), e);
    if (threadIdx.x % LANES == 0 && own.count > 0 && states == 0)
      a.sums[(sample * a.chunks + chunk) * call.channels + own.channel] = sum;
  }
}

// V values of a lane, summed over the 8 channels of its warp; the lanes of channel c get value
// c V / 8.
template <int V>
__device__ __forceinline__ float sum_channels(float (&x)[V]) {
  int mask = 16;
#pragma unroll
  for (int half = V / 2; half >= 1; half /= 2, mask /= 2) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < half; ++i)
      x[i] = (upper ? x[i + half] : x[i]) +
             __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + half], mask);
  }
#pragma unroll
  for (; mask >= LANES; mask /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], mask);
  return x[0];
}

template <int NB>
constexpr int gradient_floats(bool wide) {
  return PLANE * (wide ? 6 : 3) + THREADS * NB * (PARTS - 1) + 2 * WEIGHTS<NB> + WARPS * PART * 32 +
         STEPS;
}

// block = (sample, chunk, 64 channels)
template <int NB>
__global__ void __launch_bounds__(THREADS, 1)
    gradient_kernel(const __grid_constant__ GradientArgs all) {
  extern __shared__ float4 block_memory[];
  const ScanArgs& a = all.scan;
  const ScanCall& call = a.call;
  const int state_blocks = (call.states + LANES * NB - 1) / (LANES * NB);
  float* const delta = reinterpret_cast<float*>(block_memory);  // [channels, steps]
  float* const u = delta + PLANE;
  float* const dy = u + PLANE;
  // What the steps give takes the place of what they took, unless later blocks of states need it.
  float* const ddelta = state_blocks == 1 ? delta : dy + PLANE;
  float* const du = ddelta + PLANE;
  float* const y = du + PLANE;
  float* const kept = y + PLANE;  // [parts - 1, threads, NB]: states before parts 1 to 7
  float* const B = kept + THREADS * NB * (PARTS - 1);  // [steps, states]
  float* const C = B + WEIGHTS<NB>;
  float* const warps = C + WEIGHTS<NB>;  // [warps, steps of a part, 32]
  int* const tokens = reinterpret_cast<int*>(warps + WARPS * PART * 32);

  int64_t block = blockIdx.x;
  const int share_index = static_cast<int>(block % a.blocks);
  const Share share = a.shares[share_index];
  block /= a.blocks;
  const int chunk = static_cast<int>(block % a.chunks), first = chunk * STEPS,
            steps = static_cast<int>(min(int64_t(STEPS), call.length - first));
  const int64_t sample = block / a.chunks, place = sample * a.chunks + chunk;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES * PITCH;
  const bool summed = !call.B.constant || !call.C.constant;
  const Sequences sequences = a.sequences();
  const Tile64 tile{span_of(steps), share.count, tokens};
  set_tokens(tokens, a.order(), first, first + steps, call.length);
  __syncthreads();
  put_delta(delta, a, share, tile, sample);
  put_plain(u, tile, Plane(call.u, sample, 0, share.first));
  put_dy(dy, a, share, tile, sample);

  for (int states = 0; states < state_blocks; ++states) {
    if (states > 0) __syncthreads();  // the block before is done with B and C
    put_weights<NB>(B, call.B, a, share, tile, sample, states);
    put_weights<NB>(C, call.C, a, share, tile, sample, states);
    __syncthreads();
    const Lane<NB> own(a, share, states);
    // A channel that is not there adds 0 to dB and dC, whatever B and C are.
    const float* const zeros = own.exists ? nullptr : delta + row;
    const WeightRows<NB> rows_B(call.B, B, zeros), rows_C(call.C, C, zeros);
    const bool finishes = states == state_blocks - 1;
    const float skip = call.D && own.exists ? call.D[a.path * call.channels + own.channel] : 0.0f;
    float A[NB], h[NB], start[NB];
    own.get(call.A + a.path * a.floats(), A);
#pragma unroll
    for (int j = 0; j < NB; ++j) A[j] *= LOG2E;
    own.get(all.before + ((sample * call.paths + a.path) * a.chunks + chunk) * a.floats(), start);

    // Forward. A part begins with the state as the step before left it.
    int next = first;  // where a sequence may begin: looked up there
    const auto enter = [&](int step) {
      const int sequence = sequences.at(step);
      if (sequences.begin(sequence) == step) own.get(a.state_of(call.initial, sample, sequence), h);
      next = sequences.end(sequence);
    };
#pragma unroll
    for (int j = 0; j < NB; ++j) h[j] = start[j];
#pragma unroll 1
    for (int four = 0; four + PART < steps || four % PART != 0; four += 4) {
      const float4 delta4 = reinterpret_cast<const float4&>(delta[row + four]),
                   u4 = reinterpret_cast<const float4&>(u[row + four]);
      const bool event = next < first + four + 4;
      const Four<NB> now(delta4, u4, A, rows_B, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (event && first + four + i == next) enter(next);
#pragma unroll
        for (int j = 0; j < NB; ++j) h[j] = fmaf(now.decay[i][j], h[j], now.input[i][j]);
      }
      if (four % PART != 0) {
#pragma unroll
        for (int j = 0; j < NB; ++j) kept[(four / PART * THREADS + threadIdx.x) * NB + j] = h[j];
      }
    }

    float e[NB] = {}, dA[NB] = {}, dB[NB] = {}, dC[NB] = {}, dD = 0.0f, dbias = 0.0f;
    if (chunk + 1 < a.chunks) own.get(a.state(sample, chunk + 1), e);
    Reverse<NB> at(a, own, sample, first + steps, e);
#pragma unroll 1
    for (int part = (steps - 1) / PART; part >= 0; --part) {
      float before[PART][NB], decay[PART][NB];
#pragma unroll
      for (int j = 0; j < NB; ++j)
        h[j] = part == 0 ? start[j] : kept[((part - 1) * THREADS + threadIdx.x) * NB + j];
      const int from = part * PART;
      enter(first + from);
#pragma unroll
      for (int four = 0; four < PART; four += 4) {
        const float4 delta4 = reinterpret_cast<const float4&>(delta[row + from + four]),
                     u4 = reinterpret_cast<const float4&>(u[row + from + four]);
        const bool event = next < first + from + four + 4;
        const Four<NB> now(delta4, u4, A, rows_B, from + four);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = from + four + i;
          if (event && first + step == next && step < steps) enter(next);
#pragma unroll
          for (int j = 0; j < NB; ++j) {
            before[four + i][j] = h[j];
            decay[four + i][j] = now.decay[i][j];
            h[j] = fmaf(now.decay[i][j], h[j], now.input[i][j]);
          }
        }
      }

      // Backward.
#pragma unroll
      for (int four = PART - 4; four >= 0; four -= 4) {
        const int slot = row + from + four;
        const float4 delta4 = reinterpret_cast<const float4&>(delta[slot]),
                     u4 = reinterpret_cast<const float4&>(u[slot]),
                     dy4 = reinterpret_cast<const float4&>(dy[slot]);
        const bool event = at.begin >= first + from + four;
        float c[4][NB], g[4][NB];
#pragma unroll
        for (int i = 0; i < 4; ++i) rows_C.get(from + four + i, c[i]);
#pragma unroll
        for (int i = 3; i >= 0; --i) {
#pragma unroll
          for (int j = 0; j < NB; ++j) {
            g[i][j] = fmaf(c[i][j], pick(dy4, i), e[j]);
            e[j] = decay[four + i][j] * g[i][j];
          }
          if (event && first + from + four + i == at.begin)
            at.leave(a, own, sample, first, a.dinitial, e);
        }

        float y4[4], bg4[4], ah4[4];  // sums over states: C h, B g, A a h g
        float shared[4];              // sums over the warp's channels, for dB and dC
#pragma unroll
        for (int i = 3; i >= 0; --i) {
          const float d = pick(delta4, i), x = d * pick(u4, i), out = pick(dy4, i);
          float b[NB], products[2 * NB];
          rows_B.get(from + four + i, b);
          y4[i] = bg4[i] = ah4[i] = 0.0f;
#pragma unroll
          for (int j = 0; j < NB; ++j) {
            const float was = before[four + i][j], now = fmaf(decay[four + i][j], was, x * b[j]),
                        lost = decay[four + i][j] * g[i][j] * was;  // per unit of delta A
            if (j < own.count) {
              y4[i] = fmaf(c[i][j], now, y4[i]);
              bg4[i] = fmaf(b[j], g[i][j], bg4[i]);
              ah4[i] = fmaf(A[j], lost, ah4[i]);
            }
            dA[j] = fmaf(d, lost, dA[j]);
            products[j] = x * g[i][j];
            products[NB + j] = out * now;
          }
          if (call.B.constant) {
#pragma unroll
            for (int j = 0; j < NB; ++j) dB[j] += products[j];
          }
          if (call.C.constant) {
#pragma unroll
            for (int j = 0; j < NB; ++j) dC[j] += products[NB + j];
          }
          shared[i] = summed ? sum_channels<2 * NB>(products) : 0.0f;
        }
        if (summed) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            warps[(threadIdx.x / 32 * PART + four + i) * 32 + threadIdx.x % 32] = shared[i];
        }
        const int mine = slot + lane;
        float y_l = sum_lanes(y4), bg = sum_lanes(bg4), ah = sum_lanes(ah4) * LN2;
        const float d = pick(delta4, lane), u_l = pick(u4, lane), out = pick(dy4, lane);
        if (states > 0) {
          y_l += y[mine];
          bg += du[mine];
          ah += ddelta[mine];
        }
        __syncwarp();  // all four lanes have read these steps
        if (finishes) {
          const float slope = call.softplus ? -expm1f(-d) : 1.0f, g = fmaf(u_l, bg, ah) * slope;
          ddelta[mine] = g;
          du[mine] = fmaf(d, bg, skip * out);
          y[mine] = fmaf(skip, u_l, y_l);
          if (from + four + lane < steps) dbias += g;  // no step beyond the last
          dD = fmaf(out, u_l, dD);
        } else {
          ddelta[mine] = ah;
          du[mine] = bg;
          y[mine] = y_l;
        }
      }
      if (summed) {
        __syncthreads();
        // A thread per step and value: lane (c, q) of a warp has value c V / 8 of states q NB on.
        const int step = threadIdx.x / 32, value = threadIdx.x % 32 / LANES * 2 * NB / 8,
                  n = (states * LANES + lane) * NB + value % NB;
        const bool first_copy = threadIdx.x % 32 / LANES * 2 * NB % 8 == 0;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) sum += warps[(w * PART + step) * 32 + threadIdx.x % 32];
        float* const to = value < NB ? all.B : all.C;
        const int token = tokens[from + step];
        if (to && first_copy && token >= 0 && n < call.states)
          to[((sample * a.blocks + share_index) * call.length + token) * call.states + n] = sum;
        __syncthreads();
      }
    }
    own.set(all.A + place * a.floats(), dA);
    if (all.constant_B) own.set(all.constant_B + place * a.floats(), dB);
    if (all.constant_C) own.set(all.constant_C + place * a.floats(), dC);
    if (!finishes) continue;
    dD = sum_lanes(dD);
    dbias = sum_lanes(dbias);
    if (own.exists && lane == 0) {
      const int64_t channel = place * call.channels + own.channel;
      if (all.D) all.D[channel] = dD;
      if (all.bias) all.bias[channel] = dbias;
    }
  }
  __syncthreads();
  const bool onto = a.path > 0;
  const auto from = [](const float* plane) {
    return [plane](int channel, int step, float, float) { return plane[channel * PITCH + step]; };
  };
  const Plane to_du(all.du, sample, 0, share.first),
      to_ddelta(all.ddelta, sample, a.path, share.first);
  give(to_du, tile, onto, 0, to_du, to_du, from(du));
  give(to_ddelta, tile, false, 0, to_ddelta, to_ddelta, from(ddelta));
  if (!call.z.data) return;
  const Plane dout(a.dout, sample, 0, share.first), z(call.z, sample, 0, share.first);
  give(Plane(all.dz, sample, 0, share.first), tile, onto, 2, dout, z,
       [&](int channel, int step, float x, float gate) {
         return x * silu_slope(gate) * y[channel * PITCH + step];
       });
}

}  // namespace
}  // namespace pydiffuse
