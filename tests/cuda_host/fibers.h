// Threads of execution on stacks of their own, which take turns on one thread of the system.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_SWITCH  // a switch of our own; elsewhere the system's, which is slower
#else
#include <ucontext.h>
#endif

namespace cuda_host {

struct Stack {  // the lowest page is not there: a frame that does not fit is a fault, not a bug
  static constexpr size_t PAGE = 4096;
#ifdef CUDA_HOST_SANITIZED
  static constexpr size_t BYTES = 512 << 10;
#else
  static constexpr size_t BYTES = 96 << 10;
#endif
  char* bottom;

  Stack();
  Stack(Stack&& other) : bottom(other.bottom) { other.bottom = nullptr; }
  ~Stack();
};

struct Context {  // of one that waits for its turn
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef CUDA_HOST_SWITCH
  void* top = nullptr;
#else
  ucontext_t registers;
#endif
};

// On its first turn it calls `entry`, which must call arrived(nullptr) and must not return.
void prepare(Context& c, const Stack& stack, void (*entry)());
void arrived(Context* here);
void swap(Context& from, Context& to);

}  // namespace cuda_host
