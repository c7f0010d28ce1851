// Threads for a binding without torch: a pool that sleeps between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pydiffuse {

// The pieces of a range go to whichever thread is free; which one computes a piece changes nothing
// in the result. One call runs at a time; the caller works too.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  template <class F>
  void operator()(int64_t end, int64_t grain, const F& f) {
    if (end <= grain || workers_.empty()) return f(0, end);
    std::lock_guard one_call(call_);
    const int64_t pieces = std::min<int64_t>(threads(), (end + grain - 1) / grain);
    next_ = 0;
    run_ = [&f, end, pieces, this] {
      for (int64_t i; (i = next_.fetch_add(1)) < pieces;)
        f(i * end / pieces, (i + 1) * end / pieces);
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
  std::atomic<int64_t> next_{0};
  int busy_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace pydiffuse
