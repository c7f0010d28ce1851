#include "grid.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

namespace cuda_host {

Thread* running;

namespace {

constexpr const char* WAITS[] = {"may go on", "wait at __syncthreads", "wait for their warp",
                                 "wait for the grid", "have ended"};

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
bool greedy;               // a warp goes on as long as it can
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
  std::map<std::pair<State, std::string>, std::vector<unsigned>> groups;
  for (const Thread& t : block.threads)
    groups[{t.state, t.state == State::ended ? "" : place(t.where)}].push_back(t.number);
  std::string text;
  for (const auto& [at, threads] : groups) {
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

}  // namespace

void next_turn() {
  Thread* const self = running;
  if (awake.empty() || !failure.empty()) return swap(self->context, host);
  Thread* const next = choose(self->warp);
  if (next != self) go(self->context, next);
}

void fail(const std::string& why) {
  failure = why;
  next_turn();
}

namespace {

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
      if (failure.empty() && std::any_of(b.threads.begin(), b.threads.end(),
                                         [](const Thread& t) { return t.state != State::ended; }))
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
    return fail("the grid was waited for in a launch that is not cooperative");
  }
  wait(State::grid, where, 0);
}

const uint64_t* exchange(unsigned mask, uint64_t word, const Where& where) {
  Thread& self = *running;
  self.warp->words[self.lane()] = word;
  wait(State::warp, where, mask);
  return self.words;
}

}  // namespace cuda_host
