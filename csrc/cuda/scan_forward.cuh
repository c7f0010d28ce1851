// The selective scan forward.
//
// A block has 64 channels of one sample; four threads share a channel, each with NB states in
// registers (a block of 4 NB states at a time where there are more). Steps go by in chunks of 64.
// Where there are too few samples to fill the device, chunks are scanned apart: `local` finds each
// chunk's end from a start of zero, combine_kernel strings the chunks together (a chunk multiplies
// its start by 2^(A sum delta)), and `apart` scans each from its true start. With samples enough,
// `walk` does all in one pass, a local state beside the true one, to the same bits.
// Floor: one 2^x per state and step (two where chunks are apart), 16 a clock and multiprocessor.
#pragma once

#include "scan_tile.cuh"

namespace pydiffuse {
namespace {

enum class Pass { local, apart, walk };

struct ScanArgs {
  ScanCall call;
  Shares shares;
  int path = 0, blocks = 0, chunks = 0;  // blocks: of 64 channels
  // [batch, paths or 1, chunks, channels, states]: the state before each chunk, as the step before
  // left it; `local` leaves a chunk's own end in the next one's place. Null where walk keeps none.
  float* states = nullptr;
  int64_t states_batch = 0;      // floats from sample to sample
  float* sums = nullptr;         // [batch, chunks, channels]: of delta over each chunk
  const float* dlast = nullptr;  // carry_kernel and gradient_kernel alone use what follows
  float* dinitial = nullptr;
  Tokens dout;

  __device__ int64_t floats() const { return call.channels * call.states; }
  __device__ float* state(int64_t sample, int chunk) const {  // [channels, states]
    return states + sample * states_batch + chunk * floats();
  }
  // [channels, states] of a tensor [batch, sequences, paths, channels, states], or null
  template <class Float>
  __device__ Float* state_of(Float* all, int64_t sample, int sequence) const {
    if (!all) return nullptr;
    return all + ((sample * call.sequences + sequence) * call.paths + path) * floats();
  }
  __device__ Sequences sequences() const {
    return {call.offsets, call.sequences, static_cast<int>(call.length)};
  }
  __device__ const int32_t* order() const {
    return call.order ? call.order + path * call.length : nullptr;
  }
};

// The states of one thread.
template <int NB>
struct Lane {
  int64_t channel;
  int64_t at;   // of the first state, in [channels, states]
  bool exists;  // the channel does
  int count;    // states of it that do

  __device__ Lane(const ScanArgs& a, const Share& share, int block) {
    const int local = threadIdx.x / LANES, n = (block * LANES + threadIdx.x % LANES) * NB;
    channel = share.first + local;
    at = channel * a.call.states + n;
    exists = local < share.count;
    count = exists ? a.call.states - n : 0;
  }
  __device__ void get(const float* p, float (&x)[NB]) const {  // 0 where p is null
#pragma unroll
    for (int j = 0; j < NB; ++j) x[j] = p && j < count ? p[at + j] : 0.0f;
  }
  __device__ void set(float* p, const float (&x)[NB]) const {
    if (!p) return;
#pragma unroll
    for (int j = 0; j < NB; ++j)
      if (j < count) p[at + j] = x[j];
  }
};

template <int NB>
constexpr int WEIGHTS = STEPS * LANES * NB;  // floats of B or C in shared memory

// B or C of a block of states: a row for each step, or, for constants, one for each thread.
template <int NB>
struct WeightRows {
  const float* own;
  int step;  // floats from step to step

