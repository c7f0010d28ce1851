// What every torch binding needs: tensors as rows of samples, and threads, through the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../tensor.h"

// The dispatcher's library of ops. A kernel of the Hugging Face Hub (torch-ext) has a name of its
// own for every build, so that several can be loaded.
#ifdef TORCH_EXTENSION_NAME
#define PYDIFFUSE_LIBRARY TORCH_EXTENSION_NAME
#else
#define PYDIFFUSE_LIBRARY pydiffuse
#endif
#define PYDIFFUSE_IMPL_IN(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define PYDIFFUSE_IMPL(key, m) PYDIFFUSE_IMPL_IN(PYDIFFUSE_LIBRARY, key, m)

namespace pydiffuse {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": accepts float32, bfloat16 and float16");
}

// The samples of a batch all have the shape, and in memory the order, of the samples of `like`.
struct Layout {
  const char* op;
  Tensor like;
  int64_t batch, n;

  Layout(const char* op_, const Tensor& t, bool written = true) : op(op_), like(t) {
    STD_TORCH_CHECK(t.dim() >= 1, op, ": tensors need a batch dimension");
    batch = t.size(0);
    n = batch == 0 ? 0 : t.numel() / batch;
    if (t.numel() == 0 || t.is_contiguous()) return;
    int64_t span = 1;
    for (int64_t d = 1; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
    STD_TORCH_CHECK(span == n && (batch == 1 || !written || t.stride(0) >= n), op,
                    ": the elements of each sample must lie together in memory");
  }

  // Inputs in another order are copied into it; `keep` owns the copies until the kernels are done.
  Rows rows(const Tensor& t, Tensors* keep) const {
    const auto size = t.sizes(), want = like.sizes(), stride = t.strides(), order = like.strides();
    bool same = size.size() == want.size(), ordered = true;
    for (size_t d = 0; same && d < size.size(); ++d) {
      same = size[d] == want[d];
      ordered = ordered && (d == 0 || size[d] == 1 || stride[d] == order[d]);
    }
    STD_TORCH_CHECK(same, op, ": all tensors must have one shape");
    STD_TORCH_CHECK(
        t.get_device_index() == like.get_device_index() && t.is_cuda() == like.is_cuda(), op,
        ": all tensors must be on one device");
    const DType dtype = dtype_of(op, t);
    if (ordered || batch * n == 0) return {t.data_ptr(), stride[0], dtype};
    STD_TORCH_CHECK(keep && like.is_contiguous(), op,
                    ": tensors must share one order of dimensions in memory");
    keep->push_back(torch::stable::contiguous(t));
    return {keep->back().data_ptr(), n, dtype};
  }
};

inline void check_doubles(const char* op, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.numel() == numel,
                  op,
                  ": coefficients and statistics must be contiguous float64, one row per sample");
}

struct TorchThreads {
  static int64_t threads() { return torch::stable::get_num_threads(); }
  template <class F>
  void operator()(int64_t end, int64_t grain, const F& f) const {
    if (end <= grain) return f(0, end);
    torch::stable::parallel_for(0, end, grain, f);
  }
};

}  // namespace pydiffuse
