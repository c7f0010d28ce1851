// What attention's forward and backward share: one matrix product in registers, heads as float32
// rows and as packed columns, and the spans of a plan as chunks of KEYS keys.
#pragma once

#include "../attention.h"
#include "lanes.h"
#include "math.h"

namespace pydiffuse {
namespace {

constexpr int KEYS = 64;  // of a chunk: its keys and values stay in the first cache
constexpr int STRIP = 6;  // rows that a product has in registers,
constexpr int COLS = WIDTH == 16 ? 4 : 2;  // and vectors: 24 accumulators of 32, or 12 of 16
constexpr int KEY_VECTORS = KEYS / WIDTH;

inline vfloat splat_word(const float* p) {
  typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
  uint32_t word;
  std::memcpy(&word, p, 4);
  return (vfloat)(words{} + word);
}

inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// What products multiply: 32-bit words, each a float32, or where the CPU has AVX512-BF16 a pair of
// bfloat16 whose two products are summed in float32.
struct Singles {
  static constexpr int PAIR = 1;  // numbers in a word
  static vfloat multiply_add(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int PAIR = 2;
  static vfloat multiply_add(vfloat sum, vfloat a, vfloat b) {
#if defined(__clang__) && __clang_major__ < 17  // whose optimiser does not survive the casts
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }
  static vfloat pairs(vfloat low, vfloat high) {  // 2 WIDTH numbers, rounded, in their order
    return (vfloat)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  static vfloat pair(vfloat low, vfloat high) {  // of each lane
    const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
    const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
    return (vfloat)(a | _mm512_slli_epi32(b, 16));
  }
};
#endif

// C [ROWS, N vectors] = A [ROWS, inner] B [inner, N vectors], added to C if asked for. A and B are
// of words. A is row-major, or read transposed: A[i, k] at A[k lda + i]. Per step N loads of B,
// ROWS broadcasts, ROWS N multiply-adds.
template <class Words, int ROWS, int N, bool TRANSPOSED>
__attribute__((noinline)) void product_tile(const float* __restrict A, int64_t lda,
                                            const float* __restrict B, int64_t ldb, int64_t inner,
                                            float* __restrict C, int64_t ldc, bool add) {
  vfloat sum[ROWS][N];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < N; ++c) sum[r][c] = add ? load<vfloat>(C + r * ldc + c * WIDTH) : vfloat{};
  for (int64_t k = 0; k < inner; ++k) {
    vfloat b[N];
    for (int c = 0; c < N; ++c) b[c] = load<vfloat>(B + k * ldb + c * WIDTH);
    for (int r = 0; r < ROWS; ++r) {
      const vfloat a = splat_word(A + (TRANSPOSED ? k * lda + r : r * lda + k));
      for (int c = 0; c < N; ++c) sum[r][c] = Words::multiply_add(sum[r][c], a, b[c]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < N; ++c) store(C + r * ldc + c * WIDTH, sum[r][c]);
}

using ProductTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                             bool);

template <class Words, bool T, int ROWS>
constexpr ProductTile product_tile_of(int vectors) {
  if constexpr (COLS == 4) {
    if (vectors == 4) return product_tile<Words, ROWS, COLS, T>;
    if (vectors == 3) return product_tile<Words, ROWS, COLS - 1, T>;
  }
  return vectors == 2 ? product_tile<Words, ROWS, 2, T> : product_tile<Words, ROWS, 1, T>;
}
template <class Words, bool T, int ROWS = STRIP>
constexpr ProductTile product_tile_of(int rows, int vectors) {
  if constexpr (ROWS == 1)
    return product_tile_of<Words, T, 1>(vectors);
  else
    return rows == ROWS ? product_tile_of<Words, T, ROWS>(vectors)
                        : product_tile_of<Words, T, ROWS - 1>(rows, vectors);
}

// C [rows, vectors WIDTH] = or += A B for any number of rows and vectors.
template <class Words, bool TRANSPOSED = false>
inline void product(const float* A, int64_t lda, const float* B, int64_t ldb, int64_t inner,
                    int64_t rows, int64_t vectors, float* C, int64_t ldc, bool add) {
  const int64_t passes = (vectors + COLS - 1) / COLS;
  for (int64_t pass = 0, v = 0; pass < passes; ++pass) {
    const int n = static_cast<int>((vectors - v + passes - pass - 1) / (passes - pass));
    for (int64_t r = 0; r < rows; r += STRIP) {
      const int count = rows - r < STRIP ? static_cast<int>(rows - r) : STRIP;
      product_tile_of<Words, TRANSPOSED>(count, n)(A + (TRANSPOSED ? r : r * lda), lda,
                                                   B + v * WIDTH, ldb, inner,
                                                   C + r * ldc + v * WIDTH, ldc, add);
    }
    v += n;
  }
}

// A token's features in float32, zeros up to `width`.
inline void read_token(const Heads& heads, int64_t at, int dim, float* dst, int64_t width) {
  with_element(heads.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* src = static_cast<const typename E::Bits*>(heads.data) + at;
    int i = 0;
    for (; i + WIDTH <= dim; i += WIDTH) store(dst + i, E::read(src + i));
    for (; i < dim; ++i) dst[i] = E::read_one(src + i);
    for (; i < width; ++i) dst[i] = 0.0f;
  });
}

inline void write_token(const float* src, float scale, const Heads& heads, int64_t at, int dim) {
  with_element(heads.dtype, [&](auto element) {
    using E = decltype(element);
    auto* dst = static_cast<typename E::Bits*>(heads.data) + at;
    int i = 0;
    for (; i + WIDTH <= dim; i += WIDTH) E::write(dst + i, load<vfloat>(src + i) * scale, false);
    for (; i < dim; ++i) E::write_one(dst + i, src[i] * scale);
  });
}

// A token's features as words, zeros up to `width` words.
template <class Words>
inline void read_words(const Heads& heads, int64_t at, int dim, float* dst, int64_t width) {
  if constexpr (Words::PAIR == 1) return read_token(heads, at, dim, dst, width);
  std::memcpy(dst, static_cast<const uint16_t*>(heads.data) + at, dim * 2);
  std::memset(dst + dim / 2, 0, (width - dim / 2) * sizeof(float));
}

// Whether any of n numbers is infinite or NaN; n is a multiple of WIDTH. 0 x is 0 of all others.
template <class Words>
inline bool any_wild(const float* words, int64_t n) {
  vfloat sum{};
  for (int64_t i = 0; i < n; i += WIDTH)
    sum = Words::multiply_add(sum, load<vfloat>(words + i), vfloat{});
  bool wild = false;
  for (int i = 0; i < WIDTH; ++i) wild |= sum[i] != 0.0f;
  return wild;
}

// Rows of words [count, wide] that are pairs of features -> [count / 2, wide] pairs of rows.
inline void interleave(const float* from, int64_t count, int64_t wide, float* to) {
  typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
  for (int64_t i = 0; i < count; i += 2, to += wide) {
    const auto* first = reinterpret_cast<const uint16_t*>(from + i * wide);
    const auto* second = reinterpret_cast<const uint16_t*>(from + (i + 1) * wide);
    for (int64_t j = 0; j < wide; j += WIDTH) {
      const auto low = (words)BF16::read(first + j) >> 16, high = (words)BF16::read(second + j);
      store(to + j, low | high);
    }
  }
}

// One head of keys or values in chunks of KEYS positions, as words: as rows [KEYS, padded dim]
// (pairs are of two positions), as columns [dim, KEYS] (pairs are of two features), or as both.
// Positions past the last are zeros.
struct Packing {
  const Heads& heads;
  const Plan& plan;
  int64_t b, h, length;
  int dim;
  float *rows, *columns;  // of all chunks; null: not wanted
  float* stage;           // [KEYS, padded dim]; not needed for rows of singles

