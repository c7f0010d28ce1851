// The causal convolution and its gradients, compiled once per instruction set.
//
// Lanes are channels. Forward, a step is a sum over W rows of CONV_ROW channels where they lie:
// those of the steps before are still in the first-level cache, and nothing is carried from one
// vector to the next, so their chains overlap. Backward, an item walks its steps tile by tile, with
// the rows of the W - 1 steps before and the W - 1 gradients after still in the tile.
#include "conv.h"

#include "math.h"
#include "tile.h"

namespace pydiffuse {
namespace {

constexpr int TILE = 64, HALO = MAX_WIDTH - 1;
constexpr int AHEAD = 2;  // steps, to be fetched ahead
constexpr int SUBS = CONV_BLOCK / WIDTH;

// The weights of WIDTH channels. tap[w] belongs to the step W - 1 - w before.
struct Taps {
  vfloat tap[MAX_WIDTH], bias;

  Taps() = default;
  Taps(const ConvCall& call, int64_t channel, int lanes) {
    const int width = call.width;
    if (width > MAX_WIDTH) __builtin_unreachable();  // checked by the bindings
    float lane[MAX_WIDTH][WIDTH];
    rows_to_lanes(call.weight + channel * width, width, lanes, width, width, 1.0f, lane[0]);
    for (int w = 0; w < width; ++w) tap[w] = load<vfloat>(lane[w]);
    bias = call.bias ? read_lanes<F32>(call.bias + channel, lanes) : vfloat{};
  }
};

struct Scratch {
  float* x[SUBS];   // [HALO + TILE][WIDTH]: the tile's rows after those of the steps before
  float* g[SUBS];   // [TILE + HALO][WIDTH]: the tile's gradients before those of the steps after
  float* y;         // [TILE][WIDTH]: what a tile gives
  float* stage[3];  // [length][WIDTH]
  float* zeros;     // [CONV_ROW]
  float* wide;      // [MAX_WIDTH][CONV_ROW]

