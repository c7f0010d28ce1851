// The part of CUDA's runtime that csrc/cuda calls, for kernels that run on the host
// (../runtime.cpp).
#pragma once

#include <cstddef>

#include "device.h"

enum cudaError_t {  // CUDA's numbers
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock, numRegs, maxDynamicSharedSizeBytes;
};
struct cudaDeviceProp {
  int major, minor, multiProcessorCount, cooperativeLaunch, warpSize;
  int maxThreadsPerBlock, maxThreadsPerMultiProcessor, regsPerBlock, regsPerMultiprocessor;
  size_t sharedMemPerBlock, sharedMemPerMultiprocessor, sharedMemPerBlockOptin,
      reservedSharedMemPerBlock;
};
using cudaStream_t = struct CudaHostStream*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t dynamic);
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* kernel, int blocks,
                                                      int threads);

namespace cuda_host {

using Body = void (*)(const void* kernel, const void* args);

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, bool cooperative,
                   Body body, const void* args);

template <class Args>
void call(const void* kernel, const void* args) {
  reinterpret_cast<void (*)(Args)>(const_cast<void*>(kernel))(*static_cast<const Args*>(args));
}

}  // namespace cuda_host

// Kernels take one argument, a struct, here.
template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args,
                             size_t shared = 0, cudaStream_t = nullptr) {
  return cuda_host::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, false,
                           cuda_host::call<Args>, args[0]);
}
template <class Args>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args,
                                        size_t shared = 0, cudaStream_t = nullptr) {
  return cuda_host::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, true,
                           cuda_host::call<Args>, args[0]);
}