  // Asks for the memory of a chunk, while the one before it is worked on.
  void fetch(int64_t chunk) const {
    const int64_t bytes = bytes_of(heads.dtype);
    for (int64_t i = chunk * KEYS; i < (chunk + 1) * KEYS && i < length; ++i) {
      const char* p = static_cast<const char*>(heads.data) + heads.at(b, h, plan.token(i)) * bytes;
      for (int64_t byte = 0; byte < dim * bytes; byte += 64) __builtin_prefetch(p + byte, 0, 2);
    }
  }

  // True where a mask must keep a row out of products, since its number times 0 is not 0.
  template <class Words>
  bool pack(int64_t chunk) const {
    constexpr int PAIR = Words::PAIR;
    const int64_t wide = padded(dim);
    float* r = rows && PAIR == 1 ? rows + chunk * KEYS * wide : stage;
    for (int64_t i = 0; i < KEYS; ++i) {
      const int64_t position = chunk * KEYS + i;
      if (position >= length)
        std::memset(r + i * wide, 0, wide * sizeof(float));
      else
        read_words<Words>(heads, heads.at(b, h, plan.token(position)), dim, r + i * wide, wide);
    }
    const bool wild = rows && plan.masks && any_wild<Words>(r, KEYS * wide);
    if (rows && PAIR == 2) interleave(r, KEYS, wide, rows + chunk * KEYS / PAIR * wide);
    if (!columns) return wild;
    float* c = columns + chunk * KEYS * dim / PAIR;
    for (int64_t i = 0; i < KEYS; i += WIDTH)
      for (int64_t j = 0; j < dim / PAIR; j += WIDTH) {
        vfloat v[WIDTH];
        for (int n = 0; n < WIDTH; ++n) v[n] = load<vfloat>(r + (i + n) * wide + j);
        transpose(v);
        for (int n = 0; n < WIDTH && j + n < dim / PAIR; ++n) store(c + (j + n) * KEYS + i, v[n]);
      }
    return wild;
  }
};

inline int64_t chunks_of(int64_t length) { return (length + KEYS - 1) / KEYS; }

// One key head, packed chunk by chunk where it is first looked at.
template <class Words>
struct PackedHead {
  Packing keys, values;
  uint8_t* packed;  // [chunks]: 0, or PACKED, or WILD: with an infinity or NaN in what has rows
  enum : uint8_t { PACKED = 1, WILD = 2 };

