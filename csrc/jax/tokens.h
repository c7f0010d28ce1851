// Tokens of scans and convolutions: [batch, (paths,) channels, tokens], or with channels last.
#pragma once

#include <optional>

#include "../cpu/steps.h"
#include "../scan.h"
#include "mapped.h"

namespace pydiffuse {

using Maybe = std::optional<Buffer>;

// The arrays of a call in their order, of which some may be missing: bit i of `has` is the i-th of
// those.
class Arrays {
 public:
  Arrays(Call& call, int64_t has) : call_(call), has_(has) {}
  Maybe maybe(int bit) { return has_ >> bit & 1 ? Maybe(call_.input()) : Maybe(); }
  Maybe maybe_output(int bit) { return has_ >> bit & 1 ? Maybe(call_.output()) : Maybe(); }

 private:
  Call& call_;
  int64_t has_;
};

struct TokensOf {  // one layout for all tokens of a call
  const Mapped& mapped;
  bool channels_last;
  int64_t batch, length, channels;

  Tokens operator()(const Buffer& b, int64_t v, int64_t paths = 0) const {
    const int64_t rows = channels_last ? length : channels, row = channels_last ? channels : length;
    Tokens t;
    t.data =
        paths ? mapped.at(b, v, {batch, paths, rows, row}) : mapped.at(b, v, {batch, rows, row});
    t.dtype = dtype_of(b);
    t.path = rows * row;
    t.batch = std::max<int64_t>(1, paths) * t.path;
    t.token = channels_last ? channels : 1;
    t.channel = channels_last ? 1 : length;
    if (paths <= 1) t.path = 0;
    return t;
  }
};

// Orders [paths, length] and the offsets of sequences, which no vmap maps.
template <class To>
void set_steps(To& to, const Mapped& mapped, int64_t paths, const Maybe& order,
               const Maybe& offsets) {
  require(to.length <= INT32_MAX, "accepted: below 2^31 tokens");
  if (order) to.order = mapped.plane<const int32_t>(*order, 0, {paths, to.length});
  to.sequences = 1;
  if (offsets) {
    require(!offsets->dims.empty() && offsets->dims.back() >= 2, "offsets must be [sequences + 1]");
    to.sequences = static_cast<int>(offsets->dims.back()) - 1;
    to.offsets = mapped.plane<const int32_t>(*offsets, 0, {offsets->dims.back()});
  }
  const char* bad = bad_steps(to.order, paths * to.length, to.offsets, to.sequences, to.length);
  require(!bad, bad);
}

inline int64_t size_from_end(const Buffer& b, int64_t i) {
  const auto rank = static_cast<int64_t>(b.dims.size());
  require(rank >= i, "an array has too few dimensions");
  return b.dims[rank - i];
}

}  // namespace pydiffuse