  static int64_t size(int64_t length) {
    return 2 * SUBS * (HALO + TILE) * WIDTH + TILE * WIDTH + 3 * length * WIDTH +
           (1 + MAX_WIDTH) * CONV_ROW;
  }
  Scratch(int64_t length, float* p) {
    const auto take = [&p](int64_t n) { return (p += n) - n; };
    for (int i = 0; i < SUBS; ++i)
      for (float** each : {&x[i], &g[i]}) *each = take((HALO + TILE) * WIDTH);
    y = take(TILE * WIDTH);
    zeros = take(CONV_ROW);
    wide = take(MAX_WIDTH * CONV_ROW);
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

// Steps [begin, end) of one sample for channels next to each other, at most CONV_ROW.
struct Piece {
  int64_t begin, end, channel;
  int channels;
  const char* x;  // at token 0
  char* out;
  int64_t x_stride, out_stride;  // bytes from a token to the next
  bool stream;
};

// A step's sums over its rows, float32, for all channels of a piece. taps: at its first channel.
template <int W, class E>
inline void convolve_row(const ConvArgs& a, const Piece& piece, const float* taps,
                         const float* const* rows, typename E::Bits* out) {
  const auto sum = [&](int64_t c, int lanes) {
    vfloat y = load<vfloat>(taps + W * a.tap_stride + c);
    for (int w = 0; w < W; ++w)
      y += load<vfloat>(taps + w * a.tap_stride + c) * read_lanes<F32>(rows[w] + c, lanes);
    return a.call.silu ? y * vsigmoid(y) : y;
  };
  int64_t c = 0;
  for (; c + WIDTH <= piece.channels; c += WIDTH) E::write(out + c, sum(c, WIDTH), piece.stream);
  const int rest = static_cast<int>(piece.channels - c);
  if (rest) write_lanes<E>(out + c, sum(c, rest), rest);
}

// Asks for the row of a step to come.
inline void fetch(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// wide: [W][CONV_ROW], the last rows in float32 where they are not.
template <int W, class E>
void convolve_steps(const ConvArgs& a, const Piece& piece, const float* zeros, float* wide) {
  const ConvCall& call = a.call;
  const auto token = [&](int64_t l) { return call.order ? call.order[l] : l; };
  const auto row = [&](int64_t l) { return piece.x + token(l) * piece.x_stride; };
  const auto widened = [&](int64_t l) { return wide + l % W * CONV_ROW; };
  const auto widen_row = [&](int64_t l) {
    const auto* from = reinterpret_cast<const typename E::Bits*>(row(l));
    for (int c = 0; c < piece.channels; c += WIDTH)
      store(widened(l) + c, read_lanes<E>(from + c, std::min(WIDTH, piece.channels - c)));
  };
  constexpr bool WIDEN = !std::is_same_v<E, F32>;
  if (WIDEN)
    for (int64_t l = std::max<int64_t>(0, piece.begin - W + 1); l < piece.begin; ++l) widen_row(l);
  const int32_t* next = call.offsets;  // the first sequence that starts after a step
  int64_t start = 0;                   // of the step's sequence
  for (int64_t l = piece.begin; l < piece.end; ++l) {
    while (next && next <= call.offsets + call.sequences && *next <= l) start = *next++;
    fetch(row(std::min(l + AHEAD, call.length - 1)), piece.channels * sizeof(typename E::Bits));
    if (WIDEN) widen_row(l);
    const float* rows[W];  // of the steps l - W + 1 .. l
    for (int w = 0; w < W; ++w) {
      const int64_t from = l - W + 1 + w;
      if (from < start)
        rows[w] = zeros;
      else
        rows[w] = WIDEN ? widened(from) : reinterpret_cast<const float*>(row(from));
    }
    auto* out = reinterpret_cast<typename E::Bits*>(piece.out + token(l) * piece.out_stride);
    convolve_row<W, E>(a, piece, a.taps + piece.channel, rows, out);
  }
}

// f(width, element of x and out), known when compiling.
template <class F>
inline void with_types(const ConvCall& call, const F& f) {
  with_width(call.width, [&](auto width) {
    with_element(call.x.dtype, [&](auto element) { f(width, element); });
  });
}

// Tokens [begin, end), a sequence, of one channel, next to each other: here lanes are tokens.
template <int W, class E>
void convolve_tokens(const vfloat* taps, bool silu, const typename E::Bits* x,
                     typename E::Bits* out, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; l += WIDTH) {
    const int lanes = static_cast<int>(std::min<int64_t>(WIDTH, end - l));
    vfloat y = taps[W];
    if (l - W + 1 >= begin && lanes == WIDTH) {
      for (int w = 0; w < W; ++w) y += taps[w] * E::read(x + l - W + 1 + w);
    } else {
      float part[W - 1 + WIDTH] = {};  // zeros before the sequence and after it
      for (int i = 0; i < W - 1 + lanes; ++i)
        if (l - W + 1 + i >= begin) part[i] = E::read_one(x + l - W + 1 + i);
      for (int w = 0; w < W; ++w) y += taps[w] * load<vfloat>(part + w);
    }
    write_lanes<E>(out + l, silu ? y * vsigmoid(y) : y, lanes);
  }
}

template <int W, class E>
void convolve_channel(const ConvArgs& a, int64_t b, int64_t channel) {
  const ConvCall& call = a.call;
  vfloat taps[W + 1];
  for (int w = 0; w <= W; ++w) taps[w] = splat(a.taps[w * a.tap_stride + channel]);
  const auto* x = reinterpret_cast<const typename E::Bits*>(address(call.x, b, 0, channel));
  auto* out = reinterpret_cast<typename E::Bits*>(address(call.out, b, 0, channel));
  for (int q = 0; q < call.sequences; ++q)
    convolve_tokens<W, E>(taps, call.silu, x, out, call.offsets ? call.offsets[q] : 0,
                          call.offsets ? call.offsets[q + 1] : call.length);
}

// Rows where they lie. Items: [batch, chunks, blocks].
void forward_rows(const ConvArgs& a, int64_t item, const Scratch& m) {
  const ConvCall& call = a.call;
  const int64_t channel = item % a.blocks() * CONV_ROW, rest = item / a.blocks();
  const int64_t b = rest / a.chunks(), begin = rest % a.chunks() * CONV_STEPS;
  const int in = bytes_of(call.x.dtype), out = bytes_of(call.out.dtype);
  Piece piece{begin,
              std::min(begin + CONV_STEPS, call.length),
              channel,
              static_cast<int>(std::min<int64_t>(CONV_ROW, call.channels - channel)),
              address(call.x, b, 0, channel),
              address(call.out, b, 0, channel),
              call.x.token * in,
              call.out.token * out,
              false};
  const auto odd = reinterpret_cast<uintptr_t>(piece.out) | piece.out_stride;
  piece.stream = a.stream && odd % (WIDTH * out) == 0;
  with_types(call, [&](auto width, auto element) {
    convolve_steps<width, decltype(element)>(a, piece, m.zeros, m.wide);
  });
}

// Tokens next to each other in x and out: where they lie if in their order and of one element, else
// as rows of staged copies, a vector of channels at a time. Items: [blocks, batch].
void forward_staged(const ConvArgs& a, int64_t item, Scratch& m) {
  const ConvCall& call = a.call;
  const int64_t b = item % call.batch;
  const Block block(item / call.batch, a.blocks(), call.channels, CONV_BLOCK);
  if (!call.order && call.x.token == 1 && call.out.token == 1 && call.x.dtype == call.out.dtype)
    return with_types(call, [&](auto width, auto element) {
      for (int i = 0; i < block.channels; ++i)
        convolve_channel<width, decltype(element)>(a, b, block.channel + i);
    });
  for (int i = 0; i < block.subs; ++i) {
    const int64_t channel = block.channel + i * WIDTH;
    const int lanes = block.lanes(i);
    const Taps taps(call, channel, lanes);
    const LaneRows x = rows_of(call.x, b, channel, lanes, call.length, m.stage[0], true);
    const LaneRows out = rows_of(call.out, b, channel, lanes, call.length, m.stage[1], false);
    float* rows = m.x[0] + HALO * WIDTH;
    Tile<TILE> tile;
    int64_t sequence = 0;
    for (int64_t step = 0; step < call.length; step += TILE) {
      tile.set(call.order, call.offsets, call.length, step, TILE, sequence);
      if (step) std::copy(rows + (TILE - HALO) * WIDTH, rows + TILE * WIDTH, m.x[0]);
      read_rows(x, tile, rows);
      convolve(call, tile, taps, rows,
               [&](int l, vfloat y) { store(m.y + l * WIDTH, call.silu ? y * vsigmoid(y) : y); });
      write_rows(out, tile, false, m.y);
    }
    if (needs_stage(call.out)) unstage(m.stage[1], call.out, b, 0, channel, lanes, call.length);
  }
}

void forward(const ConvArgs& a, int64_t begin, int64_t end, float* scratch) {
  Scratch m(a.call.length, scratch);
  std::fill(m.zeros, m.zeros + CONV_ROW, 0.0f);
  for (int64_t item = begin; item < end; ++item)
    a.staged ? forward_staged(a, item, m) : forward_rows(a, item, m);
  if (a.stream) stream_fence();
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
      store(m.y + l * WIDTH, d);
    }
  }
  write_rows(dx, tile, false, m.y);
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
