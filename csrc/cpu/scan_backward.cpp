// The gradients of the selective scan, compiled once per instruction set.
//
// An item is a block of channels and a part of the batch. It walks the chunks from the last to the
// first: the steps of a chunk are scanned again from its saved state, the state after each step is
// kept (64 kB for WIDTH channels and states), and dh is carried back through them, in registers.
// What belongs to a channel is added up in the item; dB and dC are sums over channels: lanes are
// added by a tree, vectors of channels in their order, and blocks by `reduce`. No sum depends on
// the number of threads.
#include "scan.h"

#include "scan_tile.h"

namespace pydiffuse {
namespace {

constexpr int TILE = SCAN_CHUNK;
constexpr int SUBS = SCAN_BLOCK / WIDTH;
constexpr float LN2 = 0.693147180559945309f;

// Sums over an item's steps, as lanes.
struct Sums {
  float *dA, *dB, *dC;  // [rows][WIDTH]; dB and dC for constants
  vfloat dD, dbias;
};

struct Scratch {
  // Tiles [TILE][WIDTH]. slope: of the softplus; gate: dz / y; s1 = <B, dh>; s2 = <A2, dh a h>.
  float *u, *dt, *du, *dy, *y, *slope, *gate, *s1, *s2;
  float* saved;     // the states after each step, [TILE][WIDTH states][WIDTH]
  float* dh[SUBS];  // carried to the tile before, [rows][WIDTH]
  Parameters parameters[SUBS];
  Sums sums[SUBS];
  float* stage[7];  // [length][WIDTH]

  static int64_t size(const ScanArgs& s) {
    return 9 * TILE * WIDTH + TILE * WIDTH * WIDTH + 7 * SUBS * s.rows * WIDTH +
           7 * s.call.length * WIDTH;
  }
  Scratch(const ScanArgs& s, float* p) {
    const auto take = [&p](int64_t n) { return (p += n) - n; };
    for (float** tile : {&u, &dt, &du, &dy, &y, &slope, &gate, &s1, &s2})
      *tile = take(TILE * WIDTH);
    saved = take(TILE * WIDTH * WIDTH);
    for (int i = 0; i < SUBS; ++i)
      for (float** each : {&dh[i], &parameters[i].A2, &parameters[i].B, &parameters[i].C,
                           &sums[i].dA, &sums[i].dB, &sums[i].dC})
        *each = take(s.rows * WIDTH);
    for (float*& each : stage) each = take(s.call.length * WIDTH);
  }
};

struct Tensors {
  LaneRows u, delta, z, dout, du, ddelta, dz;
};

// The steps of a run where the chunk's copies are: [step][WIDTH].
struct CopiedSteps {
  static constexpr bool SAVE = true;
  const float *u, *dt, *du;
  float *y, *saved;
  const Ahead& ahead;

