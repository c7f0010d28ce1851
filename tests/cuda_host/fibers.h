// Threads of execution on stacks of their own, which take turns on one thread of the system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_host {

struct Stack {  // the lowest page is not there: a frame that does not fit is a fault, not a bug
  static constexpr size_t PAGE = 4096;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t BYTES = 512 << 10;
#else
  static constexpr size_t BYTES = 96 << 10;
#endif
  char* bottom;

  Stack() {
    void* all = mmap(nullptr, PAGE + BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED || mprotect(all, PAGE, PROT_NONE)) throw std::bad_alloc();
    bottom = static_cast<char*>(all) + PAGE;
  }
  Stack(Stack&& other) : bottom(other.bottom) { other.bottom = nullptr; }
  ~Stack() {
    if (bottom) munmap(bottom - PAGE, PAGE + BYTES);
  }
};

struct Context {  // of one that waits for its turn
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t registers;
#endif
};

#ifdef __x86_64__
extern "C" void cuda_host_switch(void** from, void* to);  // saves what a callee must, on the stack
#endif

// `entry` must not return.
inline void prepare(Context& c, const Stack& stack, void (*entry)()) {
  c.bottom = stack.bottom;
  c.bytes = Stack::BYTES;
  c.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack.bottom, Stack::BYTES);  // of frames that were left for good
#endif
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(stack.bottom + Stack::BYTES) - 1;
  *--top = reinterpret_cast<void*>(entry);
  std::memset(top -= 6, 0, 6 * sizeof(void*));
  c.top = top;
#else
  getcontext(&c.registers);
  c.registers.uc_stack.ss_sp = stack.bottom;
  c.registers.uc_stack.ss_size = Stack::BYTES;
  c.registers.uc_link = nullptr;
  makecontext(&c.registers, entry, 0);
#endif
}

inline Context* came_from = nullptr;

inline void arrived([[maybe_unused]] Context* here) {  // first of all, on a new stack
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(here ? here->fake_stack : nullptr, &came_from->bottom,
                                  &came_from->bytes);
#endif
}

inline void swap(Context& from, Context& to) {
  came_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  cuda_host_switch(&from.top, to.top);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived(&from);
}

}  // namespace cuda_host
