// A launch in flight: which of its threads may go on, and what the others wait for.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fibers.h"
#include "include/cuda_runtime.h"

namespace cuda_host {

struct Launch {
  const void* kernel;
  Body body;
  const void* args;
  dim3 grid, block;
  size_t shared;  // bytes of dynamic shared memory in a block
  bool cooperative;
  uint64_t seed;  // of the order in which threads and blocks take their turns
};

// Runs it. Blocks come one after another, or, in a cooperative launch, are all there at once. Each
// time a thread waits, any of those that may go on is next; in every other block a warp keeps its
// turn as long as it can, so that it runs far ahead of those it should wait for. Empty, or what is
// wrong with the kernel.
std::string run(const Launch& launch);

}  // namespace cuda_host
