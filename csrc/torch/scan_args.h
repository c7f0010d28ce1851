// From the arguments of the scan ops to the structs of the kernels; CPU and CUDA alike.
#pragma once

#include "../scan.h"
#include "accepts.h"

namespace pydiffuse {

// What the arguments of scans and convolutions must be.
struct ScanAccepts : Accepts {
  // [batch, paths, length, channels], or without paths if those are 0. Channels or tokens lie next
  // to each other.
  Tokens tokens(const char* name, const Tensor& t, int64_t batch, int64_t paths, int64_t length,
                int64_t channels) const {
    if (paths)
      shape(name, t, {batch, paths, length, channels});
    else
      shape(name, t, {batch, length, channels});
    const int token = paths ? 2 : 1;
    STD_TORCH_CHECK(t.numel() == 0 || channels == 1 || length == 1 || t.stride(token) == 1 ||
                        t.stride(token + 1) == 1,
                    op, ": ", name, " has strides ", text(t.strides()),
                    "; accepted: 1 along tokens or along channels");
    return {t.data_ptr(),    t.stride(0),         paths ? t.stride(1) : 0,
            t.stride(token), t.stride(token + 1), dtype_of(op, t)};
  }
  // S + 1 offsets of S sequences.
  const int32_t* offsets(const MaybeTensor& t, int* sequences) const {
    *sequences = 1;
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) >= 2, op, ": offsets has shape ", text(t->sizes()),
                    "; accepted: [sequences + 1]");
    *sequences = static_cast<int>(t->size(0)) - 1;
    return ints("offsets", t, {t->size(0)});
  }
};

// The arguments that the forward and the backward share, in the schema's order.
struct ScanInputs {
  const Tensor &u, &delta, &A, &B, &C;
  const MaybeTensor &D, &z, &delta_bias, &initial, &order, &offsets;
  bool softplus;
};

inline Weights weights_of(const ScanAccepts& accepts, const char* name, const Tensor& t,
                          ScanCall& c) {
  Weights w;
  if (t.dim() == 3) {
    w.data = accepts.floats(name, t, {c.paths, c.channels, c.states});
    w.constant = true;
    return w;
  }
  STD_TORCH_CHECK(t.dim() == 5, accepts.op, ": ", name, " has ", t.dim(),
                  " dimensions; accepted: 5, or 3 for constants");
  const int64_t groups = t.size(2);
  STD_TORCH_CHECK(groups > 0 && c.channels % groups == 0 && (!c.groups || c.groups == groups),
                  accepts.op, ": ", name, " has ", groups, " groups; accepted: a divisor of the ",
                  c.channels, " channels, one for B and C");
  c.groups = static_cast<int>(groups);
  accepts.shape(name, t, {c.batch, c.paths, groups, c.length, c.states});
  return {t.data_ptr(),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          t.stride(4),
          dtype_of(accepts.op, t),
          false};
}

// Everything but the results.
inline ScanCall scan_inputs(const ScanAccepts& accepts, const ScanInputs& in) {
  const char* op = accepts.op;
  STD_TORCH_CHECK(in.u.dim() == 3 && in.A.dim() == 3, op,
                  ": u must be [batch, tokens, channels] and A [paths, channels, states]");
  ScanCall c{};
  c.batch = in.u.size(0);
  c.length = in.u.size(1);
  c.channels = in.u.size(2);
  c.paths = in.A.size(0);
  const int64_t states = in.A.size(2);
  STD_TORCH_CHECK(c.paths >= 1 && states >= 1 && states <= MAX_STATES, op, ": A has ", c.paths,
                  " paths and ", states, " states; accepted: a path or more, 1 to 256 states");
  STD_TORCH_CHECK(c.length <= INT32_MAX, op, ": u has ", c.length, " tokens; accepted: below 2^31");
  c.states = static_cast<int>(states);
  c.u = accepts.tokens("u", in.u, c.batch, 0, c.length, c.channels);
  c.delta = accepts.tokens("delta", in.delta, c.batch, c.paths, c.length, c.channels);
  if (in.z) c.z = accepts.tokens("z", *in.z, c.batch, 0, c.length, c.channels);
  c.A = accepts.floats("A", in.A, {c.paths, c.channels, c.states});
  c.B = weights_of(accepts, "B", in.B, c);
  c.C = weights_of(accepts, "C", in.C, c);
  if (!c.groups) c.groups = 1;
  c.D = accepts.floats("D", in.D, {c.paths, c.channels});
  c.bias = accepts.floats("delta_bias", in.delta_bias, {c.paths, c.channels});
  c.softplus = in.softplus;
  c.offsets = accepts.offsets(in.offsets, &c.sequences);
  c.initial =
      accepts.floats("initial", in.initial, {c.batch, c.sequences, c.paths, c.channels, c.states});
  c.order = accepts.ints("order", in.order, {c.paths, c.length});
  return c;
}

// A sum over several paths is kept in float32.
inline Tokens sum_over_paths(const ScanAccepts& accepts, const char* name, const Tensor& t,
                             const ScanCall& c) {
  const Tokens tokens = accepts.tokens(name, t, c.batch, 0, c.length, c.channels);
  STD_TORCH_CHECK(c.paths == 1 || tokens.dtype == DType::f32, accepts.op, ": ", name,
                  " is a sum over ", c.paths, " paths; accepted: float32");
  return tokens;
}

