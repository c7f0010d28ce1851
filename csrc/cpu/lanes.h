// Channels as the lanes of a vector: sums over lanes, transposes, and tensors [tokens, channels] as
// rows of WIDTH channels whatever their dtype and layout.
#pragma once

#include <utility>

#include "../scan.h"
#include "simd.h"

namespace pydiffuse {
namespace {

// Lane i of the result is lane Place::of(i) of a and b, those of b being counted from WIDTH on.
template <class Place, int... LANE>
inline vfloat lanes_of(vfloat a, vfloat b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, Place::of(LANE)...);
}
template <class Place>
inline vfloat lanes_of(vfloat a, vfloat b) {
  return lanes_of<Place>(a, b, std::make_integer_sequence<int, WIDTH>{});
}

// The blocks of STEP lanes at even (odd) places of a, then those of b.
template <int STEP, bool ODD>
struct EveryOther {
  static constexpr int of(int i) { return (2 * (i / STEP) + ODD) * STEP + i % STEP; }
};

// v[0..WIDTH) -> the vector of their sums over lanes, in a fixed order: halves of halves.
template <int APART = 1>
inline vfloat lane_sums(vfloat* v) {
  constexpr int STEP = WIDTH / (2 * APART);
  for (int i = 0; i < WIDTH; i += 2 * APART)
    v[i] = lanes_of<EveryOther<STEP, false>>(v[i], v[i + APART]) +
           lanes_of<EveryOther<STEP, true>>(v[i], v[i + APART]);
  if constexpr (2 * APART < WIDTH)
    return lane_sums<2 * APART>(v);
  else
    return v[0];
}

// Lanes with (i & STEP) == 0 from a, the others from b STEP places before; or what is left.
template <int STEP, bool REST>
struct Exchanged {
  static constexpr int of(int i) {
    if (REST) return i & STEP ? WIDTH + i : i + STEP;
    return i & STEP ? WIDTH + i - STEP : i;
  }
};

// v[i][j] <-> v[j][i]
template <int STEP = 1>
inline void transpose(vfloat* v) {
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & STEP)) {
      const vfloat a = v[i], b = v[i + STEP];
      v[i] = lanes_of<Exchanged<STEP, false>>(a, b);
      v[i + STEP] = lanes_of<Exchanged<STEP, true>>(a, b);
    }
  if constexpr (2 * STEP < WIDTH) transpose<2 * STEP>(v);
}

// dst[i][lane] = scale src[lane][i] for `lanes` rows of n values, `stride` apart; zeros to fill
// [rows][WIDTH].
inline void rows_to_lanes(const float* src, int64_t stride, int lanes, int n, int rows, float scale,
                          float* dst) {
  int i = 0;
  if (lanes == WIDTH)
    for (; i + WIDTH <= n; i += WIDTH) {
      vfloat v[WIDTH];
      for (int j = 0; j < WIDTH; ++j) v[j] = load<vfloat>(src + j * stride + i) * scale;
      transpose(v);
      for (int j = 0; j < WIDTH; ++j) store(dst + (i + j) * WIDTH, v[j]);
    }
  for (; i < rows; ++i)
    for (int j = 0; j < WIDTH; ++j)
      dst[i * WIDTH + j] = i < n && j < lanes ? scale * src[j * stride + i] : 0.0f;
}

inline void lanes_to_rows(const float* src, int64_t stride, int lanes, int n, float* dst) {
  int i = 0;
  if (lanes == WIDTH)
    for (; i + WIDTH <= n; i += WIDTH) {
      vfloat v[WIDTH];
      for (int j = 0; j < WIDTH; ++j) v[j] = load<vfloat>(src + (i + j) * WIDTH);
      transpose(v);
      for (int j = 0; j < WIDTH; ++j) store(dst + j * stride + i, v[j]);
    }
  for (; i < n; ++i)
    for (int j = 0; j < lanes; ++j) dst[j * stride + i] = src[i * WIDTH + j];
}

