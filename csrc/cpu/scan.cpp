// The selective scan, compiled once per instruction set.
//
// Lanes are channels, WIDTH of them; WIDTH states at a time are registers, so a step is WIDTH
// exponentials and three times as many multiply-adds with no memory but A, and B and C, which are
// broadcast. An item walks its steps tile by tile, and within a tile its vectors of channels one by
// one, so that a token's channels are read as one stretch of memory. A path is nothing but the
// address of a step's row: rows of float32 are read, gated and written where they lie.
#include "scan.h"

#include "scan_tile.h"

namespace pydiffuse {
namespace {

constexpr int TILE = 64;
static_assert(SCAN_CHUNK % TILE == 0);
constexpr int SUBS = SCAN_BLOCK / WIDTH;

struct Scratch {
  float *u, *delta, *z, *out, *y;  // tiles [TILE][WIDTH]
  float* h[SUBS];                  // [rows][WIDTH]
  Parameters parameters[SUBS];
  float *su, *sdelta, *sz, *sout;  // staged tensors [length][WIDTH]

  static int64_t size(const ScanArgs& s) {
    return 5 * TILE * WIDTH + SUBS * 4 * s.rows * WIDTH + 4 * s.call.length * WIDTH;
  }
  Scratch(const ScanArgs& s, float* p) {
    const auto take = [&p](int64_t n) { return (p += n) - n; };
    for (float** tile : {&u, &delta, &z, &out, &y}) *tile = take(TILE * WIDTH);
    for (int i = 0; i < SUBS; ++i) {
      h[i] = take(s.rows * WIDTH);
      for (float** each : {&parameters[i].A2, &parameters[i].B, &parameters[i].C})
        *each = take(s.rows * WIDTH);
    }
    for (float** stage : {&su, &sdelta, &sz, &sout}) *stage = take(s.call.length * WIDTH);
  }
};

// The rows of the tensors for one vector of channels and one path.
struct Tensors {
  LaneRows u, delta, z, out;
};

// A row of float32 and of a whole vector for each step of a tile.
struct StepRows {
  char* data;
  int64_t stride;        // bytes
  const int64_t* index;  // of each step's row

  float* at(int l) const { return reinterpret_cast<float*>(data + index[l] * stride); }
};

constexpr struct Counting {
  int64_t at[TILE];
  constexpr Counting() : at() {
    for (int l = 0; l < TILE; ++l) at[l] = l;
  }
} STEP;

bool in_float_vectors(const LaneRows& rows) {
  return rows.dtype == DType::f32 && rows.lanes == WIDTH;
}

// Where the steps of a tile are read and written: the rows themselves, else the tile's copies.
struct RowSteps {
  static constexpr bool SAVE = false;
  StepRows u, delta, z, out;
  float* y;     // [step][WIDTH]: the sums over the states so far
  vfloat bias;  // of delta
  bool softplus, gated, add;
  bool last;  // states of the channels
  const Ahead& ahead;

