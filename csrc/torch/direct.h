// The usual call of a public function as one op (`<op>.new`): arguments as the user has them,
// checked and laid out here, results allocated here. Where a call is unusual or wrong the op gives
// nothing back: the way through Python serves it, or has the words for what is wrong with it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <initializer_list>

#include "tensors.h"

namespace pydiffuse {

using Sizes = std::initializer_list<int64_t>;

inline bool has_sizes(const Tensor& t, Sizes sizes) {
  const auto given = t.sizes();
  return given.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), given.begin());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// What the arguments of one call are held against: one device, and kernels' dtypes.
class Usual {
 public:
  explicit Usual(const Tensor& like) : cuda_(like.is_cuda()), index_(like.get_device_index()) {}

  bool here(const Tensor& t) const {
    return t.is_cuda() == cuda_ && t.get_device_index() == index_ && (cuda_ || t.is_cpu());
  }
  bool floating(const Tensor& t, DType* dtype) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        *dtype = DType::f32;
        return here(t);
      case ScalarType::BFloat16:
        *dtype = DType::bf16;
        return here(t);
      case ScalarType::Half:
        *dtype = DType::f16;
        return here(t);
      default:
        return false;
    }
  }
  // Contiguous, of one dtype; a tensor that is not there fits.
  template <class T>
  bool plain(const Tensor& t, ScalarType dtype, Sizes sizes, T** data) const {
    if (t.scalar_type() != dtype || !here(t) || !has_sizes(t, sizes) || !t.is_contiguous())
      return false;
    *data = static_cast<T*>(t.data_ptr());
    return true;
  }
  template <class T>
  bool plain(const MaybeTensor& t, ScalarType dtype, Sizes sizes, T** data) const {
    *data = nullptr;
    return !t || plain(*t, dtype, sizes, data);
  }

 private:
  bool cuda_;
  int32_t index_;
};

// The numbers of a call, as a float64 tensor on the CPU: to a dispatcher a tensor costs a fraction
// of what its numbers do. Null where it is none of `least` or more.
inline const double* numbers_of(const Tensor& t, int64_t least) {
  const bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == 1 &&
                    t.numel() >= least && t.is_contiguous();
  return fits ? static_cast<const double*>(t.data_ptr()) : nullptr;
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// Uninitialised, on like's device.
inline Tensor new_tensor(const Tensor& like, int32_t dtype, const int64_t* sizes,
                         const int64_t* strides, int64_t dims) {
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, type, index, &made));
  return Tensor(made);
}

constexpr int64_t MAX_DIMS = 8;

// Contiguous.
inline Tensor new_tensor(const Tensor& like, int32_t dtype, Sizes sizes) {
  int64_t strides[MAX_DIMS], next = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = next;
    next *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  return new_tensor(like, dtype, sizes.begin(), strides, static_cast<int64_t>(sizes.size()));
}

inline Tensor new_tensor(const Tensor& like, Sizes sizes) {
  return new_tensor(like, dtype_code(like), sizes);
}

// Contiguous, of t's sizes and dtype.
inline Tensor new_like(const Tensor& t) {
  const auto sizes = t.sizes();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t strides[MAX_DIMS], next = 1;
  STD_TORCH_CHECK(dims <= MAX_DIMS, "a tensor of ", dims, " dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = next;
    next *= std::max<int64_t>(1, sizes[d]);
  }
  return new_tensor(t, dtype_code(t), sizes.data(), strides, dims);
}

}  // namespace pydiffuse
