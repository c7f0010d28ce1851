// The selective scan on XLA's buffers. u, z: tokens; delta: tokens with paths, or with one that
// they share; A: [K, D, N]; B, C: [B, K or 1, G, N, L], [B, K or 1, L, G, N] with channels last, or
// constant [K, D, N]; D, delta_bias: [K, D]; initial: [B, S, K, D, N]; order: [K, L]; offsets: [S +
// 1].
#include "../cpu/scan_call.h"

#include "tokens.h"

namespace pydiffuse {
namespace {

enum Has { HAS_D, HAS_Z, HAS_BIAS, HAS_INITIAL, HAS_ORDER, HAS_OFFSETS, HAS_LAST, HAS_CHUNKS };

// The arrays that the forward and the backward share.
struct ScanArrays {
  Buffer u, delta, A, B, C;
  Maybe D, z, bias, initial, order, offsets;

  ScanArrays(Call& call, Arrays& given)
      : u(call.input()),
        delta(call.input()),
        A(call.input()),
        B(call.input()),
        C(call.input()),
        D(given.maybe(HAS_D)),
        z(given.maybe(HAS_Z)),
        bias(given.maybe(HAS_BIAS)),
        initial(given.maybe(HAS_INITIAL)),
        order(given.maybe(HAS_ORDER)),
        offsets(given.maybe(HAS_OFFSETS)) {}
};

class ScanOf {
 public:
  ScanOf(const Call& call, const ScanArrays& arrays, const Mapped& mapped)
      : arrays_(arrays), mapped_(mapped), last_(call.flag("channels_last")) {
    ScanCall& c = common_;
    c.batch = size_from_end(arrays.u, 3);
    c.length = size_from_end(arrays.u, last_ ? 2 : 1);
    c.channels = size_from_end(arrays.u, last_ ? 1 : 2);
    c.paths = size_from_end(arrays.A, 3);
    const int64_t states = size_from_end(arrays.A, 1);
    require(c.paths >= 1 && states >= 1 && states <= MAX_STATES,
            "accepted: a path or more, 1 to 256 states");
    c.states = static_cast<int>(states);
    c.softplus = call.flag("softplus");
    set_steps(c, mapped, c.paths, arrays.order, arrays.offsets);
  }

  const ScanCall& common() const { return common_; }
  TokensOf tokens() const {
    return {mapped_, last_, common_.batch, common_.length, common_.channels};
  }
  // A parameter of the paths, or none.
  const float* parameter(const Maybe& b, int64_t v) const {
    return b ? mapped_.plane<const float>(*b, v, {common_.paths, common_.channels}) : nullptr;
  }
  float* states(const Maybe& b, int64_t v) const {
    const ScanCall& c = common_;
    return b ? mapped_.plane<float>(*b, v, {c.batch, c.sequences, c.paths, c.channels, c.states})
             : nullptr;
  }
  float* chunks(const Maybe& b, int64_t v) const {
    const ScanCall& c = common_;
    return b ? mapped_.plane<float>(*b, v,
                                    {c.batch, c.paths, c.chunk_count(), c.channels, c.states})
             : nullptr;
  }

  // Whether only the batch of all that is [B, ...] is mapped: the calls are then one.
  bool folds() const {
    const auto& a = arrays_;
    bool only = true;
    for (const Buffer* b : {&a.u, &a.delta}) only = only && mapped_.whole(*b);
    for (const Maybe* b : {&a.z, &a.initial}) only = only && (!*b || mapped_.whole(**b));
    for (const Buffer* b : {&a.B, &a.C})
      only = only && (constant(*b) ? mapped_.shared(*b) : mapped_.whole(*b));
    for (const Maybe* b : {&a.D, &a.bias}) only = only && (!*b || mapped_.shared(**b));
    return only && mapped_.shared(a.A);
  }

  // What the v-th call reads.
  ScanCall at(int64_t v) const {
    ScanCall c = common_;
    const TokensOf tokens_of = tokens();
    c.u = tokens_of(arrays_.u, v);
    const int64_t own = size_from_end(arrays_.delta, 3);
    require(own == 1 || own == c.paths, "delta must have one path or all");
    c.delta = tokens_of(arrays_.delta, v, own);
    if (arrays_.z) c.z = tokens_of(*arrays_.z, v);
    c.A = mapped_.plane<const float>(arrays_.A, v, {c.paths, c.channels, c.states});
    c.B = weights(arrays_.B, v, c);
    c.C = weights(arrays_.C, v, c);
    if (!c.groups) c.groups = 1;
    c.D = parameter(arrays_.D, v);
    c.bias = parameter(arrays_.bias, v);
    c.initial = states(arrays_.initial, v);
    return c;
  }

 private:
  bool constant(const Buffer& b) const { return b.dims.size() == arrays_.A.dims.size(); }

