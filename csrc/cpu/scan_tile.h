// Tiles of the selective scan: what its forward and its backward share.
//
// A tile is up to TILE steps of WIDTH channels and where the rows of each step's token lie. What of
// it is copied, into the first-level cache, is [step][lane]. The states of WIDTH channels are
// [state][lane]; within a run of steps, WIDTH states at a time are registers.
#pragma once

#include "math.h"
#include "scan.h"
#include "tile.h"

namespace pydiffuse {
namespace {

inline Block block_of(const ScanArgs& s, int64_t index) {
  return Block(index, s.blocks, s.group_channels(), SCAN_BLOCK);
}

template <int STEPS>
struct ScanTile : Tile<STEPS> {
  const float *b[STEPS], *c[STEPS];  // [rows] of each step's token; not set where B (C) is constant

  void set_path(const ScanArgs& s, int64_t batch, int64_t k, int64_t group, int64_t first,
                int64_t ahead, int64_t& sequence) {
    const ScanCall& call = s.call;
    this->set(call.order ? call.order + k * call.length : nullptr, call.offsets, call.length, first,
              ahead, sequence);
    auto rows = [&](const Weights& w, const float* packed, const float** row) {
      if (w.constant) return;
      const float* base =
          packed
              ? packed + ((batch * call.paths + k) * call.groups + group) * call.length * s.rows
              : static_cast<const float*>(w.data) + batch * w.batch + k * w.path + group * w.group;
      const int64_t stride = packed ? s.rows : w.token;
      for (int l = 0; l < this->steps; ++l) row[l] = base + this->token[l] * stride;
    };
    rows(call.B, s.B, b);
    rows(call.C, s.C, c);
  }
};

// The parameters of WIDTH channels for one path, as lanes.
struct Parameters {
  float* A2;       // [rows][WIDTH], times log2(e)
  float *B, *C;    // [rows][WIDTH], constants only
  vfloat D, bias;  // 0 where there is none
  bool skips;      // there is a D: 0 times an infinite u would be NaN

  void load_from(const ScanArgs& s, int64_t k, int64_t channel, int lanes) {
    const ScanCall& call = s.call;
    const int64_t first = k * call.channels + channel;
    const auto to_lanes = [&](const void* data, float scale, float* dst) {
      rows_to_lanes(static_cast<const float*>(data) + first * call.states, call.states, lanes,
                    call.states, s.rows, scale, dst);
    };
    to_lanes(call.A, LOG2E, A2);
    if (call.B.constant) to_lanes(call.B.data, 1.0f, B);
    if (call.C.constant) to_lanes(call.C.data, 1.0f, C);
    skips = call.D;
    D = call.D ? read_lanes<F32>(call.D + first, lanes) : vfloat{};
    bias = call.bias ? read_lanes<F32>(call.bias + first, lanes) : vfloat{};
  }
};

// States as the caller has them, [.., channels, states], at [b, sequence, k, channel].
inline int64_t state_index(const ScanCall& call, int64_t b, int64_t sequence, int64_t k,
                           int64_t channel) {
  return (((b * call.sequences + sequence) * call.paths + k) * call.channels + channel) *
         call.states;
}

// The saved states before a chunk, [.., channels, states], from a channel on.
inline float* chunk_state(const ScanCall& call, int64_t b, int64_t k, int64_t chunk,
                          int64_t channel) {
  return call.chunks +
         (((b * call.paths + k) * call.chunk_count() + chunk) * call.channels + channel) *
             call.states;
}

// The pointer itself, of unknown origin: g++ then addresses what follows by constant offsets from
// it, instead of keeping a register (soon a stack slot) for each.
inline const float* opaque(const float* p) {
  asm("" : "+r"(p));
  return p;
}

// What a step starts from: u, delta as it enters the exponential, and delta u.
struct StepInput {
  vfloat u, t, x;
};

// The steps of a run for NB states, from h: [NB][WIDTH] and back. Where u, delta and y lie is known
// to `steps`: read(l) gives a step's input, write(l, y) takes its part of <C, h>, added to D u at
// the first states and to sum(l), the part of the states before, after them; if SAVE, h after the
// step goes to saved[l][NB][WIDTH]. PARTIAL: only `count` of NB are states, the others stay 0.
//
// A step's input is read a step early: read in its turn, a load from beyond the first-level cache
// or a softplus would hold up all that the step computes, more than the CPU can look past.
//
// Not inlined: among other loops the compiler runs out of registers for addresses.
template <int NB, bool CONST_B, bool CONST_C, bool PARTIAL, class TILE_, class Steps>
__attribute__((noinline)) void scan_run(const TILE_& tile, const Run& run, int state, int count,
                                        const Parameters& p, const Steps& steps, float* h) {
  constexpr int SUMS = NB < 4 ? NB : 4;  // chains of additions in flight
  vfloat H[NB];
  for (int n = 0; n < NB; ++n) H[n] = load<vfloat>(h + n * WIDTH);
  const float *A2 = opaque(p.A2 + state * WIDTH), *Bc = opaque(p.B + state * WIDTH);
  const float* Cc = opaque(p.C + state * WIDTH);
  StepInput next = steps.read(run.begin);
  for (int l = run.begin; l < run.end; ++l) {
    const auto [u, t, x] = next;
    if (state == 0) steps.ahead.fetch(l);
    next = steps.read(std::min(l + 1, run.end - 1));
    const float* b = CONST_B ? nullptr : opaque(tile.b[l] + state);
    const float* c = CONST_C ? nullptr : opaque(tile.c[l] + state);
    vfloat sum[SUMS] = {};
    if (state)
      sum[0] = steps.sum(l);
    else if (p.skips)
      sum[0] = p.D * u;
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      if (PARTIAL && n >= count) continue;
      const vfloat a = vexp2(t * load<vfloat>(A2 + n * WIDTH));
      H[n] = a * H[n] + x * (CONST_B ? load<vfloat>(Bc + n * WIDTH) : splat(b[n]));
      sum[n % SUMS] += H[n] * (CONST_C ? load<vfloat>(Cc + n * WIDTH) : splat(c[n]));
      if constexpr (Steps::SAVE) store(steps.saved + (l * NB + n) * WIDTH, H[n]);
    }
    for (int width = SUMS / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
    steps.write(l, sum[0]);
  }
  for (int n = 0; n < NB; ++n) store(h + n * WIDTH, H[n]);
}

// f(states at a time, constant B, constant C), all known when compiling: fewer states than lanes
// are rounded up to a power of two, more are taken WIDTH at a time; constants have whole vectors.
template <class F>
inline void with_states(const ScanArgs& s, const F& f) {
  using std::integral_constant;
  const bool b = s.call.B.constant, c = s.call.C.constant;
  const auto whole = integral_constant<int, WIDTH>{};
  if (b && c) return f(whole, std::true_type{}, std::true_type{});
  if (b) return f(whole, std::true_type{}, std::false_type{});
  if (c) return f(whole, std::false_type{}, std::true_type{});
  const auto no = std::false_type{};
  switch (s.rows) {
    case 1:
      return f(integral_constant<int, 1>{}, no, no);
    case 2:
      return f(integral_constant<int, 2>{}, no, no);
    case 4:
      if constexpr (WIDTH > 4) return f(integral_constant<int, 4>{}, no, no);
      break;
    case 8:
      if constexpr (WIDTH > 8) return f(integral_constant<int, 8>{}, no, no);
      break;
  }
  f(whole, no, no);
}

}  // namespace
}  // namespace pydiffuse