template <class E>
inline vfloat read_lanes(const void* p, int lanes) {
  const auto* q = static_cast<const typename E::Bits*>(p);
  if (lanes == WIDTH) return E::read(q);
  float lane[WIDTH] = {};
  for (int i = 0; i < lanes; ++i) lane[i] = E::read_one(q + i);
  return load<vfloat>(lane);
}

template <class E>
inline void write_lanes(void* p, vfloat v, int lanes) {
  auto* q = static_cast<typename E::Bits*>(p);
  if (lanes == WIDTH) return E::write(q, v, false);
  for (int i = 0; i < lanes; ++i) E::write_one(q + i, v[i]);
}

// `lanes` channels of a tensor, token by token, where they lie or in a staged copy.
struct LaneRows {
  char* data = nullptr;
  int64_t stride = 0;  // bytes from a token to the next
  DType dtype = DType::f32;
  int lanes = 0;
  int64_t beyond = 0;  // bytes to the same rows of the next sample

  explicit operator bool() const { return data; }
  char* at(int64_t token) const { return data + token * stride; }
};

inline char* address(const Tokens& t, int64_t b, int64_t k, int64_t channel) {
  return static_cast<char*>(t.data) +
         (b * t.batch + k * t.path + channel * t.channel) * bytes_of(t.dtype);
}

inline bool needs_stage(const Tokens& t) { return t.data && t.channel != 1; }

inline LaneRows in_place(const Tokens& t, int64_t b, int64_t k, int64_t channel, int lanes) {
  if (!t.data) return {};
  const int size = bytes_of(t.dtype);
  return {address(t, b, k, channel), t.token * size, t.dtype, lanes, t.batch * size};
}

// A tensor whose tokens are next to each other: transposed, WIDTH tokens of WIDTH channels at a
// time, into stage [length][WIDTH]. Paths then jump about in the second-level cache, not in memory.
inline LaneRows staged(const Tokens& t, int64_t b, int64_t k, int64_t channel, int lanes,
                       int64_t length, float* stage, bool read) {
  const LaneRows rows{reinterpret_cast<char*>(stage), WIDTH * 4, DType::f32, lanes};
  if (!read) return rows;
  with_element(t.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* src = reinterpret_cast<const typename E::Bits*>(address(t, b, k, channel));
    int64_t l = 0;
    if (lanes == WIDTH && t.token == 1)
      for (; l + WIDTH <= length; l += WIDTH) {
        vfloat v[WIDTH];
        for (int j = 0; j < WIDTH; ++j) v[j] = E::read(src + j * t.channel + l);
        transpose(v);
        for (int j = 0; j < WIDTH; ++j) store(stage + (l + j) * WIDTH, v[j]);
      }
    for (; l < length; ++l)
      for (int j = 0; j < WIDTH; ++j)
        stage[l * WIDTH + j] = j < lanes ? E::read_one(src + j * t.channel + l * t.token) : 0.0f;
  });
  return rows;
}

inline void unstage(const float* stage, const Tokens& t, int64_t b, int64_t k, int64_t channel,
                    int lanes, int64_t length) {
  with_element(t.dtype, [&](auto element) {
    using E = decltype(element);
    auto* dst = reinterpret_cast<typename E::Bits*>(address(t, b, k, channel));
    int64_t l = 0;
    if (lanes == WIDTH && t.token == 1)
      for (; l + WIDTH <= length; l += WIDTH) {
        vfloat v[WIDTH];
        for (int j = 0; j < WIDTH; ++j) v[j] = load<vfloat>(stage + (l + j) * WIDTH);
        transpose(v);
        for (int j = 0; j < WIDTH; ++j) E::write(dst + j * t.channel + l, v[j], false);
      }
    for (; l < length; ++l)
      for (int j = 0; j < lanes; ++j)
        E::write_one(dst + j * t.channel + l * t.token, stage[l * WIDTH + j]);
  });
}

}  // namespace
}  // namespace pydiffuse
