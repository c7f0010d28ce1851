// Tokens of scans and convolutions, where they lie.
#pragma once

#include "../cpu/steps.h"
#include "../scan.h"
#include "arrays.h"

namespace pydiffuse {

// [batch, paths, length, channels], or without paths if those are 0. Channels or tokens lie next to
// each other.
inline Tokens tokens_of(const Array& a, int64_t batch, int64_t paths, int64_t length,
                        int64_t channels, bool written = false) {
  require(
      has_shape(a, paths ? Ints{batch, paths, length, channels} : Ints{batch, length, channels}),
      "tokens have another shape");
  const Ints s = strides_of(a);
  const int token = paths ? 2 : 1;
  require(a.size() == 0 || channels == 1 || length == 1 || s[token] == 1 || s[token + 1] == 1,
          "channels or tokens must lie next to each other");
  require(!written || (a.writeable() && !paths), "an array to write to is read-only");
  return {memory_anyhow(a), s[0], paths ? s[1] : 0, s[token], s[token + 1], dtype_of(a)};
}

// Orders [paths, length] and the offsets of sequences, of a scan or a convolution.
template <class Call>
void set_steps(Call& call, int64_t paths, const MaybeArray& order, const MaybeArray& offsets) {
  require(call.length <= INT32_MAX, "accepted: below 2^31 tokens");
  call.order = plane<const int32_t>(order, {paths, call.length});
  call.sequences = 1;
  if (offsets) {
    require(offsets->ndim() == 1 && offsets->shape(0) >= 2, "offsets must be [sequences + 1]");
    call.sequences = static_cast<int>(offsets->shape(0)) - 1;
    call.offsets = plane<const int32_t>(*offsets, {offsets->shape(0)});
  }
  const char* bad =
      bad_steps(call.order, paths * call.length, call.offsets, call.sequences, call.length);
  require(!bad, bad);
}

}  // namespace pydiffuse
