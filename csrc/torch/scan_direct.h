// `selective_scan.new`: one path, one sequence, tensors in the user's order of dimensions; CPU and
// CUDA alike.
#pragma once

#include <tuple>

#include "direct.h"
#include "scan_args.h"

namespace pydiffuse {

// The order of dimensions of tokens: [B, D, L] or [B, L, D].
struct TokenOrder {
  int token, channel;
  explicit TokenOrder(bool bdl) : token(bdl ? 2 : 1), channel(bdl ? 1 : 2) {}

  // t [B, L, D] in this order, its tokens or its channels next to each other.
  bool tokens(const Usual& usual, const Tensor& t, const Tensor& like, Tokens* out) const {
    if (!same_sizes(t, like) || !usual.floating(t, &out->dtype)) return false;
    out->data = t.data_ptr();
    out->batch = t.stride(0), out->path = 0;
    out->token = t.stride(token), out->channel = t.stride(channel);
    return t.numel() == 0 || t.size(token) == 1 || t.size(channel) == 1 || out->token == 1 ||
           out->channel == 1;
  }
  // A result like t: tokens next to each other where t's are, else channels.
  Tensor new_tokens(const Tensor& t, Tokens* out) const {
    const int64_t sizes[] = {t.size(0), t.size(1), t.size(2)};
    int64_t strides[3];
    const int64_t L = std::max<int64_t>(1, sizes[token]), D = std::max<int64_t>(1, sizes[channel]);
    const bool by_token = t.stride(token) == 1 && t.stride(channel) != 1;
    strides[0] = L * D;
    strides[token] = by_token ? 1 : D;
    strides[channel] = by_token ? L : 1;
    const Tensor made = new_tensor(t, dtype_code(t), sizes, strides, 3);
    out->data = made.data_ptr();
    out->batch = strides[0], out->path = 0;
    out->token = strides[token], out->channel = strides[channel];
    return made;
  }
};

// B or C: [B, N, L], [B, G, N, L], [D, N], or with the last two dimensions of tokens swapped
// ("bld": [B, L, N], [B, L, G, N]).
inline bool usual_weights(const Usual& usual, const Tensor& t, bool bdl, ScanCall* c, Weights* w) {
  if (t.dim() == 2) {
    w->constant = true;
    return usual.plain(t, ScalarType::Float, {c->channels, c->states}, &w->data);
  }
  if (!usual.floating(t, &w->dtype) || t.numel() == 0) return false;
  w->data = t.data_ptr();
  w->batch = t.stride(0), w->path = 0;
  const int last = static_cast<int>(t.dim()) - 1;
  int64_t groups = 1;
  if (t.dim() == 3) {
    w->group = 0;
    w->token = t.stride(bdl ? 2 : 1), w->state = t.stride(bdl ? 1 : 2);
    if (t.size(bdl ? 2 : 1) != c->length || t.size(bdl ? 1 : 2) != c->states) return false;
  } else if (t.dim() == 4) {
    const int group = bdl ? 1 : 2, token = bdl ? 3 : 1, state = bdl ? 2 : last;
    groups = t.size(group);
    w->group = t.stride(group), w->token = t.stride(token), w->state = t.stride(state);
    if (t.size(token) != c->length || t.size(state) != c->states) return false;
  } else {
    return false;
  }
  if (t.size(0) != c->batch || c->channels % groups || (c->groups && c->groups != groups))
    return false;
  c->groups = static_cast<int>(groups);
  return true;
}

struct UsualScan {
  const Tensor &u, &delta, &A, &B, &C;
  const MaybeTensor &D, &z, &delta_bias, &initial, &order;
  bool softplus, bdl;

  bool call(ScanCall* c) const {
    const Usual usual(u);
    const TokenOrder by(bdl);
    if (u.dim() != 3 || A.dim() != 2 || u.numel() == 0) return false;
    c->batch = u.size(0), c->length = u.size(by.token), c->channels = u.size(by.channel);
    c->paths = c->sequences = 1;
    const int64_t states = A.size(1);
    if (states < 1 || states > MAX_STATES || c->length > INT32_MAX) return false;
    c->states = static_cast<int>(states);
    c->softplus = softplus;
    if (!by.tokens(usual, u, u, &c->u) || !by.tokens(usual, delta, u, &c->delta)) return false;
    if (z && !by.tokens(usual, *z, u, &c->z)) return false;
    constexpr ScalarType f32 = ScalarType::Float;
    const bool fits = usual.plain(A, f32, {c->channels, states}, &c->A) &&
                      usual_weights(usual, B, bdl, c, &c->B) &&
                      usual_weights(usual, C, bdl, c, &c->C) &&
                      usual.plain(D, f32, {c->channels}, &c->D) &&
                      usual.plain(delta_bias, f32, {c->channels}, &c->bias) &&
                      usual.plain(initial, f32, {c->batch, c->channels, states}, &c->initial) &&
                      usual.plain(order, ScalarType::Int, {c->length}, &c->order);
    if (!c->groups) c->groups = 1;
    return fits;
  }
};

// run(call): the kernel.
template <class Run>
std::tuple<MaybeTensor, MaybeTensor> usual_scan(const UsualScan& in, bool with_last,
                                                const Run& run) {
  ScanCall c{};
  if (!in.call(&c)) return {};
  const Tensor y = TokenOrder(in.bdl).new_tokens(in.u, &c.out);
  c.out.dtype = c.u.dtype;
  MaybeTensor last;
  if (with_last) {
    last = new_tensor(in.A, {c.batch, c.channels, int64_t(c.states)});
    c.last = static_cast<float*>(last->data_ptr());
  }
  run(c);
  return {y, last};
}

}  // namespace pydiffuse
