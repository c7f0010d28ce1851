// What benchmarks measure a kernel by: its arithmetic alone, in cache, on all threads.
#include "../cpu/attention_call.h"
#include "../cpu/scan_call.h"
#include "arrays.h"

namespace pydiffuse {
namespace {

// What selective_scan's floor is counted in: its exponentials and multiply-adds, in cache.
void scan_floor(int states, int64_t channel_tokens) {
  const auto& kernels = scan_kernels();
  const HostThreads threads;
  const int64_t steps = channel_tokens / kernels.width, pieces = threads.threads();
  const auto piece = [&](int64_t begin, int64_t end) {
    const Floats scratch(4096);
    std::fill(scratch.data(), scratch.data() + 4096, -0.01f);
    for (int64_t i = begin; i < end; ++i)
      kernels.floor(states, (i + 1) * steps / pieces - i * steps / pieces, scratch.data());
  };
  unlocked([&] { threads(pieces, 1, piece); });
}

// What tile_attention's floor is counted in: its products and exponentials, in cache.
void attention_floor(int dim, int products, int exponentials, int64_t pairs, bool bf16) {
  const auto& kernels = attention_kernels(bf16 ? DType::bf16 : DType::f32);
  const HostThreads threads;
  const int64_t strips = pairs / kernels.strip, pieces = threads.threads();
  const auto piece = [&](int64_t begin, int64_t end) {
    const int64_t n = kernels.floor_scratch(dim);
    const Floats scratch(n);
    std::fill(scratch.data(), scratch.data() + n, -0.01f);
    for (int64_t i = begin; i < end; ++i)
      kernels.floor(dim, products, exponentials, (i + 1) * strips / pieces - i * strips / pieces,
                    scratch.data());
  };
  unlocked([&] { threads(pieces, 1, piece); });
}

}  // namespace

void bind_floors(py::module_& m) {
  m.def("scan_floor", &scan_floor,
        "states exponentials and 2 states multiply-adds for each of channel_tokens, in cache.");
  m.def("attention_floor", &attention_floor,
        "For each of `pairs` of query and key `products` sums of dim products, and exponentials.");
}

}  // namespace pydiffuse
