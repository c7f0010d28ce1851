// Threads for a binding without torch: a pool that sleeps between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace pydiffuse {

// The pieces of a range go to whichever thread is free; which one computes a piece changes nothing
// in the result. One call runs at a time; the caller works too. What a piece throws, the caller
// gets.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // as many as the system gives
    }
  }
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  template <class F>
  void operator()(int64_t end, int64_t grain, const F& f) {
    if (workers_.empty()) return f(0, end);
    std::lock_guard one_call(call_);
    const int64_t pieces = std::min<int64_t>(workers_.size() + 1, (end + grain - 1) / grain);
    next_ = 0;
    run_ = [&f, end, pieces, this] {
      try {
        for (int64_t i; (i = next_.fetch_add(1)) < pieces;)
          f(i * end / pieces, (i + 1) * end / pieces);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!thrown_) thrown_ = std::current_exception();
        next_ = pieces;
      }
    };
    {
      std::lock_guard lock(mutex_);
      busy_ = static_cast<int>(workers_.size());
      ++round_;
    }
    wake_.notify_all();
    run_();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  }

 private:
  void work() {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      run_();
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex call_, mutex_;
  std::condition_variable wake_, done_;
  std::function<void()> run_;
  std::exception_ptr thrown_;
  std::atomic<int64_t> next_{0};
  int busy_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// How many threads share a call: what set_threads was told, else what OMP_NUM_THREADS says, else
// the CPUs that this process may run on.
int thread_count();
void set_thread_count(int count);  // calls that run keep the pool they began with
std::shared_ptr<ThreadPool> thread_pool();
void end_threads();  // until the next call

// What a call is given: the pool, from the moment that there is work to share.
class HostThreads {
 public:
  int64_t threads() const { return count_; }

  template <class F>
  void operator()(int64_t end, int64_t grain, const F& f) const {
    if (end <= grain || count_ == 1) return f(0, end);
    (*thread_pool())(end, grain, f);
  }

 private:
  int64_t count_ = thread_count();
};

}  // namespace pydiffuse