  StepInput read(int l) const {
    const vfloat x = load<vfloat>(u.at(l));
    vfloat t = load<vfloat>(delta.at(l)) + bias;
    if (softplus) t = vsoftplus(t);
    return {x, t, t * x};
  }
  vfloat sum(int l) const { return load<vfloat>(y + l * WIDTH); }
  void write(int l, vfloat v) const {
    if (!last) return store(y + l * WIDTH, v);
    if (gated) {
      const vfloat g = load<vfloat>(z.at(l));
      v *= g * vsigmoid(g);
    }
    if (add) v += load<vfloat>(out.at(l));
    store(out.at(l), v);
  }
};

RowSteps steps_of(const ScanArgs& s, const ScanTile<TILE>& tile, const Tensors& rows,
                  const Parameters& p, bool add, const Ahead& ahead, Scratch& m) {
  const auto in_tile = [](float* copy) {
    return StepRows{reinterpret_cast<char*>(copy), WIDTH * 4, STEP.at};
  };
  const auto rows_of = [&](const LaneRows& r, float* copy, bool read) {
    if (in_float_vectors(r)) return StepRows{r.data, r.stride, tile.token};
    if (r && read) read_rows(r, tile, copy);
    return in_tile(copy);
  };
  RowSteps steps{rows_of(rows.u, m.u, true),
                 {},
                 rows_of(rows.z, m.z, true),
                 rows_of(rows.out, m.out, add),
                 m.y,
                 p.bias,
                 s.call.softplus,
                 bool(rows.z),
                 add,
                 true,
                 ahead};
  if (s.call.softplus && s.rows > WIDTH) {  // once, not for every vector of states
    for_rows(rows.delta, tile,
             [dt = m.delta, bias = p.bias](auto e, int l, const void* row, int n) {
               store(dt + l * WIDTH, vsoftplus(read_lanes<decltype(e)>(row, n) + bias));
             });
    steps.delta = in_tile(m.delta);
    steps.bias = vfloat{};
    steps.softplus = false;
  } else {
    steps.delta = rows_of(rows.delta, m.delta, true);
  }
  return steps;
}

// One tile of one vector of channels.
void scan_tile(const ScanArgs& s, const ScanTile<TILE>& tile, const Tensors& rows,
               const Parameters& p, int64_t b, int64_t k, int64_t channel, int lanes, bool add,
               const Ahead& ahead, float* h, Scratch& m) {
  const ScanCall& call = s.call;
  const int64_t states = int64_t(s.rows) * WIDTH;
  RowSteps steps = steps_of(s, tile, rows, p, add, ahead, m);
  const auto restart = [&](const Run& run) {
    if (call.initial)
      rows_to_lanes(call.initial + state_index(call, b, run.sequence, k, channel), call.states,
                    lanes, call.states, s.rows, 1.0f, h);
    else
      std::fill(h, h + states, 0.0f);
  };
  if (tile.first == 0) restart(tile.run[0]);
  if (call.chunks && tile.first % SCAN_CHUNK == 0) {
    float* saved = chunk_state(call, b, k, tile.first / SCAN_CHUNK, channel);
    lanes_to_rows(h, call.states, lanes, call.states, saved);
  }
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = tile.run[r];
    const int64_t state = state_index(call, b, run.sequence, k, channel);
    if (run.starts && tile.first + r > 0) restart(run);
    with_states(s, [&](auto nb, auto const_b, auto const_c) {
      constexpr int NB = nb;
      for (int n = 0; n < s.rows; n += NB) {
        const int count = std::min(NB, call.states - n);
        steps.last = n + NB >= s.rows;
        const auto part = [&](auto partial) {
          scan_run<NB, const_b, const_c, partial>(tile, run, n, count, p, steps, h + n * WIDTH);
        };
        count == NB ? part(std::false_type{}) : part(std::true_type{});
      }
    });
    if (run.ends && call.last) lanes_to_rows(h, call.states, lanes, call.states, call.last + state);
  }
  if (!in_float_vectors(rows.out)) write_rows(rows.out, tile, false, m.out);
}

// All steps of path k for the vectors [first, last) of a block.
void scan_path(const ScanArgs& s, const Block& block, int64_t b, int64_t k, int first, int last,
               const Tensors* rows, Scratch& m) {
  ScanTile<TILE> tile;
  int64_t sequence = 0;
  for (int64_t step = 0; step < s.call.length; step += TILE) {
    tile.set_path(s, b, k, block.group, step, TILE, sequence);
    for (int i = first; i < last; ++i) {
      // While a vector of channels is scanned, the next one's rows come, or those of the next tile.
      const bool more = i + 1 < last;
      const Tensors& next = rows[more ? i + 1 : first];
      const Ahead ahead(more ? tile.token : tile.next, !more && tile.wraps, next.u, next.delta,
                        next.z, next.out);
      scan_tile(s, tile, rows[i], m.parameters[i], b, k, block.channel + i * WIDTH, block.lanes(i),
                k > 0, ahead, m.h[i], m);
    }
  }
}

void finish_empty(const ScanArgs& s, const Block& block, int64_t b) {
  const ScanCall& call = s.call;
  if (!call.last) return;
  for (int64_t q = 0; q < call.sequences; ++q) {
    const int64_t steps = call.offsets ? call.offsets[q + 1] - call.offsets[q] : call.length;
    for (int64_t k = 0; steps == 0 && k < call.paths; ++k) {
      const int64_t at = state_index(call, b, q, k, block.channel);
      const int64_t n = int64_t(block.channels) * call.states;
      if (call.initial && call.initial != call.last)
        std::copy(call.initial + at, call.initial + at + n, call.last + at);
      else if (!call.initial)
        std::fill(call.last + at, call.last + at + n, 0.0f);
    }
  }
}

// Items: [groups, blocks, batch], so that a thread keeps its parameters from sample to sample.
void forward(const ScanArgs& s, int64_t begin, int64_t end, float* scratch) {
  const ScanCall& call = s.call;
  Scratch m(s, scratch);
  const bool stage = needs_stage(call.u) || needs_stage(call.delta) || needs_stage(call.z) ||
                     needs_stage(call.out);
  int64_t loaded = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item % call.batch;
    const Block block = block_of(s, item / call.batch);
    finish_empty(s, block, b);
    Tensors rows[SUBS];
    // Staged, a vector of channels goes all the way by itself; else the block's go side by side.
    for (int first = 0; first < block.subs; first = stage ? first + 1 : block.subs) {
      const int last = stage ? first + 1 : block.subs;
      for (int64_t k = 0; k < call.paths; ++k) {
        for (int i = first; i < last; ++i) {
          const int64_t channel = block.channel + i * WIDTH;
          const int lanes = block.lanes(i);
          if (call.paths > 1 || loaded != item / call.batch || stage)
            m.parameters[i].load_from(s, k, channel, lanes);
          const auto rows_of = [&](const Tokens& t, int64_t path, float* to, bool read) {
            return needs_stage(t) ? staged(t, b, path, channel, lanes, call.length, to, read)
                                  : in_place(t, b, path, channel, lanes);
          };
          if (k == 0) {
            rows[i].u = rows_of(call.u, 0, m.su, true);
            rows[i].z = rows_of(call.z, 0, m.sz, true);
            rows[i].out = rows_of(call.out, 0, m.sout, false);
          }
          rows[i].delta = rows_of(call.delta, k, m.sdelta, true);
        }
        scan_path(s, block, b, k, first, last, rows, m);
      }
      if (needs_stage(call.out))
        unstage(m.sout, call.out, b, 0, block.channel + first * WIDTH, block.lanes(first),
                call.length);
    }
    loaded = item / call.batch;
  }
}

