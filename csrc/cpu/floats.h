// Workspace of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace pydiffuse {

// A buffer that vectors and lines like: 64-byte aligned, not filled.
class Floats {
 public:
  explicit Floats(int64_t n) : memory_(new float[n + 16]) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<float*>((at + 63) & ~uintptr_t(63));
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* data_;
};

// out = the sum of partial [parts, count], in the order of the parts.
inline void add_parts(const float* partial, int64_t parts, int64_t count, float* out) {
  std::copy(partial, partial + count, out);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) out[i] += partial[part * count + i];
}

}  // namespace pydiffuse
