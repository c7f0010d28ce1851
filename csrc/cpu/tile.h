// Tiles of steps: the tokens of up to STEPS steps of a path, the sequences they belong to, and the
// rows of tensors at those tokens.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace pydiffuse {
namespace {

// A block of channels, WIDTH at a time.
struct Block {
  int64_t group, channel;  // the first one
  int channels, subs;      // of them; vectors of WIDTH

  // index: [groups, blocks] of up to `most` channels each.
  Block(int64_t index, int64_t blocks, int64_t group_channels, int most) {
    const int64_t within = index % blocks * most;
    group = index / blocks;
    channel = group * group_channels + within;
    channels = static_cast<int>(std::min<int64_t>(most, group_channels - within));
    subs = (channels + WIDTH - 1) / WIDTH;
  }
  int lanes(int sub) const { return std::min(WIDTH, channels - sub * WIDTH); }
};

// Steps of one sequence within a tile.
struct Run {
  int begin, end;
  int64_t sequence;
  bool starts, ends;  // with the first (last) step of its sequence
};

template <int STEPS>
struct Tile {
  int64_t first;
  int steps, runs;
  int64_t token[STEPS], next[STEPS];  // next: of the tile to come, to be fetched ahead
  bool wraps;                         // that tile is the next sample's first
  Run run[STEPS];

  // order: of one path. ahead: steps to the tile to come. sequence: that of the tile's first step;
  // moves on to that of the next tile's.
  void set(const int32_t* order, const int32_t* offsets, int64_t length, int64_t first_,
           int64_t ahead, int64_t& sequence) {
    first = first_;
    steps = static_cast<int>(std::min<int64_t>(STEPS, length - first));
    int64_t later = first + ahead;
    wraps = later < 0 || later >= length;
    if (wraps) later = ahead > 0 ? 0 : (length - 1) / STEPS * STEPS;
    for (int l = 0; l < steps; ++l) {
      const int64_t n = std::min(later + l, length - 1);
      token[l] = order ? order[first + l] : first + l;
      next[l] = order ? order[n] : n;
    }
    runs = 0;
    if (!offsets) {
      run[runs++] = {0, steps, 0, first == 0, first + steps == length};
      return;
    }
    for (int l = 0; l < steps;) {
      while (offsets[sequence + 1] <= first + l) ++sequence;
      const int64_t begin = offsets[sequence], end = offsets[sequence + 1];
      const int stop = static_cast<int>(std::min<int64_t>(steps, end - first));
      run[runs++] = {l, stop, sequence, begin == first + l, end == first + stop};
      l = stop;
    }
  }
};

// Rows to bring into the cache ahead of their use, a step at a time, while the arithmetic runs.
// Four of them, without branches: a tensor that is not there is replaced by the first.
struct Ahead {
  static constexpr int ROWS = 4;
  const int64_t* token;  // one for each step
  const char* data[ROWS];
  int64_t stride[ROWS];

  // beyond: the tile to come is the next sample's.
  Ahead(const int64_t* token_, bool beyond, const LaneRows& a, const LaneRows& b, const LaneRows& c,
        const LaneRows& d)
      : token(token_) {
    const LaneRows* rows[ROWS] = {&a, &b, &c, &d};
    for (int i = 0; i < ROWS; ++i) {
      if (!*rows[i]) rows[i] = &a;
      data[i] = rows[i]->data + (beyond ? rows[i]->beyond : 0);
      stride[i] = rows[i]->stride;
    }
  }
  // Inlined, or g++ takes it for a function without effects and drops the call.
  template <int COUNT = ROWS, bool WRITE = false>
  __attribute__((always_inline)) void fetch(int step) const {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
      __builtin_prefetch(data[i] + token[step] * stride[i], WRITE ? 1 : 0, 3);
  }
};

// each(element of the rows' dtype, address, lanes) for the steps of a tile: what it captures by
// value stays in registers.
template <int STEPS, class F>
inline void for_rows(const LaneRows& rows, const Tile<STEPS>& tile, const F& each) {
  with_element(rows.dtype, [=, token = tile.token, steps = tile.steps, lanes = rows.lanes,
                            data = rows.data, stride = rows.stride](auto element) {
    if (lanes == WIDTH)
      for (int l = 0; l < steps; ++l) each(element, l, data + token[l] * stride, WIDTH);
    else
      for (int l = 0; l < steps; ++l) each(element, l, data + token[l] * stride, lanes);
  });
}

// dst[step] = the rows of the tile's tokens.
template <int STEPS>
inline void read_rows(const LaneRows& rows, const Tile<STEPS>& tile, float* dst) {
  for_rows(rows, tile, [=](auto element, int l, const void* p, int lanes) {
    store(dst + l * WIDTH, read_lanes<decltype(element)>(p, lanes));
  });
}

// each(element of a, of b, step, address in a, in b, lanes)
template <int STEPS, class F>
inline void for_rows(const LaneRows& a, const LaneRows& b, const Tile<STEPS>& tile, const F& each) {
  with_element(b.dtype, [&](auto second) {
    for_rows(a, tile,
             [=, token = tile.token, data = b.data, stride = b.stride](auto first, int l, char* p,
                                                                       int lanes) {
               each(first, second, l, p, data + token[l] * stride, lanes);
             });
  });
}

// The tile's rows = src[step]; `add`: what stands there, which is then float32, is added.
template <int STEPS>
inline void write_rows(const LaneRows& rows, const Tile<STEPS>& tile, bool add, const float* src) {
  for_rows(rows, tile, [=](auto element, int l, void* p, int lanes) {
    using E = decltype(element);
    vfloat v = load<vfloat>(src + l * WIDTH);
    if (add) v += read_lanes<E>(p, lanes);
    write_lanes<E>(p, v, lanes);
  });
}

}  // namespace
}  // namespace pydiffuse