  // zeros, if not null, stand in for a channel that is not there.
  __device__ WeightRows(const Weights& w, const float* shared, const float* zeros = nullptr)
      : own(shared + NB * (w.constant ? threadIdx.x : threadIdx.x % LANES)),
        step(w.constant ? 0 : LANES * NB) {
    if (zeros) own = zeros, step = 0;
  }
  __device__ void get(int i, float (&x)[NB]) const {
    const float* p = own + i * step;
    if constexpr (NB == 4) {
      const float4 four = reinterpret_cast<const float4&>(*p);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
      const float2 two = reinterpret_cast<const float2&>(*p);
      x[0] = two.x, x[1] = two.y;
    }
  }
};

// By all threads. Consecutive threads take consecutive states or consecutive steps, as they lie in
// memory.
template <int NB>
__device__ __forceinline__ void put_weights(float* to, const Weights& w, const ScanArgs& a,
                                            const Share& share, const Tile64& t, int64_t sample,
                                            int block) {
  constexpr int ROW = LANES * NB;
  if (w.constant) {
    float x[NB];
    Lane<NB>(a, share, block).get(static_cast<const float*>(w.data) + a.path * a.floats(), x);
#pragma unroll
    for (int j = 0; j < NB; ++j) to[threadIdx.x * NB + j] = x[j];
    return;
  }
  const int size = bytes<true>(w.dtype);
  const char* base = static_cast<const char*>(w.data) +
                     (sample * w.batch + a.path * w.path + share.group * w.group) * size;
  const bool turned = w.token == 1 && w.state != 1;
  Raw<1> raw[NB];
  int slot[NB];
#pragma unroll
  for (int i = 0; i < NB; ++i) {
    const int e = threadIdx.x + THREADS * i, step = turned ? e % STEPS : e / ROW,
              state = turned ? e / STEPS : e % ROW, n = block * ROW + state;
    slot[i] = step * ROW + state;
    raw[i].q[0].x = 0;
    if (step < t.span && t.tokens[step] >= 0 && n < a.call.states)
      raw[i] = load<1, true>(base + (t.tokens[step] * w.token + n * w.state) * size, w.dtype);
  }
#pragma unroll
  for (int i = 0; i < NB; ++i) {
    float x[1];
    widen<1, true>(raw[i], w.dtype, x);
    to[slot[i]] = x[0];
  }
}

// delta as the recurrence takes it.
__device__ __forceinline__ void put_delta(float* to, const ScanArgs& a, const Share& share,
                                          const Tile64& t, int64_t sample) {
  const float* bias = a.call.bias ? a.call.bias + a.path * a.call.channels + share.first : nullptr;
  const Plane p(a.call.delta, sample, a.path, share.first);
  put(to, t, p, p, false, [&](int channel, float delta, float) {
    const float x = bias ? __fadd_rn(delta, bias[channel]) : delta;
    return a.call.softplus ? softplus(x) : x;
  });
}

// What four steps do that does not wait for a state: h <- decay h + input.
template <int NB>
struct Four {
  float decay[4][NB], input[4][NB];

