// A call of the scan or the convolution on a GPU.
#pragma once

#include "../scan.h"
#include "launch.h"
#include "vectors.cuh"

namespace pydiffuse {
namespace {

struct ScanLaunch : Launch {
  const char* op;

  ScanLaunch(const char* op_, const Tensor& like) : Launch(like), op(op_) {}

  float* floats(int64_t count) { return reinterpret_cast<float*>(doubles((count + 1) / 2)); }

  // The kernels step along tokens and channels by less than 4 GiB.
  void check_strides(const Tokens& t, int64_t length, int64_t channels) const {
    const auto fits = [&](int64_t stride) { return stride * bytes_of(t.dtype) <= UINT32_MAX; };
    STD_TORCH_CHECK(!t.data || ((length < 2 || fits(t.token)) && (channels < 2 || fits(t.channel))),
                    op, ": has strides ", t.token, " along tokens and ", t.channel,
                    " along channels; accepted: less than 4 GiB each");
  }

  // floats: of a block's shared memory
  template <class Args>
  void launch(void (*kernel)(Args), int64_t blocks, const Args& args, int64_t floats = 0) const {
    const int64_t shared = floats * sizeof(float);
    STD_TORCH_CHECK(shared <= DEFAULT || residency(kernel, THREADS).shared[1] >= shared, op,
                    ": needs ", shared,
                    " bytes of shared memory in a block, more than this GPU has");
    STD_TORCH_CHECK(blocks <= INT_MAX, op, ": too much for one launch; split the batch");
    run(kernel, blocks, THREADS, args, shared);
  }

 private:
  static constexpr int64_t DEFAULT = 48 * 1024;  // bytes that any kernel may have
};

}  // namespace
}  // namespace pydiffuse