  void open(int64_t b, int64_t h) {
    if (b == keys.b && h == keys.h) return;
    keys.b = values.b = b, keys.h = values.h = h;
    std::memset(packed, 0, chunks_of(keys.length));
  }
  bool need(int64_t chunk) const {  // whether it is wild
    if (!packed[chunk]) {
      const bool wild_keys = keys.template pack<Words>(chunk);
      const bool wild_values = values.template pack<Words>(chunk);
      packed[chunk] = wild_keys || wild_values ? WILD : PACKED;
      keys.fetch(chunk + 1);
      values.fetch(chunk + 1);
    }
    return packed[chunk] == WILD;
  }
};

// The parts of a workspace, each from a line on.
struct Workspace {
  float* next;
  int64_t used = 0;

  float* take(int64_t n) {
    float* at = next;
    n = (n + 15) / 16 * 16;
    used += n;
    if (next) next += n;
    return at;
  }
};

// A part of a chunk that a block of queries sees.
struct Seen {
  int64_t chunk;
  int lo, hi;            // keys [lo, hi) of the chunk
  const int32_t* words;  // null: no mask; else of the block's first row,
  int64_t words_per_row;
  int64_t column;  // with the chunk's first key at this column (negative: before the first)

  int first_vector() const { return lo / WIDTH; }
  int vectors() const { return (hi + WIDTH - 1) / WIDTH - lo / WIDTH; }
  bool whole() const { return !words && lo % WIDTH == 0 && hi % WIDTH == 0; }