int64_t forward_scratch(const ScanArgs& s) { return Scratch::size(s); }

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  const Weights& w = a.from;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t g = item % a.groups, k = item / a.groups % a.paths, b = item / a.groups / a.paths;
    float* to = a.to + item * a.length * a.rows;
    with_element(w.dtype, [&](auto element) {
      using E = decltype(element);
      const auto* from =
          static_cast<const typename E::Bits*>(w.data) + b * w.batch + k * w.path + g * w.group;
      for (int64_t l = 0; l < a.length; ++l)
        for (int n = 0; n < a.rows; ++n)
          to[l * a.rows + n] = n < a.states ? E::read_one(from + l * w.token + n * w.state) : 0.0f;
    });
  }
}

void floor(int states, int64_t steps, float* scratch) {
  vfloat h[WIDTH];
  for (int n = 0; n < WIDTH; ++n) h[n] = load<vfloat>(scratch + n * WIDTH);
  const float* A2 = opaque(scratch);
  for (int64_t l = 0; l < steps; ++l) {
    const vfloat t = load<vfloat>(A2 + (l % TILE) * WIDTH);
    for (int first = 0; first < states; first += WIDTH) {
#pragma GCC unroll 16
      for (int n = 0; n < WIDTH; ++n) {
        const vfloat a = vexp2(t * load<vfloat>(A2 + n * WIDTH));
        h[n] = a * h[n] + t;
        h[n] = a * h[n] + t;
      }
    }
  }
  for (int n = 0; n < WIDTH; ++n) store(scratch + n * WIDTH, h[n]);
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(ScanKernels, scan) = {pydiffuse::WIDTH, pydiffuse::forward_scratch, pydiffuse::pack,
                                      pydiffuse::forward, pydiffuse::floor};
