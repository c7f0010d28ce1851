// How every kernel sees a tensor's memory.
#pragma once

#include <cstdint>

namespace pydiffuse {

enum class DType : int { f32, bf16, f16 };

constexpr int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Above this many bytes written, an output will be gone from the caches before anyone reads it, so
// its lines are not fetched for writing.
constexpr int64_t STREAM_BYTES = int64_t(4) << 20;

struct Rows {  // one tensor, seen as [batch, n]: each sample's n elements lie together
  void* data = nullptr;
  int64_t stride = 0;  // elements from one sample to the next
  DType dtype = DType::f32;
};

}  // namespace pydiffuse
