#include "fibers.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#ifdef CUDA_HOST_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUDA_HOST_SWITCH
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, . - cuda_host_switch
)");

extern "C" void cuda_host_switch(void** from, void* to);  // saves what a callee must, on the stack
#endif

namespace cuda_host {
namespace {

Context* came_from = nullptr;

}  // namespace

Stack::Stack() {
  void* all = mmap(nullptr, PAGE + BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED || mprotect(all, PAGE, PROT_NONE)) throw std::bad_alloc();
  bottom = static_cast<char*>(all) + PAGE;
}

Stack::~Stack() {
  if (bottom) munmap(bottom - PAGE, PAGE + BYTES);
}

void prepare(Context& c, const Stack& stack, void (*entry)()) {
  c.bottom = stack.bottom;
  c.bytes = Stack::BYTES;
  c.fake_stack = nullptr;
#ifdef CUDA_HOST_SANITIZED
  __asan_unpoison_memory_region(stack.bottom, Stack::BYTES);  // of frames that were left for good
#endif
#ifdef CUDA_HOST_SWITCH
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

void arrived([[maybe_unused]] Context* here) {
#ifdef CUDA_HOST_SANITIZED
  __sanitizer_finish_switch_fiber(here ? here->fake_stack : nullptr, &came_from->bottom,
                                  &came_from->bytes);
#endif
}

void swap(Context& from, Context& to) {
  came_from = &from;
#ifdef CUDA_HOST_SANITIZED
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef CUDA_HOST_SWITCH
  cuda_host_switch(&from.top, to.top);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived(&from);
}

}  // namespace cuda_host
