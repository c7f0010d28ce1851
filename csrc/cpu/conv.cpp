// The causal convolution and its gradients, compiled once per instruction set.
//
// Lanes are channels. An item walks its steps tile by tile, with the rows of the W - 1 steps before
// (for the gradient, the W - 1 gradients after) still in the tile: each row is read once and
// written once.
#include "conv.h"

#include "math.h"
#include "tile.h"

namespace pydiffuse {
namespace {

constexpr int TILE = 64, HALO = MAX_WIDTH - 1;
constexpr int SUBS = CONV_BLOCK / WIDTH;

// The weights of WIDTH channels. tap[w] belongs to the step W - 1 - w before.
struct Taps {
  vfloat tap[MAX_WIDTH], bias;

  Taps() = default;
  Taps(const ConvCall& call, int64_t channel, int lanes) {
    float lane[MAX_WIDTH][WIDTH];
    rows_to_lanes(call.weight + channel * call.width, call.width, lanes, call.width, call.width,
                  1.0f, lane[0]);
    for (int w = 0; w < call.width; ++w) tap[w] = load<vfloat>(lane[w]);
    bias = call.bias ? read_lanes<F32>(call.bias + channel, lanes) : vfloat{};
  }
};

struct Scratch {
  float* x[SUBS];   // [HALO + TILE][WIDTH]: the tile's rows after those of the steps before
  float* g[SUBS];   // [TILE + HALO][WIDTH]: the tile's gradients before those of the steps after
  float *y, *dx;    // [TILE][WIDTH]
  float* stage[3];  // [length][WIDTH]

