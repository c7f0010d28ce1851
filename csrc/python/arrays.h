// Arrays as the kernels see them. pydiffuse/numpy checks the arguments, with words for what is
// wrong, and lays the arrays out; here only what memory safety needs is checked again.
#pragma once

#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "../tensor.h"
#include "threads.h"

namespace pydiffuse {

namespace py = pybind11;
using Array = py::array;
using Arrays = std::vector<Array>;
using MaybeArray = std::optional<Array>;
using Ints = std::vector<int64_t>;

inline void require(bool fits, const char* words) {
  if (!fits) throw py::value_error(words);
}

inline bool is_native(const Array& a) {
  const char swapped = std::endian::native == std::endian::little ? '>' : '<';
  return a.dtype().byteorder() != swapped;
}

inline DType dtype_of(const Array& a) {
  const auto dtype = a.dtype();
  require(is_native(a), "arrays must have the machine's byte order");
  if (dtype.num() == py::dtype::num_of<float>()) return DType::f32;
  const auto name = py::str(dtype.attr("name")).cast<std::string>();
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::type_error("accepted: float32, bfloat16, float16; given " + name);
}

inline bool is_aligned(const Array& a) {
  return a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
}

// Elements from one to the next along each dimension; none backwards.
inline Ints strides_of(const Array& a) {
  Ints strides(a.ndim());
  for (py::ssize_t d = 0; d < a.ndim(); ++d) {
    require(a.strides(d) >= 0 && a.strides(d) % a.itemsize() == 0,
            "strides must be whole elements, forwards");
    strides[d] = a.strides(d) / a.itemsize();
  }
  return strides;
}

// The memory of an array of any strides.
inline void* memory_anyhow(const Array& a) {
  require(is_aligned(a), "arrays must be aligned");
  return const_cast<void*>(a.data());
}

// The memory of a C-contiguous array, to read or to write.
inline void* memory_of(const Array& a, bool written = false) {
  require((a.flags() & Array::c_style) && is_aligned(a), "arrays must be C-contiguous and aligned");
  require(!written || a.writeable(), "an array to write to is read-only");
  return const_cast<void*>(a.data());
}

inline bool has_shape(const Array& a, const Ints& shape) {
  return std::equal(a.shape(), a.shape() + a.ndim(), shape.begin(), shape.end());
}

// An array of T in a shape.
template <class T>
T* plane(const Array& a, const Ints& shape) {
  require(a.dtype().num() == py::dtype::num_of<std::remove_const_t<T>>() && is_native(a),
          "an array has the wrong dtype");
  require(has_shape(a, shape), "an array has the wrong shape");
  return static_cast<T*>(memory_of(a, !std::is_const_v<T>));
}
template <class T>
T* plane(const MaybeArray& a, const Ints& shape) {
  return a ? plane<T>(*a, shape) : nullptr;
}

inline Ints shape_of(const Array& a) { return Ints(a.shape(), a.shape() + a.ndim()); }

// [B, ...] as samples of n elements each.
inline Rows rows(const Array& a, const Ints& shape, bool written = false) {
  require(!shape.empty() && has_shape(a, shape), "arrays must have one shape [B, ...]");
  return {memory_of(a, written), shape[0] ? a.size() / shape[0] : 0, dtype_of(a)};
}

template <class T>
void check_count(const char* what, const T& list, size_t most) {
  if (list.empty() || list.size() > most)
    throw py::value_error(std::string(what) + ": accepted 1 to " + std::to_string(most));
}

// Computes while other Python threads run. A daemon thread whose interpreter has ended meanwhile is
// to be ended by its wish for the interpreter's lock: its stack, which holds arrays, would be
// unwound without that lock. It waits instead for the process to be gone.
template <class F>
void unlocked(const F& compute) {
  std::exception_ptr thrown;
  PyThreadState* state = PyEval_SaveThread();
  try {
    compute();
  } catch (...) {
    thrown = std::current_exception();
  }
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
  if (thrown) std::rethrow_exception(thrown);
}

// Each family's functions, in the module.
void bind_adaln(py::module_&);
void bind_attention(py::module_&);
void bind_conv(py::module_&);
void bind_guidance(py::module_&);
void bind_patch(py::module_&);
void bind_routing(py::module_&);
void bind_scan(py::module_&);
void bind_floors(py::module_&);

}  // namespace pydiffuse