  __device__ Four(const float4& delta, const float4& u, const float (&A)[NB],
                  const WeightRows<NB>& B, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float d = pick(delta, i), x = d * pick(u, i);
      float b[NB];
      B.get(step + i, b);
#pragma unroll
      for (int j = 0; j < NB; ++j) {
        decay[i][j] = exp2_fast(d * A[j]);
        input[i][j] = x * b[j];
      }
    }
  }
};

__device__ __forceinline__ void add(float& sum, const float4& x) {  // in the order of the steps
  sum += x.x;
  sum += x.y;
  sum += x.z;
  sum += x.w;
}

template <int NB>
constexpr int scan_floats(Pass pass, bool wide) {  // of shared memory
  return PLANE * (pass == Pass::local || !wide ? 2 : 3) +
         WEIGHTS<NB> * (pass == Pass::local ? 1 : 2) + STEPS +
         (pass == Pass::walk ? THREADS * NB : 0);
}

template <int NB, Pass PASS>
__global__ void __launch_bounds__(THREADS, 2) scan_kernel(const __grid_constant__ ScanArgs a) {
  extern __shared__ float4 block_memory[];
  const ScanCall& call = a.call;
  const int state_blocks = (call.states + LANES * NB - 1) / (LANES * NB);
  float* const delta = reinterpret_cast<float*>(block_memory);  // [channels, steps]
  float* const u = delta + PLANE;
  // y takes the place of u, unless later blocks of states need u again.
  float* const y = PASS == Pass::local || state_blocks == 1 ? u : u + PLANE;
  float* const B = y + PLANE;  // [steps, states]
  float* const C = B + WEIGHTS<NB>;
  int* const tokens = reinterpret_cast<int*>(PASS == Pass::local ? C : C + WEIGHTS<NB>);

  int64_t block = blockIdx.x;
  const Share share = a.shares[static_cast<int>(block % a.blocks)];
  block /= a.blocks;
  const int scanned = PASS == Pass::walk ? 1 : PASS == Pass::local ? a.chunks - 1 : a.chunks;
  int chunk = static_cast<int>(block % scanned);
  const int64_t sample = block / scanned;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES * PITCH;
  const Sequences sequences = a.sequences();
  // walk: the true state before the chunk, in shared memory to spare registers.
  float* const carried = reinterpret_cast<float*>(tokens + STEPS) + threadIdx.x * NB;

  const int last_chunk = PASS == Pass::walk ? a.chunks - 1 : chunk;
  for (; chunk <= last_chunk; ++chunk) {
    const int first = chunk * STEPS,
              steps = static_cast<int>(min(int64_t(STEPS), call.length - first));
    const Tile64 tile{span_of(steps), share.count, tokens};
    if (PASS == Pass::walk) __syncthreads();  // the chunk before is done with shared memory
    set_tokens(tokens, a.order(), first, first + steps, call.length);
    __syncthreads();
    put_delta(delta, a, share, tile, sample);
    put_plain(u, tile, Plane(call.u, sample, 0, share.first));

    for (int states = 0; states < state_blocks; ++states) {
      if (states > 0) __syncthreads();  // the block before is done with B and C
      put_weights<NB>(B, call.B, a, share, tile, sample, states);
      if (PASS != Pass::local) put_weights<NB>(C, call.C, a, share, tile, sample, states);
      __syncthreads();
      const WeightRows<NB> rows_B(call.B, B), rows_C(call.C, C);
      const Lane<NB> own(a, share, states);
      float A[NB], h[NB], local[NB], sum = 0.0f;
      own.get(call.A + a.path * a.floats(), A);
#pragma unroll
      for (int j = 0; j < NB; ++j) A[j] *= LOG2E;
      int sequence = sequences.at(first), next = sequences.end(sequence);
      const bool starts = sequences.begin(sequence) >= first;
      own.get(starts ? a.state_of(call.initial, sample, sequence) : nullptr, local);
      if (starts || PASS == Pass::local) {
#pragma unroll
        for (int j = 0; j < NB; ++j) h[j] = local[j];
      } else if (PASS == Pass::apart) {
        own.get(a.state(sample, chunk), h);
      } else {
#pragma unroll
        for (int j = 0; j < NB; ++j) h[j] = carried[j];
      }
      if (PASS == Pass::walk && chunk == 0 && a.states) own.set(a.state(sample, 0), h);
      const bool finishes = states == state_blocks - 1;
      const float skip = call.D && own.exists ? call.D[a.path * call.channels + own.channel] : 0.0f;

#pragma unroll 1
      for (int four = 0; four < steps; four += 4) {
        const float4 delta4 = reinterpret_cast<const float4&>(delta[row + four]),
                     u4 = reinterpret_cast<const float4&>(u[row + four]);
        const bool event = next < first + four + 4;  // a sequence begins here
        add(sum, delta4);
        const Four<NB> now(delta4, u4, A, rows_B, four);
        float c[4][NB], y4[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (PASS != Pass::local) rows_C.get(four + i, c[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (event && first + four + i == next && next < first + steps) {
            if (PASS != Pass::local) own.set(a.state_of(call.last, sample, sequence), h);
            sequence = sequences.at(next);
            next = sequences.end(sequence);
            own.get(a.state_of(call.initial, sample, sequence), h);
#pragma unroll
            for (int j = 0; j < NB; ++j) local[j] = h[j];
          }
          y4[i] = 0.0f;
#pragma unroll
          for (int j = 0; j < NB; ++j) {
            h[j] = fmaf(now.decay[i][j], h[j], now.input[i][j]);
            if (PASS == Pass::walk) local[j] = fmaf(now.decay[i][j], local[j], now.input[i][j]);
            if (PASS != Pass::local && j < own.count) y4[i] = fmaf(c[i][j], h[j], y4[i]);
          }
        }
        if (PASS == Pass::local) continue;
        float result = sum_lanes(y4);  // of step four + lane
        if (states > 0) result += y[row + four + lane];
        if (call.D && finishes) result = fmaf(skip, pick(u4, lane), result);
        __syncwarp();  // all four lanes have u
        y[row + four + lane] = result;
      }

      if (PASS == Pass::local) {
        own.set(a.state(sample, chunk + 1), h);
        if (lane == 0 && own.count > 0 && states == 0)
          a.sums[(sample * a.chunks + chunk) * call.channels + own.channel] = sum;
        continue;
      }
      if (next == first + steps) own.set(a.state_of(call.last, sample, sequence), h);
      if (PASS == Pass::walk) {
        const bool restarted = sequences.start_within(first, steps);
#pragma unroll
        for (int j = 0; j < NB; ++j)
          carried[j] = h[j] =
              restarted ? local[j] : fmaf(exp2_fast(A[j] * sum), carried[j], local[j]);
        if (a.states && chunk < last_chunk) own.set(a.state(sample, chunk + 1), h);
      }
    }
    if (PASS == Pass::local) continue;
    __syncthreads();
    const Plane out(call.out, sample, 0, share.first), z(call.z, sample, 0, share.first);
    give(out, tile, a.path > 0, call.z.data ? 1 : 0, z, z,
         [&](int channel, int step, float gate, float) {
           const float y_l = y[channel * PITCH + step];
           return call.z.data ? y_l * silu(gate) : y_l;
         });
  }
}

struct CombineArgs {
  ScanArgs scan;
  bool reverse;  // the adjoint: from the last chunk to the first, each carry in its chunk's place
};

// Chunk after chunk, a thread per state: a chunk's own end plus what its start decays to.
__global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ CombineArgs all) {
  const ScanArgs& a = all.scan;
  const ScanCall& call = a.call;
  const int64_t floats = a.floats(), i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= call.batch * floats) return;
  const int64_t sample = i / floats, at = i % floats, channel = at / call.states;
  const Sequences sequences = a.sequences();
  const float A = call.A[a.path * floats + at] * LOG2E;
  float h = 0.0f;
  if (!all.reverse) {
    const float* initial = a.state_of(call.initial, sample, sequences.at(0));
    h = initial ? initial[at] : 0.0f;
    a.state(sample, 0)[at] = h;
  }
  constexpr int AHEAD = 8;  // chunks whose loads are under way together
  for (int from = 0; from < a.chunks - 1; from += AHEAD) {
    float own[AHEAD], sum[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (from + j < a.chunks - 1) {
        const int chunk = all.reverse ? a.chunks - 1 - from - j : from + j;
        own[j] = a.state(sample, all.reverse ? chunk : chunk + 1)[at];
        sum[j] = a.sums[(sample * a.chunks + chunk) * call.channels + channel];
      }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (from + j < a.chunks - 1) {
        const int chunk = all.reverse ? a.chunks - 1 - from - j : from + j, first = chunk * STEPS,
                  steps = static_cast<int>(min(int64_t(STEPS), call.length - first));
        const bool alone = (all.reverse && from + j == 0) || sequences.start_within(first, steps);
        h = alone ? own[j] : fmaf(exp2_fast(A * sum[j]), h, own[j]);
        a.state(sample, all.reverse ? chunk : chunk + 1)[at] = h;
      }
  }
}

}  // namespace
}  // namespace pydiffuse