  static int64_t size(int64_t length) {
    return (2 * SUBS + 2) * (HALO + TILE) * WIDTH + 3 * length * WIDTH;
  }
  Scratch(int64_t length, float* p) {
    const auto take = [&p](int64_t n) { return (p += n) - n; };
    for (int i = 0; i < SUBS; ++i)
      for (float** each : {&x[i], &g[i]}) *each = take((HALO + TILE) * WIDTH);
    for (float** each : {&y, &dx}) *each = take((HALO + TILE) * WIDTH);
    for (float*& each : stage) each = take(length * WIDTH);
  }
};

// f(width), known when compiling.
template <int W = MAX_WIDTH, class F>
inline void with_width(int width, const F& f) {
  if (width == W) return f(std::integral_constant<int, W>{});
  if constexpr (W > 1) with_width<W - 1>(width, f);
}

// The steps of its sequence before step l of the tile, as far as they count.
inline int before(const ConvCall& call, const Tile<TILE>& tile, const Run& run, int l) {
  const int64_t start = call.offsets ? call.offsets[run.sequence] : 0;
  return static_cast<int>(std::min<int64_t>(call.width - 1, tile.first + l - start));
}

inline int after(const ConvCall& call, const Tile<TILE>& tile, const Run& run, int l) {
  const int64_t end = call.offsets ? call.offsets[run.sequence + 1] : call.length;
  return static_cast<int>(std::min<int64_t>(call.width - 1, end - 1 - tile.first - l));
}

// bias + sum_w tap_w x for the steps of a tile; x: its first row, after the halo.
template <class F>
inline void convolve(const ConvCall& call, const Tile<TILE>& tile, const Taps& taps, const float* x,
                     const F& each) {
  with_width(call.width, [&](auto width) {
    constexpr int W = width;
    vfloat tap[W];
    for (int w = 0; w < W; ++w) tap[w] = taps.tap[w];
    for (int r = 0; r < tile.runs; ++r) {
      const Run& run = tile.run[r];
      int l = run.begin;
      for (; l < run.end && before(call, tile, run, l) < W - 1; ++l) {
        vfloat y = taps.bias;
        for (int w = W - 1 - before(call, tile, run, l); w < W; ++w)
          y += taps.tap[w] * load<vfloat>(x + (l - W + 1 + w) * WIDTH);
        each(l, y);
      }
      for (; l < run.end; ++l) {
        vfloat y = taps.bias;
        for (int w = 0; w < W; ++w) y += tap[w] * load<vfloat>(x + (l - W + 1 + w) * WIDTH);
        each(l, y);
      }
    }
  });
}

inline int64_t blocks_of(const ConvCall& call) {
  return (call.channels + CONV_BLOCK - 1) / CONV_BLOCK;
}

// A tensor's rows for WIDTH channels, staged where its tokens are next to each other.
LaneRows rows_of(const Tokens& t, int64_t b, int64_t channel, int lanes, int64_t length,
                 float* stage, bool read) {
  return needs_stage(t) ? staged(t, b, 0, channel, lanes, length, stage, read)
                        : in_place(t, b, 0, channel, lanes);
}

// Items: [blocks, batch].
void forward(const ConvCall& call, int64_t begin, int64_t end, float* scratch) {
  Scratch m(call.length, scratch);
  const bool stage = needs_stage(call.x) || needs_stage(call.out);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item % call.batch;
    const Block block(item / call.batch, blocks_of(call), call.channels, CONV_BLOCK);
    for (int first = 0; first < block.subs; first = stage ? first + 1 : block.subs) {
      const int last = stage ? first + 1 : block.subs;
      LaneRows x[SUBS], out[SUBS];
      Taps taps[SUBS];
      for (int i = first; i < last; ++i) {
        const int64_t channel = block.channel + i * WIDTH;
        x[i] = rows_of(call.x, b, channel, block.lanes(i), call.length, m.stage[0], true);
        out[i] = rows_of(call.out, b, channel, block.lanes(i), call.length, m.stage[1], false);
        taps[i] = Taps(call, channel, block.lanes(i));
      }
      Tile<TILE> tile;
      int64_t sequence = 0;
      for (int64_t step = 0; step < call.length; step += TILE) {
        tile.set(call.order, call.offsets, call.length, step, TILE, sequence);
        for (int i = first; i < last; ++i) {
          const Ahead ahead(tile.next, tile.wraps, x[i], {}, {}, {});
          float* rows = m.x[i] + HALO * WIDTH;
          if (step) std::copy(rows + (TILE - HALO) * WIDTH, rows + TILE * WIDTH, m.x[i]);
          read_rows(x[i], tile, rows);
          convolve(call, tile, taps[i], rows, [&](int l, vfloat y) {
            ahead.fetch<1>(l);
            store(m.y + l * WIDTH, call.silu ? y * vsigmoid(y) : y);
          });
          write_rows(out[i], tile, false, m.y);
        }
      }
      if (needs_stage(call.out))
        unstage(m.stage[1], call.out, b, 0, block.channel + first * WIDTH, block.lanes(first),
                call.length);
    }
  }
}

struct Sums {
  vfloat tap[MAX_WIDTH], bias;
};

// One tile of one vector of channels, later tiles done: g = dout act'(pre), then what it gives.
void backward_tile(const ConvCall& call, const Tile<TILE>& tile, const Taps& taps,
                   const LaneRows& x, const LaneRows& dout, const LaneRows& dx, float* halo,
                   float* g, Sums& sums, Scratch& m) {
  float* rows = halo + HALO * WIDTH;
  std::copy(g, g + HALO * WIDTH, g + TILE * WIDTH);
  read_rows(x, tile, rows);
  for (int l = 1; l <= HALO && l <= tile.first; ++l) {
    const int64_t step = tile.first - l, token = call.order ? call.order[step] : step;
    with_element(x.dtype, [&](auto element) {
      store(rows - l * WIDTH, read_lanes<decltype(element)>(x.at(token), x.lanes));
    });
  }
  read_rows(dout, tile, g);
  if (call.silu)
    convolve(call, tile, taps, rows, [&](int l, vfloat y) {
      const vfloat s = vsigmoid(y);
      store(g + l * WIDTH, load<vfloat>(g + l * WIDTH) * (s * (1.0f + y * (1.0f - s))));
    });
  for (int r = 0; r < tile.runs; ++r) {
    const Run& run = tile.run[r];
    for (int l = run.begin; l < run.end; ++l) {
      const vfloat gl = load<vfloat>(g + l * WIDTH);
      sums.bias += gl;
      for (int back = before(call, tile, run, l); back >= 0; --back)
        sums.tap[call.width - 1 - back] += gl * load<vfloat>(rows + (l - back) * WIDTH);
      vfloat d = {};
      for (int on = after(call, tile, run, l); on >= 0; --on)
        d += taps.tap[call.width - 1 - on] * load<vfloat>(g + (l + on) * WIDTH);
      store(m.dx + l * WIDTH, d);
    }
  }
  write_rows(dx, tile, false, m.dx);
}

// Items: [blocks, parts].
void backward(const ConvBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const ConvCall& call = a.call.forward;
  Scratch m(call.length, scratch);
  const bool stage = needs_stage(call.x) || needs_stage(a.call.dout) || needs_stage(a.call.dx);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % a.parts;
    const int64_t from = part * call.batch / a.parts, to = (part + 1) * call.batch / a.parts;
    const Block block(item / a.parts, blocks_of(call), call.channels, CONV_BLOCK);
    for (int first = 0; first < block.subs; first = stage ? first + 1 : block.subs) {
      const int last = stage ? first + 1 : block.subs;
      Taps taps[SUBS];
      Sums sums[SUBS] = {};
      for (int i = first; i < last; ++i)
        taps[i] = Taps(call, block.channel + i * WIDTH, block.lanes(i));
      for (int64_t b = from; b < to; ++b) {
        LaneRows x[SUBS], dout[SUBS], dx[SUBS];
        for (int i = first; i < last; ++i) {
          const int64_t channel = block.channel + i * WIDTH;
          const int lanes = block.lanes(i);
          x[i] = rows_of(call.x, b, channel, lanes, call.length, m.stage[0], true);
          dout[i] = rows_of(a.call.dout, b, channel, lanes, call.length, m.stage[1], true);
          dx[i] = rows_of(a.call.dx, b, channel, lanes, call.length, m.stage[2], false);
        }
        Tile<TILE> tile;
        int64_t sequence = call.sequences - 1;
        for (int64_t step = (call.length - 1) / TILE * TILE; step >= 0 && call.length;
             step -= TILE) {
          if (call.offsets)
            while (sequence > 0 && call.offsets[sequence] > step) --sequence;
          int64_t current = sequence;
          tile.set(call.order, call.offsets, call.length, step, -TILE, current);
          for (int i = first; i < last; ++i)
            backward_tile(call, tile, taps[i], x[i], dout[i], dx[i], m.x[i], m.g[i], sums[i], m);
        }
        if (needs_stage(a.call.dx))
          unstage(m.stage[2], a.call.dx, b, 0, block.channel + first * WIDTH, block.lanes(first),
                  call.length);
      }
      for (int i = first; i < last; ++i) {
        const int64_t channel = part * call.channels + block.channel + i * WIDTH;
        float lane[MAX_WIDTH][WIDTH];
        for (int w = 0; w < call.width; ++w) store(lane[w], sums[i].tap[w]);
        lanes_to_rows(lane[0], call.width, block.lanes(i), call.width,
                      a.dweight + channel * call.width);
        write_lanes<F32>(a.dbias + channel, sums[i].bias, block.lanes(i));
      }
    }
  }
}

int64_t scratch_size(int64_t length) { return Scratch::size(length); }

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(ConvKernels, conv) = {pydiffuse::scratch_size, pydiffuse::forward,
                                      pydiffuse::backward};