inline ScanCall scan_call(const Tensor& out, const MaybeTensor& last, const MaybeTensor& chunks,
                          const ScanInputs& in) {
  const ScanAccepts accepts{{"selective_scan", in.u}};
  ScanCall c = scan_inputs(accepts, in);
  c.out = sum_over_paths(accepts, "out", out, c);
  c.last = accepts.floats("last", last, {c.batch, c.sequences, c.paths, c.channels, c.states});
  c.chunks =
      accepts.floats("chunks", chunks, {c.batch, c.paths, c.chunk_count(), c.channels, c.states});
  return c;
}

// The results of the backward, in the schema's order.
struct ScanGradients {
  const Tensor &du, &ddelta, &dA, &dB, &dC;
  const MaybeTensor &dD, &dz, &ddelta_bias, &dinitial;
};

inline ScanBackwardCall scan_backward_call(const ScanGradients& out, const Tensor& dout,
                                           const MaybeTensor& dlast, const Tensor& chunks,
                                           const ScanInputs& in) {
  const ScanAccepts accepts{{"selective_scan_backward", in.u}};
  ScanBackwardCall b{};
  ScanCall& c = b.forward;
  c = scan_inputs(accepts, in);
  c.chunks =
      accepts.floats("chunks", chunks, {c.batch, c.paths, c.chunk_count(), c.channels, c.states});
  b.dout = accepts.tokens("dout", dout, c.batch, 0, c.length, c.channels);
  b.dlast = accepts.floats("dlast", dlast, {c.batch, c.sequences, c.paths, c.channels, c.states});
  b.du = sum_over_paths(accepts, "du", out.du, c);
  b.ddelta = accepts.tokens("ddelta", out.ddelta, c.batch, c.paths, c.length, c.channels);
  STD_TORCH_CHECK(out.dz.has_value() == in.z.has_value(), accepts.op, ": dz and z come together");
  if (out.dz) b.dz = sum_over_paths(accepts, "dz", *out.dz, c);
  b.dA = accepts.floats("dA", out.dA, {c.paths, c.channels, c.states});
  STD_TORCH_CHECK(!out.dD || in.D, accepts.op, ": dD was asked for without D");
  b.dD = accepts.floats("dD", out.dD, {c.paths, c.channels});
  b.dbias = accepts.floats("ddelta_bias", out.ddelta_bias, {c.paths, c.channels});
  const auto weights = [&](const char* name, const Tensor& t, const Weights& w) {
    return w.constant ? accepts.floats(name, t, {c.paths, c.channels, c.states})
                      : accepts.floats(name, t, {c.batch, c.paths, c.groups, c.length, c.states});
  };
  b.dB = weights("dB", out.dB, c.B);
  b.dC = weights("dC", out.dC, c.C);
  b.dinitial = accepts.floats("dinitial", out.dinitial,
                              {c.batch, c.sequences, c.paths, c.channels, c.states});
  return b;
}

// One step of one sequence: `state` [batch, channels, states] is where it starts and where it ends.
// out, x, dt, z: [batch, channels]; B, C: [batch, groups, states].
struct StateInputs {
  const Tensor &x, &dt, &A, &B, &C;
  const MaybeTensor &D, &z, &dt_bias;
  bool softplus;
};

inline ScanCall state_update_call(const Tensor& out, const Tensor& state, const StateInputs& in) {
  const ScanAccepts accepts{{"selective_state_update", in.x}};
  STD_TORCH_CHECK(in.x.dim() == 2 && in.A.dim() == 2 && in.B.dim() == 3, accepts.op,
                  ": x must be [batch, channels], A [channels, states], B [batch, groups, states]");
  ScanCall c{};
  c.batch = in.x.size(0);
  c.channels = in.x.size(1);
  c.paths = c.length = c.sequences = 1;
  const int64_t states = in.A.size(1), groups = in.B.size(1);
  STD_TORCH_CHECK(states >= 1 && states <= MAX_STATES, accepts.op, ": A has ", states,
                  " states; accepted: 1 to 256");
  STD_TORCH_CHECK(groups >= 1 && c.channels % groups == 0, accepts.op, ": B has ", groups,
                  " groups; accepted: a divisor of the ", c.channels, " channels");
  c.states = static_cast<int>(states);
  c.groups = static_cast<int>(groups);
  const auto row = [&](const char* name, const Tensor& t) -> Tokens {
    accepts.shape(name, t, {c.batch, c.channels});
    STD_TORCH_CHECK(t.is_contiguous(), accepts.op, ": ", name, " must be contiguous");
    return {t.data_ptr(), c.channels, 0, c.channels, 1, dtype_of(accepts.op, t)};
  };
  const auto weights = [&](const char* name, const Tensor& t) -> Weights {
    accepts.shape(name, t, {c.batch, groups, states});
    STD_TORCH_CHECK(t.is_contiguous(), accepts.op, ": ", name, " must be contiguous");
    return {t.data_ptr(), groups * states, 0, states, 0, 1, dtype_of(accepts.op, t), false};
  };
  c.u = row("x", in.x);
  c.delta = row("dt", in.dt);
  c.out = row("out", out);
  if (in.z) c.z = row("z", *in.z);
  c.A = accepts.floats("A", in.A, {c.channels, states});
  c.B = weights("B", in.B);
  c.C = weights("C", in.C);
  c.D = accepts.floats("D", in.D, {c.channels});
  c.bias = accepts.floats("dt_bias", in.dt_bias, {c.channels});
  c.softplus = in.softplus;
  c.last = accepts.floats("state", state, {c.batch, c.channels, states});
  c.initial = c.last;
  return c;
}

}  // namespace pydiffuse
