// Checks of one op's arguments: what does not fit is refused before memory is touched.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "tensors.h"

namespace pydiffuse {

// What the arguments of one op must be. `like` says on which device.
struct Accepts {
  const char* op;
  Tensor like;

  template <class Sizes>
  static std::string text(const Sizes& sizes) {
    std::string s = "[";
    for (const int64_t size : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
    return s + "]";
  }
  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    const auto given = t.sizes();
    STD_TORCH_CHECK(
        given.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), given.begin()), op,
        ": ", name, " has shape ", text(given), "; accepted: ", text(sizes));
    STD_TORCH_CHECK(
        t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ",
        name, " is on another device than the input; all tensors must be on one");
  }
  // Contiguous float32.
  float* floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    shape(name, t, sizes);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name,
                    " must be contiguous float32");
    return static_cast<float*>(t.data_ptr());
  }
  float* floats(const char* name, const MaybeTensor& t,
                std::initializer_list<int64_t> sizes) const {
    return t ? floats(name, *t, sizes) : nullptr;
  }
  // Contiguous int32.
  const int32_t* ints(const char* name, const MaybeTensor& t,
                      std::initializer_list<int64_t> sizes) const {
    if (!t) return nullptr;
    shape(name, *t, sizes);
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(), op, ": ", name,
                    " must be contiguous int32");
    return static_cast<const int32_t*>(t->data_ptr());
  }
};

}  // namespace pydiffuse