  StepInput read(int l) const {
    const auto at = [l](const float* p) { return load<vfloat>(p + l * WIDTH); };
    return {at(u), at(dt), at(du)};
  }
  vfloat sum(int l) const { return load<vfloat>(y + l * WIDTH); }
  void write(int l, vfloat v) const { store(y + l * WIDTH, v); }
};

// One tile of one vector of channels: where it is.
struct Place {
  int64_t b, k, group, block, channel;
  int lanes;
  bool first;  // of the block's vectors
};

// dh_l = C_l dy_l + a_(l+1) dh_(l+1) through the steps of a run for NB states, last step first.
// dB, dC: [length][rows] of the block, by tokens; written by its first vector of channels.
template <int NB, bool CONST_B, bool CONST_C, bool PARTIAL>
__attribute__((noinline)) void reverse_run(const ScanTile<TILE>& tile, const Run& run, int state,
                                           int count, int rows, const Parameters& p,
                                           const Scratch& m, const float* start, float* carry,
                                           const Sums& sums, bool first, const Ahead& results,
                                           float* dB, float* dC) {
  vfloat dh[NB];
  for (int n = 0; n < NB; ++n) dh[n] = load<vfloat>(carry + n * WIDTH);
  const float *A2 = opaque(p.A2 + state * WIDTH), *Bc = opaque(p.B + state * WIDTH);
  const float* Cc = opaque(p.C + state * WIDTH);
  float *dA = sums.dA + state * WIDTH, *dBc = sums.dB + state * WIDTH,
        *dCc = sums.dC + state * WIDTH;
  const auto put = [&](float* sum, vfloat* parts, int64_t token) {
    float* to = sum + token * rows + state;
    const vfloat sums_of_states = lane_sums(parts);
    if constexpr (NB == WIDTH) {
      store(to, first ? sums_of_states : sums_of_states + load<vfloat>(to));
    } else {
      for (int n = 0; n < NB; ++n) to[n] = first ? sums_of_states[n] : to[n] + sums_of_states[n];
    }
  };
  for (int l = run.end - 1; l >= run.begin; --l) {
    const vfloat t = load<vfloat>(m.dt + l * WIDTH), x = load<vfloat>(m.du + l * WIDTH);
    const vfloat dy = load<vfloat>(m.dy + l * WIDTH);
    const float* b = CONST_B ? nullptr : opaque(tile.b[l] + state);
    const float* c = CONST_C ? nullptr : opaque(tile.c[l] + state);
    const float* h = opaque(m.saved + l * NB * WIDTH);
    if (state == 0) results.fetch<3, true>(l);
    const float* before = opaque(l > run.begin ? h - NB * WIDTH : start);
    vfloat s1[2] = {}, s2[2] = {}, parts_b[WIDTH] = {}, parts_c[WIDTH] = {};
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      if (PARTIAL && n >= count) continue;
      const vfloat A = load<vfloat>(A2 + n * WIDTH), hn = load<vfloat>(h + n * WIDTH);
      const vfloat d = dh[n] + dy * (CONST_C ? load<vfloat>(Cc + n * WIDTH) : splat(c[n]));
      s1[n % 2] += d * (CONST_B ? load<vfloat>(Bc + n * WIDTH) : splat(b[n]));
      if (CONST_C)
        store(dCc + n * WIDTH, load<vfloat>(dCc + n * WIDTH) + dy * hn);
      else
        parts_c[n] = dy * hn;
      if (CONST_B)
        store(dBc + n * WIDTH, load<vfloat>(dBc + n * WIDTH) + x * d);
      else
        parts_b[n] = x * d;
      dh[n] = d * vexp2(t * A);
      const vfloat g = dh[n] * load<vfloat>(before + n * WIDTH);
      s2[n % 2] += A * g;
      store(dA + n * WIDTH, load<vfloat>(dA + n * WIDTH) + t * g);
    }
    if (!CONST_B) put(dB, parts_b, tile.token[l]);
    if (!CONST_C) put(dC, parts_c, tile.token[l]);
    const vfloat sum1 = s1[0] + s1[1], sum2 = s2[0] + s2[1];
    store(m.s1 + l * WIDTH, state ? load<vfloat>(m.s1 + l * WIDTH) + sum1 : sum1);
    store(m.s2 + l * WIDTH, state ? load<vfloat>(m.s2 + l * WIDTH) + sum2 : sum2);
  }
  for (int n = 0; n < NB; ++n) store(carry + n * WIDTH, dh[n]);
}

// u, delta and their product; dy and dz / y from dout and z.
void read_tile(const ScanCall& call, const ScanTile<TILE>& tile, const Tensors& rows,
               const Parameters& p, const Scratch& m) {
  for_rows(
      rows.delta, rows.u, tile,
      [=, u = m.u, dt = m.dt, du = m.du, slope = m.slope, bias = p.bias, softplus = call.softplus](
          auto e, auto f, int l, const void* delta_row, const void* u_row, int n) {
        const vfloat x = read_lanes<decltype(f)>(u_row, n);
        vfloat t = read_lanes<decltype(e)>(delta_row, n) + bias;
        if (softplus) {
          store(slope + l * WIDTH, t > 20.0f ? splat(1.0f) : vsigmoid(t));
          t = vsoftplus(t);
        }
        store(u + l * WIDTH, x);
        store(dt + l * WIDTH, t);
        store(du + l * WIDTH, t * x);
      });
  if (!rows.z) return read_rows(rows.dout, tile, m.dy);
  for_rows(rows.z, rows.dout, tile,
           [dy = m.dy, gate = m.gate](auto e, auto f, int l, const void* z_row,
                                      const void* dout_row, int n) {
             const vfloat z = read_lanes<decltype(e)>(z_row, n), s = vsigmoid(z);
             const vfloat g = read_lanes<decltype(f)>(dout_row, n) * s;
             store(dy + l * WIDTH, g * z);
             store(gate + l * WIDTH, g * (1.0f + z * (1.0f - s)));
           });
}

void write_tile(const ScanCall& call, const ScanTile<TILE>& tile, const Tensors& rows,
                const Parameters& p, const Scratch& m, bool add, Sums& sums) {
  for (int l = 0; l < tile.steps; ++l) {
    const auto at = [l](float* t) { return load<vfloat>(t + l * WIDTH); };
    const vfloat u = at(m.u), dy = at(m.dy), s1 = at(m.s1);
    vfloat ddelta = u * s1 + at(m.s2) * LN2;
    if (call.softplus) ddelta *= at(m.slope);
    sums.dD += dy * u;
    sums.dbias += ddelta;
    store(m.s1 + l * WIDTH, p.skips ? at(m.dt) * s1 + p.D * dy : at(m.dt) * s1);
    store(m.s2 + l * WIDTH, ddelta);
    if (rows.z) store(m.y + l * WIDTH, at(m.y) * at(m.gate));
  }
  write_rows(rows.du, tile, add, m.s1);
  write_rows(rows.ddelta, tile, false, m.s2);
  if (rows.z) write_rows(rows.dz, tile, add, m.y);
}

// NB of the states before a run, from n on: a sequence's initial ones, or those saved before the
// chunk.
template <int NB>
void load_start(const ScanCall& call, const Run& run, const Place& at, int64_t chunk, int n,
                float* to) {
  const int count = std::min(NB, call.states - n);
  const float* from = nullptr;
  if (!run.starts)
    from = chunk_state(call, at.b, at.k, chunk, at.channel);
  else if (call.initial)
    from = call.initial + state_index(call, at.b, run.sequence, at.k, at.channel);
  if (from)
    rows_to_lanes(from + n, call.states, at.lanes, count, NB, 1.0f, to);
  else
    std::fill(to, to + NB * WIDTH, 0.0f);
}

void backward_tile(const ScanBackwardArgs& a, const ScanTile<TILE>& tile, const Tensors& rows,
                   const Place& at, const Parameters& p, const Ahead& ahead, Sums& sums,
                   float* carry, Scratch& m) {
  const ScanArgs& s = a.scan;
  const ScanCall& call = s.call;
  read_tile(call, tile, rows, p, m);
  const Ahead results(tile.token, false, rows.du, rows.ddelta, rows.dz, {});
  const int64_t row = ((at.b * call.paths + at.k) * call.groups + at.group) * s.blocks + at.block;
  float* dB = a.dB ? a.dB + row * call.length * s.rows : nullptr;
  float* dC = a.dC ? a.dC + row * call.length * s.rows : nullptr;
  const int64_t chunk = tile.first / SCAN_CHUNK;
  const CopiedSteps steps{m.u, m.dt, m.du, m.y, m.saved, ahead};
  alignas(64) float h[WIDTH * WIDTH], start[WIDTH * WIDTH];
  const auto block = [&](int n, auto nb, auto const_b, auto const_c, auto partial) {
    constexpr int NB = nb;
    const int count = std::min(NB, call.states - n);
    float* dh = carry + n * WIDTH;
    for (int r = 0; r < tile.runs; ++r) {
      const Run& run = tile.run[r];
      if (run.starts || r == 0) load_start<NB>(call, run, at, chunk, n, h);
      scan_run<NB, const_b, const_c, partial>(tile, run, n, count, p, steps, h);
    }
    for (int r = tile.runs - 1; r >= 0; --r) {
      const Run& run = tile.run[r];
      const int64_t state = state_index(call, at.b, run.sequence, at.k, at.channel) + n;
      load_start<NB>(call, run, at, chunk, n, start);
      if (run.ends && a.call.dlast)
        rows_to_lanes(a.call.dlast + state, call.states, at.lanes, count, NB, 1.0f, dh);
      else if (run.ends)
        std::fill(dh, dh + NB * WIDTH, 0.0f);
      reverse_run<NB, const_b, const_c, partial>(tile, run, n, count, s.rows, p, m, start, dh, sums,
                                                 at.first, results, dB, dC);
      if (run.starts && a.call.dinitial)
        lanes_to_rows(dh, call.states, at.lanes, count, a.call.dinitial + state);
    }
  };
  with_states(s, [&](auto nb, auto const_b, auto const_c) {
    for (int n = 0; n < s.rows; n += nb)
      n + nb <= call.states ? block(n, nb, const_b, const_c, std::false_type{})
                            : block(n, nb, const_b, const_c, std::true_type{});
  });
  write_tile(call, tile, rows, p, m, at.k > 0, sums);
}

void finish_empty(const ScanBackwardArgs& a, const Block& block, int64_t b) {
  const ScanCall& call = a.scan.call;
  if (!a.call.dinitial) return;
  for (int64_t q = 0; q < call.sequences; ++q) {
    const int64_t steps = call.offsets ? call.offsets[q + 1] - call.offsets[q] : call.length;
    for (int64_t k = 0; steps == 0 && k < call.paths; ++k) {
      const int64_t at = state_index(call, b, q, k, block.channel);
      const int64_t n = int64_t(block.channels) * call.states;
      if (a.call.dlast)
        std::copy(a.call.dlast + at, a.call.dlast + at + n, a.call.dinitial + at);
      else
        std::fill(a.call.dinitial + at, a.call.dinitial + at + n, 0.0f);
    }
  }
}

// Path k of sample b for the vectors [first, last) of a block.
void backward_path(const ScanBackwardArgs& a, const Block& block, int64_t index, int64_t b,
                   int64_t k, int first, int last, const Tensors* rows, Scratch& m) {
  const ScanCall& call = a.scan.call;
  ScanTile<TILE> tile;
  int64_t sequence = call.sequences - 1;
  for (int64_t step = (call.length - 1) / TILE * TILE; step >= 0 && call.length; step -= TILE) {
    if (call.offsets)
      while (sequence > 0 && call.offsets[sequence] > step) --sequence;
    int64_t current = sequence;
    tile.set_path(a.scan, b, k, block.group, step, -TILE, current);
    for (int i = first; i < last; ++i) {
      const Place at{
          b,     k, block.group, index % a.scan.blocks, block.channel + i * WIDTH, block.lanes(i),
          i == 0};
      // While a vector of channels is scanned, the next one's rows come, or those of the next tile.
      const bool more = i + 1 < last;
      const Tensors& next = rows[more ? i + 1 : first];
      const Ahead ahead(more ? tile.token : tile.next, !more && tile.wraps, next.u, next.delta,
                        next.z, next.dout);
      backward_tile(a, tile, rows[i], at, m.parameters[i], ahead, m.sums[i], m.dh[i], m);
    }
  }
}

// An item's sums to its part of the partial ones.
void write_sums(const ScanBackwardArgs& a, int64_t part, int64_t k, int64_t channel, int lanes,
                const Sums& sums) {
  const ScanCall& call = a.scan.call;
  const int64_t first = (part * call.paths + k) * call.channels + channel;
  const int64_t states = first * call.states;
  lanes_to_rows(sums.dA, call.states, lanes, call.states, a.dA + states);
  if (a.dBconst) lanes_to_rows(sums.dB, call.states, lanes, call.states, a.dBconst + states);
  if (a.dCconst) lanes_to_rows(sums.dC, call.states, lanes, call.states, a.dCconst + states);
  write_lanes<F32>(a.dD + first, sums.dD, lanes);
  write_lanes<F32>(a.dbias + first, sums.dbias, lanes);
}

// Items: [groups, blocks, parts].
void backward(const ScanBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const ScanCall& call = a.scan.call;
  const int64_t L = call.length;
  Scratch m(a.scan, scratch);
  const Tokens* inputs[] = {&call.u, &call.delta, &call.z, &a.call.dout};
  const Tokens* outputs[] = {&a.call.du, &a.call.ddelta, &a.call.dz};
  bool stage = false;
  for (const Tokens* t : inputs) stage = stage || needs_stage(*t);
  for (const Tokens* t : outputs) stage = stage || needs_stage(*t);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t index = item / a.parts, part = item % a.parts;
    const int64_t from = part * call.batch / a.parts, to = (part + 1) * call.batch / a.parts;
    const Block block = block_of(a.scan, index);
    for (int64_t b = from; b < to; ++b) finish_empty(a, block, b);
    for (int first = 0; first < block.subs; first = stage ? first + 1 : block.subs) {
      const int last = stage ? first + 1 : block.subs;
      for (int64_t k = 0; k < call.paths; ++k) {
        for (int i = first; i < last; ++i) {
          m.parameters[i].load_from(a.scan, k, block.channel + i * WIDTH, block.lanes(i));
          for (float* sum : {m.sums[i].dA, m.sums[i].dB, m.sums[i].dC})
            std::fill(sum, sum + a.scan.rows * WIDTH, 0.0f);
          m.sums[i].dD = m.sums[i].dbias = vfloat{};
        }
        for (int64_t b = from; b < to; ++b) {
          Tensors rows[SUBS];
          for (int i = first; i < last; ++i) {
            const int64_t channel = block.channel + i * WIDTH;
            LaneRows* in[] = {&rows[i].u, &rows[i].delta, &rows[i].z, &rows[i].dout};
            LaneRows* out[] = {&rows[i].du, &rows[i].ddelta, &rows[i].dz};
            const auto rows_of = [&](const Tokens& t, float* to_, bool read) {
              return needs_stage(t) ? staged(t, b, k, channel, block.lanes(i), L, to_, read)
                                    : in_place(t, b, k, channel, block.lanes(i));
            };
            for (int j = 0; j < 4; ++j) *in[j] = rows_of(*inputs[j], m.stage[j], true);
            for (int j = 0; j < 3; ++j)
              *out[j] = rows_of(*outputs[j], m.stage[4 + j], k > 0 && j != 1);
          }
          backward_path(a, block, index, b, k, first, last, rows, m);
          for (int j = 0; j < 3; ++j)
            if (needs_stage(*outputs[j]))
              unstage(m.stage[4 + j], *outputs[j], b, k, block.channel + first * WIDTH,
                      block.lanes(first), L);
        }
        for (int i = first; i < last; ++i)
          write_sums(a, part, k, block.channel + i * WIDTH, block.lanes(i), m.sums[i]);
      }
    }
  }
}

