// A call on a GPU: its device, its stream, its workspace, and launches on them. Nothing here waits
// for the device or allocates past torch's allocator, so every call can be captured in a CUDA
// graph.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>

#include "../torch/tensors.h"

namespace pydiffuse {

// STD_CUDA_CHECK and the shim's own aoti_torch_get_current_cuda_stream are in libtorch_cuda.so,
// which a CPU build of torch has not and a CUDA build loads where this library's references do not
// reach. One binary serves both: errors are told here, and the stream's getter is looked up by
// name.
inline void cuda_check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    constexpr const char* NAME = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, NAME);
    void* library = found ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library) found = dlsym(library, NAME);
    return reinterpret_cast<Get>(found);
  }();
  STD_TORCH_CHECK(get, "pydiffuse: this torch has no CUDA stream; is libtorch_cuda.so loaded?");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  cuda_check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// What a kernel may have of a device; asked once.
struct Residency {
  int multiprocessors;
  bool cooperative;   // the device can hold a grid whose blocks wait for each other
  int64_t shared[3];  // [i]: a block's dynamic shared memory where i share a multiprocessor, or -1
};

inline const Residency& residency(const void* kernel, int threads, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Residency> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;

  cudaFuncAttributes function;
  cuda_check(cudaFuncGetAttributes(&function, kernel));
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                   static_cast<int>(function.sharedSizeBytes);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  Residency r{device_attribute(cudaDevAttrMultiProcessorCount, device),
              device_attribute(cudaDevAttrCooperativeLaunch, device) != 0,
              {-1, -1, -1}};
  // The runtime refuses to say what is left for more blocks than registers and threads admit.
  int admitted = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&admitted, kernel, threads, 0));
  for (int blocks = 1; blocks <= std::min(admitted, 2); ++blocks) {
    size_t room = 0;
    int resident = 0;
    cuda_check(cudaOccupancyAvailableDynamicSMemPerBlock(&room, kernel, blocks, threads));
    room = std::min<size_t>(room, most) / 256 * 256;
    cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, room));
    if (resident >= blocks) r.shared[blocks] = static_cast<int64_t>(room);
  }
  return known.emplace(std::pair{kernel, device}, r).first->second;
}

class Launch {
 public:
  explicit Launch(const Tensor& like)
      : like_(like),
        guard_(like.get_device_index()),
        device_(torch::stable::accelerator::getCurrentDeviceIndex()),
        stream_(current_stream(device_)) {}

  // Uninitialised; reused by torch for later work on this stream once the call has returned.
  double* doubles(int64_t count) {
    workspace_.push_back(torch::stable::new_empty(like_, {count}, ScalarType::Double));
    return static_cast<double*>(workspace_.back().data_ptr());
  }
  void check_device(const char* op, const MaybeTensor& t) const {
    STD_TORCH_CHECK(!t || (t->is_cuda() == like_.is_cuda() &&
                           t->get_device_index() == like_.get_device_index()),
                    op, ": all tensors must be on one device");
  }
  int multiprocessors() const { return device_attribute(cudaDevAttrMultiProcessorCount, device_); }
  template <class Args>
  const Residency& residency(void (*kernel)(Args), int threads) const {
    return pydiffuse::residency(reinterpret_cast<const void*>(kernel), threads, device_);
  }

  template <class Args>
  void run(void (*kernel)(Args), int64_t blocks, int threads, const Args& args,
           int64_t shared = 0) const {
    void* argument[] = {const_cast<Args*>(&args)};
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, INT_MAX)));
    cudaLaunchKernel(kernel, grid, dim3(threads), argument, shared, stream_);
    cuda_check(cudaGetLastError());
  }
  // False, with nothing launched, where this process may not use enough of the device at once.
  template <class Args>
  bool run_cooperative(void (*kernel)(Args), int64_t blocks, int threads, const Args& args,
                       int64_t shared) const {
    void* argument[] = {const_cast<Args*>(&args)};
    const cudaError_t error = cudaLaunchCooperativeKernel(
        kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), argument, shared, stream_);
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();  // it is answered for here
      return false;
    }
    cuda_check(error);
    return true;
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_;
  Tensors workspace_;
};

}  // namespace pydiffuse
