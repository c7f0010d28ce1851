// CUDA's runtime for devices that are only described: what it knows of them and of the kernels
// comes from Python (emulator.py), and NVIDIA's calculator says what a multiprocessor holds.
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "grid.h"

#if __has_include(<cuda_occupancy.h>)
#include <cuda_occupancy.h>
#define CUDA_HOST_OCCUPANCY 1
#else
#define CUDA_HOST_OCCUPANCY 0
#endif

namespace cuda_host {
namespace {

struct Usage {  // of a kernel's machine code; at first the most that there may be
  int registers = 255, shared = 0;
  int most_dynamic = 48 << 10;  // bytes of shared memory that a launch may ask for
};

struct Kernel {
  std::string name = "a kernel without a name";
  std::map<int, Usage> usage;  // by device
  int launches = 0;
};

std::mutex mutex;
std::vector<cudaDeviceProp> devices;
std::map<const void*, Kernel> kernels;
int current = 0;
uint64_t seed = 0, launches = 0;
std::string failure;
cudaError_t last = cudaSuccess;

cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

bool exists(int device) { return device >= 0 && device < static_cast<int>(devices.size()); }

#if CUDA_HOST_OCCUPANCY
struct Question {
  cudaOccDeviceProp device;
  cudaOccFuncAttributes kernel;
  cudaOccDeviceState state;

  explicit Question(const void* k) : device(devices[current]) {
    cudaFuncAttributes attributes{};
    cudaFuncGetAttributes(&attributes, k);
    kernel = cudaOccFuncAttributes(attributes);
  }
};
#endif

int resident(const void* kernel, int threads, size_t dynamic) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, dynamic);
  return blocks;
}

cudaError_t refusal(const Usage& usage, dim3 grid, unsigned threads, size_t shared) {
  const cudaDeviceProp& d = devices[current];
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!blocks || !threads || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      threads > static_cast<unsigned>(d.maxThreadsPerBlock))
    return cudaErrorInvalidConfiguration;
  if (shared > static_cast<size_t>(usage.most_dynamic) ||
      shared + usage.shared > d.sharedMemPerBlockOptin)
    return cudaErrorInvalidValue;
  const unsigned registers = (usage.registers + 7) / 8 * 8 * ((threads + 31) / 32 * 32);
  if (registers > static_cast<unsigned>(d.regsPerBlock)) return cudaErrorLaunchOutOfResources;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, bool cooperative,
                   Body body, const void* args) {
  const std::lock_guard lock(mutex);
  Kernel& k = kernels[kernel];
  const unsigned threads = block.x * block.y * block.z;
  const cudaError_t refused = refusal(k.usage[current], grid, threads, shared);
  if (refused != cudaSuccess) return told(refused);
  if (cooperative && grid.x * grid.y * grid.z > static_cast<uint64_t>(resident(
                                                    kernel, static_cast<int>(threads), shared)) *
                                                    devices[current].multiProcessorCount)
    return told(cudaErrorCooperativeLaunchTooLarge);
  ++k.launches;
  const std::string wrong =
      run({kernel, body, args, grid, block, shared, cooperative, seed + 1000003 * ++launches});
  if (wrong.empty()) return cudaSuccess;
  failure = k.name + ": " + wrong;
  return told(cudaErrorLaunchFailure);
}

}  // namespace cuda_host

using namespace cuda_host;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return failure.c_str();
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!exists(device)) return told(cudaErrorInvalidDevice);
  *properties = devices[device];
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return told(cudaErrorInvalidDevice);
  const cudaDeviceProp& d = devices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = d.cooperativeLaunch;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(d.sharedMemPerBlockOptin);
      return cudaSuccess;
  }
  return told(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const Usage& usage = kernels[kernel].usage[current];
  *attributes = {static_cast<size_t>(usage.shared), 1024, usage.registers, usage.most_dynamic};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Usage& usage = kernels[kernel].usage[current];
  const auto room = static_cast<int>(devices[current].sharedMemPerBlockOptin);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > room - usage.shared)
    return told(cudaErrorInvalidValue);
  usage.most_dynamic = value;
  return cudaSuccess;
}

#if CUDA_HOST_OCCUPANCY

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t dynamic) {
  const Question q(kernel);
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &q.device, &q.kernel, &q.state, threads,
                                              dynamic) != CUDA_OCC_SUCCESS)
    return told(cudaErrorInvalidValue);
  *blocks = result.activeBlocksPerMultiprocessor;
  return cudaSuccess;
}

cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* kernel, int blocks,
                                                      int threads) {
  const Question q(kernel);
  return cudaOccAvailableDynamicSMemPerBlock(bytes, &q.device, &q.kernel, &q.state, blocks,
                                             threads) == CUDA_OCC_SUCCESS
             ? cudaSuccess
             : told(cudaErrorInvalidValue);
}

#else  // without the calculator: one block, if it fits

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int,
                                                          size_t dynamic) {
  const size_t all = dynamic + kernels[kernel].usage[current].shared;
  *blocks = all <= devices[current].sharedMemPerBlockOptin;
  return cudaSuccess;
}

cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* kernel, int blocks,
                                                      int) {
  if (blocks != 1) return told(cudaErrorInvalidValue);
  *bytes = devices[current].sharedMemPerBlockOptin - kernels[kernel].usage[current].shared;
  return cudaSuccess;
}

#endif

// What emulator.py calls.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuda_host_has_calculator() { return CUDA_HOST_OCCUPANCY; }

EXPORT int cuda_host_add_device(int major, int minor, int multiprocessors, int threads,
                                int64_t shared, int64_t shared_of_block) {
  cudaDeviceProp d{};
  d.major = major;
  d.minor = minor;
  d.multiProcessorCount = multiprocessors;
  d.cooperativeLaunch = 1;
  d.warpSize = 32;
  d.maxThreadsPerBlock = 1024;
  d.maxThreadsPerMultiProcessor = threads;
  d.regsPerBlock = d.regsPerMultiprocessor = 65536;
  d.sharedMemPerBlock = 48 << 10;
  d.sharedMemPerMultiprocessor = shared;
  d.sharedMemPerBlockOptin = shared_of_block;
  d.reservedSharedMemPerBlock = 1024;
  devices.push_back(d);
  return static_cast<int>(devices.size()) - 1;
}

EXPORT void cuda_host_set_device(int device) { current = device; }
EXPORT void cuda_host_set_seed(uint64_t value) {
  seed = value;
  launches = 0;
}
EXPORT void cuda_host_name_kernel(const void* kernel, const char* name) {
  kernels[kernel].name = name;
}
EXPORT void cuda_host_set_usage(const void* kernel, int device, int registers, int shared) {
  Usage& usage = kernels[kernel].usage[device];
  usage.registers = registers;
  usage.shared = shared;
}
EXPORT int cuda_host_launches(const void* kernel) { return kernels[kernel].launches; }

// The library's own: a call's device is the one that the tests have chosen, wherever torch has the
// tensors.
#define HIDDEN extern "C" __attribute__((visibility("hidden")))

HIDDEN int aoti_torch_create_device_guard(int, void** guard) {
  *guard = nullptr;
  return 0;
}
HIDDEN int aoti_torch_delete_device_guard(void*) { return 0; }
HIDDEN int aoti_torch_get_current_device_index(int* device) {
  *device = current;
  return 0;
}
