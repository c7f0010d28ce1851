// One call to the selective scan on the CPU: B and C as rows where they are not, the items over the
// threads, partial gradients added in a fixed order. Both bindings go through here; `parallel` as
// in guidance_call.h, here always with a grain of one item.
#pragma once

#include <algorithm>
#include <vector>

#include "capability.h"
#include "floats.h"
#include "scan.h"
#include "steps.h"

namespace pydiffuse {

inline const ScanKernels& scan_kernels() { return PYDIFFUSE_BEST(scan); }

inline const ScanBackwardKernels& scan_backward_kernels() { return PYDIFFUSE_BEST(scan_backward); }

class Scan {
 public:
  template <class Parallel>
  Scan(const ScanCall& call, const Parallel& parallel) {
    const int width = scan_kernels().width;
    const bool constant = call.B.constant || call.C.constant;
    args_ = {call, 1, 0, nullptr, nullptr};
    while (args_.rows < call.states && args_.rows < width) args_.rows *= 2;
    if (constant || call.states > width) args_.rows = (call.states + width - 1) / width * width;
    args_.blocks = (args_.group_channels() + SCAN_BLOCK - 1) / SCAN_BLOCK;
    args_.B = packed(call.B, parallel);
    args_.C = packed(call.C, parallel);
  }
  const ScanArgs& args() const { return args_; }

 private:
  // Rows that kernels can read where they are stay there.
  template <class Parallel>
  const float* packed(const Weights& w, const Parallel& parallel) {
    const ScanCall& call = args_.call;
    if (w.constant || (w.dtype == DType::f32 && w.state == 1 && args_.rows == call.states))
      return nullptr;
    const int64_t items = call.batch * call.paths * call.groups;
    buffers_.emplace_back(items * call.length * args_.rows);
    const PackArgs pack{w,           call.paths, call.groups,           call.length,
                        call.states, args_.rows, buffers_.back().data()};
    parallel(items, 1, [&](int64_t begin, int64_t end) { scan_kernels().pack(pack, begin, end); });
    return pack.to;
  }

  ScanArgs args_;
  std::vector<Floats> buffers_;
};

template <class Parallel>
void selective_scan(const ScanCall& call, const Parallel& parallel) {
  const Scan scan(call, parallel);
  const ScanArgs& args = scan.args();
  const auto& kernels = scan_kernels();
  parallel(args.blocks * call.groups * call.batch, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(kernels.forward_scratch(args));
    kernels.forward(args, begin, end, scratch.data());
  });
}

template <class Parallel>
void selective_scan_backward(const ScanBackwardCall& call, const Parallel& parallel) {
  const Scan scan(call.forward, parallel);
  const ScanArgs& s = scan.args();
  const ScanCall& c = call.forward;
  const auto& kernels = scan_backward_kernels();

  ScanBackwardArgs a{s,       call,    std::max<int64_t>(1, std::min<int64_t>(MAX_PARTS, c.batch)),
                     nullptr, nullptr, nullptr,
                     nullptr, nullptr, nullptr,
                     nullptr};
  std::vector<Floats> buffers;
  buffers.reserve(7);
  const auto buffer = [&](int64_t n) {
    buffers.emplace_back(n);
    return buffers.back().data();
  };
  // One block, or one part: its sums are the result.
  const int64_t rows = c.batch * c.paths * c.groups;
  const auto by_token = [&](const Weights& w, float* out) -> float* {
    if (w.constant) return nullptr;
    return s.blocks == 1 && s.rows == c.states ? out : buffer(rows * s.blocks * c.length * s.rows);
  };
  a.dB = by_token(c.B, call.dB);
  a.dC = by_token(c.C, call.dC);
  struct Sum {
    float** partial;
    float* out;
    int64_t count;
    bool always = false;  // computed whether or not it is asked for
  };
  const int64_t channels = c.paths * c.channels, states = channels * c.states;
  const Sum sums[] = {{&a.dA, call.dA, states},
                      {&a.dBconst, c.B.constant ? call.dB : nullptr, states},
                      {&a.dCconst, c.C.constant ? call.dC : nullptr, states},
                      {&a.dD, call.dD, channels, true},
                      {&a.dbias, call.dbias, channels, true}};
  for (const Sum& sum : sums) {
    const bool needed = sum.out || sum.always;
    if (needed) *sum.partial = a.parts == 1 && sum.out ? sum.out : buffer(a.parts * sum.count);
  }

  parallel(s.blocks * c.groups * a.parts, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(kernels.scratch(a));
    kernels.backward(a, begin, end, scratch.data());
  });
  parallel(rows, 1, [&](int64_t begin, int64_t end) { kernels.reduce(a, begin, end); });
  for (const Sum& sum : sums) {
    if (!sum.out || *sum.partial == sum.out) continue;
    add_parts(*sum.partial, a.parts, sum.count, sum.out);
  }
}

}  // namespace pydiffuse
