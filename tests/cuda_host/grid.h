// A launch in flight: which of its threads may go on, and what the others wait for.
#pragma once

#include <cstdlib>
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

constexpr unsigned LANES = 32;

enum class State { running, barrier, warp, grid, ended };

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory poisoned(size_t bytes, size_t align);  // NaN

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Block;
struct Warp;

struct Thread {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  unsigned number = 0;  // in its block
  State state = State::running;
  Where where;
  unsigned mask = 0;      // of the lanes it waits for
  uint64_t words[LANES];  // what they gave
  std::vector<std::vector<Copy>> batches;
  std::vector<Copy> copies;  // since the last commit

  unsigned lane() const { return number % LANES; }
};

struct Warp {
  uint64_t words[LANES];
  unsigned lanes = 0, waiting = 0;  // that there are, that wait
  std::vector<Thread*> ready;       // that may go on
  size_t place = 0;                 // in `awake`, if there are any
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned waiting = 0;  // at the barrier
  Memory dynamic;
  std::vector<std::pair<const void*, Memory>> variables;
};

extern Thread* running;

// Another thread's turn; when it is this one's again, it goes on.
void next_turn();
// The launch ends here.
void fail(const std::string& why);

// Runs it. Blocks come one after another, or, in a cooperative launch, are all there at once. Each
// time a thread waits, any of those that may go on is next; in every other block a warp keeps its
// turn as long as it can, so that it runs far ahead of those it should wait for. Empty, or what is
// wrong with the kernel.
std::string run(const Launch& launch);

}  // namespace cuda_host