  Weights weights(const Buffer& b, int64_t v, ScanCall& c) const {
    Weights w;
    if (constant(b)) {
      w.data = mapped_.plane<float>(b, v, {c.paths, c.channels, c.states});
      w.constant = true;
      return w;
    }
    const int64_t own = size_from_end(b, 4), groups = size_from_end(b, last_ ? 2 : 3);
    require(own == 1 || own == c.paths, "B and C must have one path or all");
    require(groups > 0 && c.channels % groups == 0 && (!c.groups || c.groups == groups),
            "groups must divide the channels, and be those of B and C");
    c.groups = static_cast<int>(groups);
    w.dtype = dtype_of(b);
    if (last_) {
      w.data = mapped_.at(b, v, {c.batch, own, c.length, groups, c.states});
      w.token = groups * c.states;
      w.group = c.states;
      w.state = 1;
    } else {
      w.data = mapped_.at(b, v, {c.batch, own, groups, c.states, c.length});
      w.group = c.states * c.length;
      w.state = c.length;
      w.token = 1;
    }
    w.path = groups * c.states * c.length;
    w.batch = own * w.path;
    if (own == 1) w.path = 0;
    return w;
  }

  const ScanArrays& arrays_;
  const Mapped& mapped_;
  const bool last_;
  ScanCall common_{};
};

// -> y [B, D, L] or with channels last, float32 if it is a sum over paths; chunk states; last
// states
void selective_scan_xla(Call& call) {
  const int64_t has = call.integer("has");
  Arrays given(call, has);
  const ScanArrays arrays(call, given);
  const Buffer out = call.output();
  const Maybe chunks = given.maybe_output(HAS_CHUNKS), last = given.maybe_output(HAS_LAST);
  const Mapped mapped(out, 3);
  const ScanOf scan(call, arrays, mapped);
  require(scan.common().paths == 1 || dtype_of(out) == DType::f32,
          "a sum over paths must be float32");
  const bool folds = scan.folds();
  const int64_t calls = folds ? std::min<int64_t>(1, mapped.count()) : mapped.count();
  for (int64_t v = 0; v < calls; ++v) {
    ScanCall c = scan.at(v);
    c.out = scan.tokens()(out, v);
    c.chunks = scan.chunks(chunks, v);
    c.last = scan.states(last, v);
    if (folds) c.batch *= mapped.count();
    selective_scan(c, call.threads);
  }
}

// the forward's arrays, dy, chunk states, the gradient of the last states or none -> du, ddelta
// [.., K, ..], dA, dB, dC (contiguous [B, K, G, L, N] or [K, D, N], float32), then those of D, z,
// delta_bias, initial
void selective_scan_backward_xla(Call& call) {
  const int64_t has = call.integer("has");
  Arrays given(call, has);
  const ScanArrays arrays(call, given);
  const Buffer dy = call.input(), chunks = call.input();
  const Maybe dlast = given.maybe(HAS_LAST);
  const Buffer du = call.output(), ddelta = call.output(), dA = call.output(), dB = call.output(),
               dC = call.output();
  const Maybe dD = given.maybe_output(HAS_D), dz = given.maybe_output(HAS_Z),
              dbias = given.maybe_output(HAS_BIAS), dinitial = given.maybe_output(HAS_INITIAL);
  const Mapped mapped(du, 3);
  const ScanOf scan(call, arrays, mapped);
  const TokensOf tokens = scan.tokens();
  require(scan.common().paths == 1 ||
              (dtype_of(du) == DType::f32 && (!dz || dtype_of(*dz) == DType::f32)),
          "sums over paths must be float32");
  for (int64_t v = 0; v < mapped.count(); ++v) {
    ScanBackwardCall b{};
    ScanCall& c = b.forward;
    c = scan.at(v);
    c.chunks = scan.chunks(chunks, v);
    b.dout = tokens(dy, v);
    b.dlast = scan.states(dlast, v);
    b.du = tokens(du, v);
    b.ddelta = tokens(ddelta, v, c.paths);
    if (dz) b.dz = tokens(*dz, v);
    const auto weights = [&](const Buffer& to, const Weights& of) {
      return of.constant
                 ? mapped.plane<float>(to, v, {c.paths, c.channels, c.states})
                 : mapped.plane<float>(to, v, {c.batch, c.paths, c.groups, c.length, c.states});
    };
    b.dA = mapped.plane<float>(dA, v, {c.paths, c.channels, c.states});
    b.dB = weights(dB, c.B);
    b.dC = weights(dC, c.C);
    b.dD = const_cast<float*>(scan.parameter(dD, v));
    b.dbias = const_cast<float*>(scan.parameter(dbias, v));
    b.dinitial = scan.states(dinitial, v);
    selective_scan_backward(b, call.threads);
  }
}

}  // namespace

std::vector<Handler> scan_handlers() {
  return {{"selective_scan", handler<selective_scan_xla>},
          {"selective_scan_backward", handler<selective_scan_backward_xla>}};
}

}  // namespace pydiffuse