  // Which keys of the chunk row `row` of the block sees.
  uint64_t bits(int64_t row) const {
    const uint64_t inside = (hi == 64 ? ~uint64_t(0) : (uint64_t(1) << hi) - 1) >> lo << lo;
    if (!words) return inside;
    const int32_t* w = words + row * words_per_row;
    const auto word = [&](int64_t i) {
      return i < words_per_row ? uint64_t(uint32_t(w[i])) : uint64_t(0);
    };
    if (column < 0) return (word(0) | word(1) << 32) << -column & inside;
    const int64_t i = column / 32, shift = column % 32;
    uint64_t b = (word(i) | word(i + 1) << 32) >> shift;
    if (shift) b |= word(i + 2) << (64 - shift);
    return b & inside;
  }
};
static_assert(KEYS == 64, "Seen::bits has a bit for each key of a chunk");

// f(Seen) for everything that a block of a plan head sees, keys ascending.
template <class F>
inline void for_seen(const Plan& plan, int64_t plan_head, const int32_t* block, const F& f) {
  const int32_t tile = block[0];
  const int32_t* starts = plan.q.starts + plan_head * (plan.q.tiles + 1);
  for (int32_t s = starts[tile]; s < starts[tile + 1]; ++s) {
    const int32_t* span = plan.q.span + 3 * int64_t(s);
    const int64_t begin = span[0], end = span[1], per_row = (end - begin + 31) / 32;
    const int32_t* words = nullptr;
    if (span[2] != FULL)
      words = plan.word + plan.mask_at[span[2]] + (block[1] - plan.q.bounds[tile]) * per_row;
    for (int64_t chunk = begin / KEYS; chunk * KEYS < end; ++chunk) {
      const int64_t at = chunk * KEYS;
      f(Seen{chunk, static_cast<int>(begin > at ? begin - at : 0),
             static_cast<int>(end < at + KEYS ? end - at : KEYS), words, per_row, at - begin});
    }
  }
}

// Halves of words: numbers at even places are low ones.
inline void keep_half(float* words, int64_t n, bool low, bool high) {
  const uint32_t mask = (low ? 0x0000ffffu : 0) | (high ? 0xffff0000u : 0);
  for (int64_t i = 0; i < n; ++i) words[i] = bits_to_float(float_to_bits(words[i]) & mask);
}

// What a product reads of a chunk's rows of words, from the pair of the first key on. An odd end
// shares its pair with a key that is not seen: its half is zeros in a copy, so that a NaN there
// stays there.
template <class Words>
inline const float* own_rows(const float* rows, const Seen& seen, int64_t wide, float* copy) {
  if constexpr (Words::PAIR == 1) return rows;
  if (seen.lo % 2 == 0 && seen.hi % 2 == 0) return rows;
  const int64_t pairs = (seen.hi + 1) / 2 - seen.lo / 2;
  std::memcpy(copy, rows, pairs * wide * sizeof(float));
  if (seen.lo % 2) keep_half(copy, wide, false, true);
  if (seen.hi % 2) keep_half(copy + (pairs - 1) * wide, wide, true, false);
  return copy;
}

// The same for a row of queries that sees the keys in `bits`, all others zeros.
template <class Words>
inline void rows_seen(const float* rows, const Seen& seen, uint64_t bits, int64_t wide,
                      float* copy) {
  constexpr int PAIR = Words::PAIR;
  const int first = seen.lo / PAIR, keys = (seen.hi + PAIR - 1) / PAIR - first;
  std::memcpy(copy, rows, keys * wide * sizeof(float));
  for (int k = 0; k < keys; ++k, copy += wide) {
    const uint64_t key = bits >> (first + k) * PAIR;
    if (PAIR == 1 && !(key & 1)) std::memset(copy, 0, wide * sizeof(float));
    if (PAIR == 2 && (key & 3) != 3) keep_half(copy, wide, key & 1, key & 2);
  }
}

// C [rows, wide] += weights [rows, keys] rows_of_keys [keys, wide] for rows that see the keys in
// their `bits`: weights elsewhere are zeros, and so are, in a copy, the keys' rows. Neighbours that
// see the same share a copy. `copied`: the bits of what the copy holds.
template <class Words>
inline void product_seen(const float* weights, const float* rows_of_keys, const Seen& seen,
                         const uint64_t* bits, int64_t rows, int64_t wide, float* C, float* copy,
                         uint64_t* copied) {
  constexpr int PAIR = Words::PAIR;
  const int keys = (seen.hi + PAIR - 1) / PAIR - seen.lo / PAIR;
  for (int64_t i = 0, end; i < rows; i = end) {
    for (end = i + 1; end < rows && bits[end] == bits[i];) ++end;
    if (!bits[i]) continue;
    if (bits[i] != *copied) rows_seen<Words>(rows_of_keys, seen, bits[i], wide, copy);
    *copied = bits[i];
    product<Words>(weights + i * KEYS, KEYS, copy, wide, keys, end - i, wide / WIDTH, C + i * wide,
                   wide, true);
  }
}

// C [keys of the chunk, wide] += weights [rows, KEYS] transposed, rows_of_queries [rows, wide], of
// `rows` words each, where rows see keys and nowhere else. `copy`: a row.
template <class Words>
inline void product_seen_transposed(const float* weights, const float* rows_of_queries,
                                    const Seen& seen, int64_t rows, int64_t real, int64_t wide,
                                    float* C, float* copy) {
  constexpr int PAIR = Words::PAIR;
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = rows_of_queries + r * wide;
    const uint64_t low = seen.bits(r * PAIR);
    const uint64_t high = PAIR == 2 && r * 2 + 1 < real ? seen.bits(r * 2 + 1) : 0;
    const auto add = [&](uint64_t bits, const float* row) {
      while (bits) {  // runs of keys
        const int from = __builtin_ctzll(bits);
        const uint64_t rest = ~(bits >> from);
        const int count = rest ? __builtin_ctzll(rest) : 64;
        product<Words, true>(weights + r * KEYS + from, KEYS, row, wide, 1, count, wide / WIDTH,
                             C + from * wide, wide, true);
        bits = from + count < 64 ? bits >> (from + count) << (from + count) : 0;
      }
    };
    if constexpr (PAIR == 1) {
      add(low, query);
    } else {
      add(low & high, query);
      for (int half = 0; half < 2; ++half) {
        std::memcpy(copy, query, wide * sizeof(float));
        keep_half(copy, wide, half == 0, half == 1);
        add(half == 0 ? low & ~high : high & ~low, copy);
      }
    }
  }
}

// Scores times the scale, rounded: the forward's largest one, which lse is made of, is the
// backward's to the bit, where a fused multiply-add would not round.
inline vfloat scaled(const float* scores, float scale) {
  vfloat s = load<vfloat>(scores) * scale;
#if defined(__AVX2__) || defined(__AVX512F__)
  asm("" : "+v"(s));
#endif
  return s;
}

// Lanes of v whose bit is not set become `other`.
inline vfloat where_set(uint64_t bits, vfloat v, float other) {
  vint bit;
  for (int i = 0; i < WIDTH; ++i) bit[i] = 1 << i;
  const vint set = (vint{} + static_cast<int32_t>(bits & ((uint64_t(1) << WIDTH) - 1))) & bit;
  return set != 0 ? v : splat(other);
}

}  // namespace
}  // namespace pydiffuse
