// One call of the scan: its launches, path by path, and its workspace.
#pragma once

#include "scan_backward.cuh"
#include "scan_sum.cuh"

namespace pydiffuse {
namespace {

inline ScanArgs scan_args(const ScanCall& call) {
  ScanArgs a;
  a.call = call;
  const int64_t size = call.channels / call.groups;  // channels of a group
  a.shares = {size, static_cast<int>((size + CHANNELS - 1) / CHANNELS)};
  a.blocks = a.shares.per * call.groups;
  a.chunks = static_cast<int>(call.chunk_count());
  return a;
}

template <int NB>
void run_scan(ScanLaunch& on, const ScanCall& call) {
  const int64_t floats = call.channels * call.states;   // of a state
  if (call.last && (call.offsets || call.length == 0))  // empty sequences
    run_copy(on, call.last, call.initial, call.batch * call.sequences * call.paths * floats);
  if (call.batch * call.length * call.channels == 0) return;
  for (const Tokens& t : {call.u, call.delta, call.z, call.out})
    on.check_strides(t, call.length, call.channels);
  ScanArgs a = scan_args(call);
  const bool several = a.chunks > 1, wide = call.states > LANES * NB;
  const bool walk = several && !wide && call.batch * a.blocks >= on.multiprocessors();
  a.states_batch = a.chunks * floats * (call.chunks ? call.paths : 1);
  float* const space =
      call.chunks || walk || !several ? nullptr : on.floats(call.batch * a.states_batch);
  if (several && !walk) a.sums = on.floats(call.batch * a.chunks * call.channels);
  for (a.path = 0; a.path < call.paths; ++a.path) {
    a.states = call.chunks ? call.chunks + a.path * a.chunks * floats : space;
    if (walk) {
      on.launch(scan_kernel<NB, Pass::walk>, call.batch * a.blocks, a,
                scan_floats<NB>(Pass::walk, wide));
      continue;
    }
    if (several)
      on.launch(scan_kernel<NB, Pass::local>, call.batch * (a.chunks - 1) * a.blocks, a,
                scan_floats<NB>(Pass::local, wide));
    if (a.states)
      on.launch(combine_kernel, (call.batch * floats + THREADS - 1) / THREADS,
                CombineArgs{a, false});
    on.launch(scan_kernel<NB, Pass::apart>, call.batch * a.chunks * a.blocks, a,
              scan_floats<NB>(Pass::apart, wide));
  }
}

inline void run_scan(ScanLaunch& on, const ScanCall& call) {
  call.states > 8 ? run_scan<4>(on, call) : run_scan<2>(on, call);
}

template <int NB>
void run_scan_backward(ScanLaunch& on, const ScanBackwardCall& call) {
  const ScanCall& f = call.forward;
  const int64_t floats = f.channels * f.states;
  if (call.dinitial && (f.offsets || f.length == 0))
    run_copy(on, call.dinitial, call.dlast, f.batch * f.sequences * f.paths * floats);
  for (const Tokens& t : {f.u, f.delta, f.z, call.dout, call.du, call.ddelta, call.dz})
    on.check_strides(t, f.length, f.channels);
  GradientArgs g{};
  ScanArgs& a = g.scan;
  a = scan_args(f);
  const bool empty = f.batch * f.length * f.channels == 0, several = a.chunks > 1,
             wide = f.states > LANES * NB;
  const int64_t places = empty ? 0 : f.batch * a.chunks, rows = f.length * f.states;
  a.dout = call.dout;
  a.dlast = call.dlast;
  a.dinitial = call.dinitial;
  a.states_batch = a.chunks * floats;
  if (several && !empty) {
    a.states = on.floats(places * floats);
    a.sums = on.floats(places * f.channels);
  }
  g.before = f.chunks;
  g.du = call.du;
  g.ddelta = call.ddelta;
  g.dz = call.dz;
  g.A = on.floats(places * floats);
  g.D = call.dD ? on.floats(places * f.channels) : nullptr;
  g.bias = call.dbias ? on.floats(places * f.channels) : nullptr;
  for (auto [w, constant, parts] :
       {std::tuple{&f.B, &g.constant_B, &g.B}, {&f.C, &g.constant_C, &g.C}})
    *(w->constant ? constant : parts) = on.floats(w->constant ? places * floats
                                                  : empty     ? 0
                                                              : f.batch * a.blocks * rows);

  for (a.path = 0; a.path < f.paths; ++a.path) {
    if (!empty) {
      if (several) {
        on.launch(carry_kernel<NB>, f.batch * (a.chunks - 1) * a.blocks, a, carry_floats<NB>());
        on.launch(combine_kernel, (f.batch * floats + THREADS - 1) / THREADS, CombineArgs{a, true});
      }
      on.launch(gradient_kernel<NB>, places * a.blocks, g, gradient_floats<NB>(wide));
    }
    SumArgs sums;
    const auto parameter = [&](const float* parts, float* out, int64_t n) {
      if (out) sums.add({parts, out + a.path * n, 1, places, n, 1, 0});
    };
    parameter(g.A, call.dA, floats);
    parameter(g.D, call.dD, f.channels);
    parameter(g.bias, call.dbias, f.channels);
    const auto weights = [&](const Weights& w, const float* constant, const float* parts,
                             float* out) {
      if (w.constant) return parameter(constant, out, floats);
      const int64_t n = f.groups * rows;  // of a sample and path
      sums.add(
          {parts, out + a.path * n, f.batch * f.groups, a.shares.per, rows, f.groups, f.paths * n});
    };
    weights(f.B, g.constant_B, g.B, call.dB);
    weights(f.C, g.constant_C, g.C, call.dC);
    run_sums(on, sums);
  }
}

inline void run_scan_backward(ScanLaunch& on, const ScanBackwardCall& call) {
  call.forward.states > 8 ? run_scan_backward<4>(on, call) : run_scan_backward<2>(on, call);
}

}  // namespace
}  // namespace pydiffuse
