// XLA's threads for the CPU kernels. A handler runs on one of them and may not wait for the others:
// they may all be running handlers. So the caller works through the pieces itself, whoever is free
// helps, and it waits only for pieces that a helper has begun.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace pydiffuse {

class XlaThreads {
 public:
  explicit XlaThreads(const xla::ffi::ThreadPool& pool)
      : pool_(pool), count_(std::max<int64_t>(1, pool.num_threads())) {}

  int64_t threads() const { return count_; }

  template <class F>
  void operator()(int64_t end, int64_t grain, const F& f) const {
    if (end <= grain || count_ == 1) return f(0, end);
    // A helper that comes too late finds no piece left and touches nothing but the state it shares.
    const auto shared = std::make_shared<Shared>();
    const int64_t pieces = std::min(count_, (end + grain - 1) / grain);
    const auto work = [shared, pieces, end, &f] {
      for (int64_t i; (i = shared->next.fetch_add(1)) < pieces;) {
        try {
          f(i * end / pieces, (i + 1) * end / pieces);
        } catch (...) {
          std::lock_guard lock(shared->mutex);
          if (!shared->thrown) shared->thrown = std::current_exception();
        }
        if (shared->done.fetch_add(1) + 1 == pieces) shared->done.notify_all();
      }
    };
    for (int64_t i = 1; i < pieces; ++i) pool_.Schedule(std::function<void()>(work));
    work();
    for (int64_t done; (done = shared->done.load()) < pieces;) shared->done.wait(done);
    if (shared->thrown) std::rethrow_exception(shared->thrown);
  }

 private:
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::exception_ptr thrown;
  };

  mutable xla::ffi::ThreadPool pool_;
  int64_t count_;
};

}  // namespace pydiffuse
