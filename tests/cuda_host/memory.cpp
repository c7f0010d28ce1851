// Shared memory and asynchronous copies.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "grid.h"
#include "include/cuda_pipeline.h"

namespace cuda_host {

Memory poisoned(size_t bytes, size_t align) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max(align, sizeof(void*)), bytes)) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

void* dynamic_shared() { return running->block->dynamic.get(); }

void* static_shared(const void* key, size_t bytes, size_t align) {
  auto& variables = running->block->variables;
  for (const auto& [known, memory] : variables)
    if (known == key) return memory.get();
  return variables.emplace_back(key, poisoned(bytes, align)).second.get();
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes || !aligned(to) || !aligned(from))
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to them");
  std::memset(to, 0xff, bytes);
  running->copies.push_back({to, from, bytes, zeros});
}

void commit_copies() {
  running->batches.push_back(std::move(running->copies));
  running->copies.clear();
}

void wait_copies(size_t batches_left) {
  auto& batches = running->batches;
  while (batches.size() > batches_left) {
    for (const Copy& c : batches.front()) {
      std::memcpy(c.to, c.from, c.bytes - c.zeros);
      std::memset(static_cast<char*>(c.to) + c.bytes - c.zeros, 0, c.zeros);
    }
    batches.erase(batches.begin());
  }
}

}  // namespace cuda_host
