// Tokens moved by index, compiled once per instruction set. Without a gate a token is its bytes.
#include "routing.h"

#include <cstring>

#include "simd.h"

namespace pydiffuse {
namespace {

[[maybe_unused]] constexpr int64_t LINE = 64;  // bytes

// Whole lines past the caches, where asked for and the target lies on one.
void copy_token(char* to, const char* from, int64_t bytes, bool past_cache) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (past_cache && reinterpret_cast<uintptr_t>(to) % LINE == 0)
    for (; i + LINE <= bytes; i += LINE)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load<__m512i>(from + i));
#elif defined(__AVX2__)
  if (past_cache && reinterpret_cast<uintptr_t>(to) % LINE == 0)
    for (; i + LINE <= bytes; i += LINE) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load<__m256i>(from + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), load<__m256i>(from + i + 32));
    }
#endif
  (void)past_cache;
  std::memcpy(to + i, from + i, bytes - i);
}

// to = (1 - g) base + g y; what is missing is zero.
template <class E>
void blend_token(typename E::Bits* to, const typename E::Bits* base, const typename E::Bits* y,
                 float g, int64_t n) {
  const float rest = 1 - g;
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    vfloat v{};
    if (base) v = rest * E::read(base + i);
    if (y) v += g * E::read(y + i);
    E::write(to + i, v, false);
  }
  for (; i < n; ++i) {
    float v = base ? rest * E::read_one(base + i) : 0.0f;
    if (y) v += g * E::read_one(y + i);
    E::write_one(to + i, v);
  }
}

void move(const MoveArgs& a, int64_t begin, int64_t end) {
  const int64_t size = bytes_of(a.dtype), bytes = a.n * size;
  auto token = [&](const TokenRows& t, int64_t b, int64_t i) {
    return static_cast<char*>(t.data) + (b * t.sample + i * t.token) * size;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.count, t = item % a.count;
    const int64_t s = a.index ? a.index[item] : t, p = a.place ? a.place[item] : t;
    char* to = token(a.out, b, p);
    const char* base = a.base.data ? token(a.base, b, p) : nullptr;
    const char* y = a.y.data && s >= 0 ? token(a.y, b, s) : nullptr;
    if (s >= 0 && a.gate) {
      const float g = a.gate[b * a.gates + (a.gate_at_index ? s : t)];
      with_element(a.dtype, [&](auto element) {
        using E = decltype(element);
        using P = const typename E::Bits*;
        blend_token<E>(reinterpret_cast<typename E::Bits*>(to), reinterpret_cast<P>(base),
                       reinterpret_cast<P>(y), g, a.n);
      });
      continue;
    }
    const char* from = s >= 0 ? y : base;
    if (from == to) continue;
    if (from)
      copy_token(to, from, bytes, a.stream);
    else
      std::memset(to, 0, bytes);
  }
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace pydiffuse

PYDIFFUSE_TABLE(RoutingKernels, routing) = {pydiffuse::move};
