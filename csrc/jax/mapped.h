// What vmap puts in front of the arrays of a call (vmap_method "expand_dims"): the same number of
// dimensions before each, of size 1 where an array is not mapped. A call is then one of the kernel
// for each index, or one for all where only the batch is mapped.
#pragma once

#include <initializer_list>

#include "call.h"

namespace pydiffuse {

class Mapped {
 public:
  // out: a result, which is mapped over all; `rank` dimensions are its own.
  Mapped(const Buffer& out, int64_t rank) {
    leading(out, rank);  // checks
    sizes_ = out.dims.first(out.dims.size() - rank);
    for (const int64_t size : sizes_) count_ *= size;
  }

  int64_t count() const { return count_; }

  // What is at the v-th index of an array that has this shape without what vmap put in front.
  void* at(const Buffer& b, int64_t v, std::initializer_list<int64_t> shape) const {
    require(b.dims.size() == sizes_.size() + shape.size() &&
                std::equal(shape.begin(), shape.end(), b.dims.begin() + sizes_.size()),
            "an array has the wrong shape");
    int64_t own = 1, index = 0, stride = 1;
    for (const int64_t size : shape) own *= size;
    for (size_t d = sizes_.size(); d-- > 0;) {
      require(b.dims[d] == sizes_[d] || b.dims[d] == 1, "arrays are mapped over different sizes");
      if (b.dims[d] > 1) {
        index += v % sizes_[d] * stride;
        stride *= sizes_[d];
      }
      v /= sizes_[d];
    }
    return static_cast<char*>(b.data) + index * own * int64_t(ffi::ByteWidth(b.type));
  }
  template <class T>
  T* plane(const Buffer& b, int64_t v, std::initializer_list<int64_t> shape) const {
    require(b.type == type_of<T>(), "an array has the wrong dtype");
    return static_cast<T*>(at(b, v, shape));
  }

  // Whether an array is mapped over all, or over nothing.
  bool whole(const Buffer& b) const {
    return std::equal(sizes_.begin(), sizes_.end(), b.dims.begin());
  }
  bool shared(const Buffer& b) const {
    return std::all_of(b.dims.begin(), b.dims.begin() + sizes_.size(),
                       [](int64_t size) { return size == 1; });
  }

 private:
  std::span<const int64_t> sizes_;
  int64_t count_ = 1;
};

}  // namespace pydiffuse
