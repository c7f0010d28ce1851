#include "grid.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <tuple>

#include "include/cuda_pipeline.h"

#ifdef __x86_64__
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
#endif

namespace cuda_host {
namespace {

constexpr unsigned LANES = 32;

enum class State { running, barrier, warp, grid, ended };
constexpr const char* WAITS[] = {"may go on", "wait at __syncthreads", "wait for their warp",
                                 "wait for the grid", "have ended"};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory poisoned(size_t bytes, size_t align) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max(align, sizeof(void*)), bytes)) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

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

struct Random {  // splitmix64
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return static_cast<size_t>((operator()() >> 32) * n >> 32); }
};

const Launch* flight;
std::vector<Block> blocks;
std::vector<Warp*> awake;  // with threads that may go on
Thread* running;
bool greedy;  // a warp goes on as long as it can
size_t alive, in_grid_sync;
Context host;
Random random_;
std::string failure;
std::vector<Stack> stacks;

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

// Who waits where, as "32 threads (0 to 31) wait at __syncthreads (conv.cuh:68)".
std::string census(const Block& block) {
  std::map<std::pair<State, std::string>, std::pair<std::vector<unsigned>, unsigned>> groups;
  for (const Thread& t : block.threads)
    groups[{t.state, t.state == State::ended ? "" : place(t.where)}].first.push_back(t.number);
  std::string text;
  for (const auto& [at, who] : groups) {
    const auto& threads = who.first;
    text += (text.empty() ? "" : "; ") + std::to_string(threads.size()) + " threads (" +
            std::to_string(threads.front()) + " to " + std::to_string(threads.back()) + ") " +
            WAITS[static_cast<int>(at.first)] + (at.second.empty() ? "" : " (" + at.second + ")");
  }
  return "divergent barrier in block " + std::to_string(block.index.x) + ": " + text;
}

void go(Context& from, Thread* next) {
  running = next;
  thread_index = next->index;
  block_index = next->block->index;
  swap(from, next->context);
}

template <class T>
T take(std::vector<T>& from, size_t i) {
  const T taken = from[i];
  from[i] = from.back();
  from.pop_back();
  return taken;
}

Thread* choose(Warp* last) {
  Warp& warp = last && greedy && !last->ready.empty() ? *last : *awake[random_.below(awake.size())];
  Thread* const chosen = take(warp.ready, random_.below(warp.ready.size()));
  if (warp.ready.empty()) {
    awake.back()->place = warp.place;
    take(awake, warp.place);
  }
  return chosen;
}

void next_turn() {
  Thread* const self = running;
  if (awake.empty() || !failure.empty()) return swap(self->context, host);
  Thread* const next = choose(self->warp);
  if (next != self) go(self->context, next);
}

void resume(Thread& t) {
  t.state = State::running;
  if (t.warp->ready.empty()) {
    t.warp->place = awake.size();
    awake.push_back(t.warp);
  }
  t.warp->ready.push_back(&t);
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name());
}

void wait(State state, const Where& where, unsigned mask) {
  Thread& self = *running;
  Block& block = *self.block;
  self.state = state;
  self.where = where;
  self.mask = mask;
  if (state == State::warp) {
    Warp& warp = *self.warp;
    warp.waiting |= 1u << self.lane();
    const unsigned wanted = mask & warp.lanes;
    if (!(mask >> self.lane() & 1)) failure = "a lane is not in the mask that it gives";
    if ((warp.waiting & wanted) == wanted) {
      Thread* const lanes = &self - self.lane();
      for (unsigned i = 0; i < LANES; ++i)
        if (wanted >> i & 1 && !(lanes[i].mask == mask && same(lanes[i].where, where)))
          failure = census(block);
      warp.waiting &= ~wanted;
      for (unsigned i = 0; failure.empty() && i < LANES; ++i)
        if (wanted >> i & 1) {
          std::memcpy(lanes[i].words, warp.words, sizeof warp.words);
          resume(lanes[i]);
        }
    }
  } else if (state == State::barrier && ++block.waiting == block.threads.size()) {
    for (const Thread& t : block.threads)
      if (!same(t.where, where)) failure = census(block);
    block.waiting = 0;
    for (size_t i = 0; failure.empty() && i < block.threads.size(); ++i) resume(block.threads[i]);
  } else if (state == State::grid) {
    size_t all = 0;
    for (const Block& b : blocks) all += b.threads.size();
    if (++in_grid_sync == all) {
      in_grid_sync = 0;
      for (Block& b : blocks)
        for (Thread& t : b.threads) resume(t);
    }
  }
  next_turn();
}

void thread_main() {
  arrived(nullptr);
  flight->body(flight->kernel, flight->args);
  running->state = State::ended;
  --alive;
  next_turn();
  std::abort();  // its turn is over
}

void start(Block& block, uint3 index, Stack* stack) {
  const dim3 size = flight->block;
  const unsigned threads = size.x * size.y * size.z;
  block.index = index;
  block.dynamic = poisoned(flight->shared, 128);
  block.variables.clear();
  block.waiting = 0;
  block.threads.resize(threads);
  block.warps.assign((threads + LANES - 1) / LANES, Warp{});
  for (unsigned i = 0; i < threads; ++i) block.warps[i / LANES].lanes |= 1u << i % LANES;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.warp = &block.warps[i / LANES];
    t.number = i;
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.batches.clear();
    t.copies.clear();
    prepare(t.context, stack[i], thread_main);
    resume(t);
  }
}

void finish(size_t threads) {  // of the blocks that were started
  alive = threads;
  in_grid_sync = 0;
  greedy = random_.below(2);
  go(host, choose(nullptr));
  if (failure.empty() && alive)
    for (const Block& b : blocks)
      if (failure.empty() && std::any_of(b.threads.begin(), b.threads.end(), [](const Thread& t) {
            return t.state != State::ended;
          }))
        failure = census(b);
  awake.clear();
}

}  // namespace

std::string run(const Launch& l) {
  flight = &l;
  failure.clear();
  random_ = {l.seed};
  block_size = l.block;
  grid_size = l.grid;
  const size_t threads = size_t(l.block.x) * l.block.y * l.block.z,
               count = size_t(l.grid.x) * l.grid.y * l.grid.z, at_once = l.cooperative ? count : 1;
  while (stacks.size() < threads * at_once) stacks.emplace_back();
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  blocks.resize(at_once);
  for (size_t from = 0; from < count && failure.empty(); from += at_once) {
    for (size_t b = 0; b < at_once; ++b) {
      const unsigned i = order[from + b];
      start(blocks[b], {i % l.grid.x, i / l.grid.x % l.grid.y, i / l.grid.x / l.grid.y},
            &stacks[b * threads]);
    }
    finish(threads * at_once);
  }
  blocks.clear();
  return failure;
}

void sync_block(const Where& where) { wait(State::barrier, where, 0); }
void sync_warp(unsigned mask, const Where& where) { wait(State::warp, where, mask); }
void sync_grid(const Where& where) {
  if (!flight->cooperative) {
    failure = "the grid was waited for in a launch that is not cooperative";
    return next_turn();
  }
  wait(State::grid, where, 0);
}

const uint64_t* exchange(unsigned mask, uint64_t word, const Where& where) {
  Thread& self = *running;
  self.warp->words[self.lane()] = word;
  wait(State::warp, where, mask);
  return self.words;
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
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes || !aligned(to) || !aligned(from)) {
    failure = "an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to them";
    return next_turn();
  }
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
