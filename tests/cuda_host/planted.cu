// Kernels with a fault each, which the emulator must find (tests/test_cuda_host.py); and one
// without.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <string>

namespace pydiffuse {
namespace {

enum Fault {
  NONE,
  NO_BARRIER,
  OUT_OF_BOUNDS,
  OUT_OF_SHARED,
  DIVERGENT,
  ENDED,
  ELSEWHERE,
  UNWRITTEN,
  MISALIGNED,
  IN_WARP,
  NO_WAIT
};

struct PlantedArgs {
  int fault;
  float* out;  // [256]
};

// out[i] = 255 - i, by way of shared memory.
__global__ void __launch_bounds__(256) planted_kernel(const __grid_constant__ PlantedArgs a) {
  __shared__ float turned[256];
  extern __shared__ float4 block_memory[];
  const int i = threadIdx.x;
  turned[255 - i] = static_cast<float>(i);
  if (a.fault == MISALIGNED) reinterpret_cast<float4&>(a.out[1]).x = 0.0f;
  if (a.fault == OUT_OF_SHARED) reinterpret_cast<float*>(block_memory)[64 + i] = 0.0f;
  if (a.fault == ENDED && i >= 224) return;
  if (a.fault == IN_WARP && (i & 1)) turned[i] = __shfl_xor_sync(0xffffffffu, turned[i], 2);
  if (a.fault == NO_WAIT) {
    __pipeline_memcpy_async(&block_memory[0].x, a.out, sizeof(float));
    __pipeline_commit();
  }
  if (a.fault == DIVERGENT ? i < 64 : a.fault != NO_BARRIER && a.fault != ELSEWHERE)
    __syncthreads();
  if (a.fault == ELSEWHERE) {
    if (i < 32)
      __syncthreads();
    else
      __syncthreads();
  }
  a.out[a.fault == OUT_OF_BOUNDS ? i + 1 : i] =
      a.fault == UNWRITTEN || a.fault == NO_WAIT ? block_memory[0].x : turned[i];
}

__global__ void __launch_bounds__(256) occupying_kernel(const __grid_constant__ PlantedArgs a) {
  a.out[threadIdx.x] = 0.0f;
}

}  // namespace
}  // namespace pydiffuse

using namespace pydiffuse;

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the launch says.
EXPORT const char* planted_launch(int fault, float* out) {
  const PlantedArgs args{fault, out};
  void* argument[] = {const_cast<PlantedArgs*>(&args)};
  return cudaGetErrorString(cudaLaunchKernel(planted_kernel, 1, 256, argument, 256));
}

// Asks for so many blocks on a multiprocessor, as launches with too little regard for registers do:
// what the runtime says to the question, and to a cooperative launch of so many on each.
EXPORT const char* planted_occupancy(int blocks, bool ask, float* out) {
  const auto kernel = reinterpret_cast<const void*>(occupying_kernel);
  size_t bytes = 0;
  if (ask)
    return cudaGetErrorString(
        cudaOccupancyAvailableDynamicSMemPerBlock(&bytes, kernel, blocks, 256));
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const PlantedArgs args{NONE, out};
  void* argument[] = {const_cast<PlantedArgs*>(&args)};
  return cudaGetErrorString(
      cudaLaunchCooperativeKernel(occupying_kernel, blocks * multiprocessors, 256, argument));
}
EXPORT const char* planted_shared(int bytes, float* out) {
  const PlantedArgs args{NONE, out};
  void* argument[] = {const_cast<PlantedArgs*>(&args)};
  return cudaGetErrorString(cudaLaunchKernel(occupying_kernel, 1, 256, argument, bytes));
}

#ifdef PLANTED_MAIN
extern "C" int cuda_host_add_device(int, int, int, int, int64_t, int64_t);

int main(int, char** argv) {
  cuda_host_add_device(9, 0, 132, 2048, 228 << 10, 227 << 10);
  float* const out = new float[256];
  const std::string told = planted_launch(std::stoi(argv[1]), out);
  const bool right = told == "no error" && out[0] == 255.0f;
  delete[] out;
  return right ? 0 : 1;
}
#endif
