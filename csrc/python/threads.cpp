#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <cstdlib>

namespace pydiffuse {
namespace {

constexpr int MOST = 1024;

int allowed_cpus() {
#if defined(__linux__)
  for (int most = MOST; most <= (1 << 20); most *= 4) {  // refused while the kernel has more
    cpu_set_t* set = CPU_ALLOC(most);
    if (!set) break;
    const size_t size = CPU_ALLOC_SIZE(most);
    const int count = sched_getaffinity(0, size, set) ? 0 : CPU_COUNT_S(size, set);
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int threads_at_start() {
  if (const char* said = std::getenv("OMP_NUM_THREADS")) {
    char* end;
    const long n = std::strtol(said, &end, 10);
    if (end != said && n >= 1 && (*end == '\0' || *end == ',')) return std::min<long>(n, MOST);
  }
  return std::min(allowed_cpus(), MOST);
}

struct State {
  std::mutex mutex;
  int count = threads_at_start();
  std::shared_ptr<ThreadPool> pool;
};

// Never destroyed: a daemon thread may compute until the process is gone.
State& state() {
  static State& shared = *new State;
  return shared;
}

// A child has the memory of its parent's pool and none of its threads: it forgets the pool, which
// it could neither use nor join.
void before_fork() { state().mutex.lock(); }
void after_fork() { state().mutex.unlock(); }
void in_child() {
  new std::shared_ptr<ThreadPool>(std::move(state().pool));
  after_fork();
}

[[maybe_unused]] const int watching = pthread_atfork(before_fork, after_fork, in_child);

}  // namespace

int thread_count() {
  std::lock_guard lock(state().mutex);
  return state().count;
}

void set_thread_count(int count) {
  std::shared_ptr<ThreadPool> old;  // ends outside of the lock, or with the last call that uses it
  std::lock_guard lock(state().mutex);
  state().count = count;
  old.swap(state().pool);
}

std::shared_ptr<ThreadPool> thread_pool() {
  std::lock_guard lock(state().mutex);
  if (!state().pool) state().pool = std::make_shared<ThreadPool>(state().count);
  return state().pool;
}

void end_threads() { set_thread_count(thread_count()); }

}  // namespace pydiffuse
