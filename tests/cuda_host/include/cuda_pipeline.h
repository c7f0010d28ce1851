// Asynchronous copies: done when they are waited for, and NaN until then.
#pragma once

#include "device.h"

namespace cuda_host {

void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_copies(size_t batches_left);

}  // namespace cuda_host

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  cuda_host::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() { cuda_host::commit_copies(); }
inline void __pipeline_wait_prior(size_t batches) { cuda_host::wait_copies(batches); }