int64_t backward_scratch(const ScanBackwardArgs& a) { return Scratch::size(a.scan); }

// dB and dC: the blocks' sums added in their order.
void reduce(const ScanBackwardArgs& a, int64_t begin, int64_t end) {
  const ScanArgs& s = a.scan;
  const int64_t each = s.call.length * s.rows;
  const int states = s.call.states;
  for (auto [partial, out] : {std::pair{a.dB, a.call.dB}, {a.dC, a.call.dC}}) {
    if (!partial || partial == out) continue;
    if (s.blocks == 0) {  // no channels
      std::fill(out + begin * s.call.length * states, out + end * s.call.length * states, 0.0f);
      continue;
    }
    for (int64_t item = begin; item < end; ++item)
      for (int64_t l = 0; l < s.call.length; ++l) {
        const float* from = partial + item * s.blocks * each + l * s.rows;
        float* to = out + (item * s.call.length + l) * states;
        for (int n = 0; n < states; ++n) to[n] = from[n];
        for (int64_t block = 1; block < s.blocks; ++block)
          for (int n = 0; n < states; ++n) to[n] += from[block * each + n];
      }
  }
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(ScanBackwardKernels, scan_backward) = {pydiffuse::backward_scratch,
                                                       pydiffuse::backward, pydiffuse::reduce};
