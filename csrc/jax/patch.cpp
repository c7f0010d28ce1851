// Patches with a noise level of their own on XLA's buffers: images [.., *sample], tables [.., N]
// float32; what is in front is the batch.
#include "../cpu/patch_call.h"

#include "mapped.h"

namespace pydiffuse {
namespace {

enum Has { HAS_NEXT = 1, HAS_LAST = 2, HAS_MASK = 4, HAS_SCALES = 8 };

Grid grid_of(const Call& call) {
  const auto flat = call.list<int64_t>("grid");
  require(flat.size() == 7, "grid takes 4 sizes and 3 of a patch");
  Grid g{flat[0], {flat[1], flat[2], flat[3]}, {flat[4], flat[5], flat[6]}};
  for (const int64_t size : flat) require(size >= 0, "sizes are 0 or more");
  for (int d = 0; d < 3; ++d)
    require(g.patch[d] > 0 ? g.size[d] % g.patch[d] == 0 : g.size[d] == 0,
            "patch_size must divide the image");
  return g;
}

Table levels(const char* name, const float* data, int64_t batch, int64_t patches) {
  const Table found{data, {patches, 1}};
  if (!patch_kernels().within(found, batch, patches))
    refuse(std::string(name) +
           " holds a value outside [0, 1] or NaN; accepted: 0 (noise) to 1 (data)");
  return found;
}

// terms, t, then t_next, t_last, mask and scales or none -> outputs. rule: method, path, source,
// target, and sets of places in the matrix: outputs, then terms. Transposed, terms are gradients of
// outputs.
void mix_patches_xla(Call& call) {
  const auto rule = call.list<int64_t>("rule");
  require(rule.size() == 6, "a rule is 6 codes");
  const auto in = [](int64_t code, auto count) { return 0 <= code && code < int64_t(count); };
  require(in(rule[0], Method::count) && in(rule[1], Path::count) && in(rule[2], Kind::count) &&
              in(rule[3], Kind::count),
          "unknown code of a method, path or kind");
  MixPatchesCall to{};
  to.rule = {Method(rule[0]), Path(rule[1]), Kind(rule[2]), Kind(rule[3]), call.get<double>("eta")};
  to.grid = grid_of(call);
  to.transposed = call.flag("transposed");
  const int64_t inner = call.integer("inner"), n = to.grid.elements(), N = to.grid.patches();
  const auto places = [&](int64_t set, int count, Rows* rows, int* place, bool written) {
    int found = 0;
    for (int i = 0; i < count; ++i) {
      if (!(set >> i & 1)) continue;
      const Buffer& b = written ? call.output() : call.input();
      if (!written && !found) to.batch = leading(b, inner);
      require(b.count == to.batch * n, "the grid is not that of the images");
      rows[found] = {b.data, n, dtype_of(b)};
      place[found++] = i;
    }
    require(found > 0, "no images");
    return found;
  };
  to.terms = places(rule[5], to.transposed ? OUTS : TERMS, to.term, to.term_place, false);
  to.outs = places(rule[4], to.transposed ? TERMS : OUTS, to.out, to.out_place, true);
  const int64_t has = call.integer("has"), patches = to.batch * N;
  const bool steps = to.rule.method <= Method::multistep || to.rule.method == Method::residual;
  require(steps == bool(has & HAS_NEXT), "a step, and nothing else, needs t_next");
  const bool residual = to.rule.method == Method::residual;  // its tables are weights
  const auto table = [&](const char* name) {
    const auto* data = plane<const float>(call.input(), patches);
    return residual ? Table{data, {N, 1}} : levels(name, data, to.batch, N);
  };
  to.t = table("t");
  if (has & HAS_NEXT) to.next = table("t_next");
  if (has & HAS_LAST) to.last = table("history[1]");
  if (has & HAS_MASK) {
    const Buffer& mask = call.input();
    require(mask.type == ffi::DataType::PRED && mask.count == patches,
            "mask must be one bool for each patch");
    to.mask = static_cast<const uint8_t*>(mask.data);
  }
  if (has & HAS_SCALES) to.scales = plane<const float>(call.input(), to.batch);
  to.scale = static_cast<float>(call.get<double>("scale"));
  if (to.batch * n == 0) return;
  mix_patches(to, call.threads);
}

// score [B, N] -> ids [B, k] and the rest [B, N - k], int32; or a mask [B, N]; or, with t and dt
// [B, N], levels [parts, B, N]
void select_patches_xla(Call& call) {
  enum Wanted { IDS, MASK, LEVELS };
  const int64_t wanted = call.integer("wanted"), k = call.integer("k");
  const Buffer score = call.input();
  require(score.dims.size() >= 2, "score must be [B, N]");
  const int64_t B = score.dims[score.dims.size() - 2], N = score.dims.back();
  require(0 <= k && k <= N, "k must be 0 to the number of patches");
  const Buffer t = wanted == LEVELS ? call.input() : Buffer(),
               dt = wanted == LEVELS ? call.input() : Buffer();
  const Buffer out = call.output(), rest = wanted == IDS ? call.output() : Buffer();
  const Mapped mapped(out, wanted == LEVELS ? 3 : 2);
  for (int64_t v = 0; v < mapped.count(); ++v) {
    SelectCall c{};
    c.batch = B;
    c.patches = N;
    c.k = k;
    c.score = mapped.plane<const float>(score, v, {B, N});
    if (wanted == IDS) {
      std::vector<int64_t> ids(B * k), others(B * (N - k));
      c.ids = ids.data();
      c.rest = others.data();
      if (B * N > 0) select_patches(c, call.threads);
      std::copy(ids.begin(), ids.end(), mapped.plane<int32_t>(out, v, {B, k}));
      std::copy(others.begin(), others.end(), mapped.plane<int32_t>(rest, v, {B, N - k}));
      continue;
    }
    if (wanted == MASK) {
      require(out.type == ffi::DataType::PRED, "a mask must be bool");
      c.mask = static_cast<uint8_t*>(mapped.at(out, v, {B, N}));
    } else {
      c.parts = out.dims[out.dims.size() - 3];
      c.levels = mapped.plane<float>(out, v, {c.parts, B, N});
      c.t = levels("t", mapped.plane<const float>(t, v, {B, N}), B, N);
      c.dt = {mapped.plane<const float>(dt, v, {B, N}), {N, 1}};
    }
    if (B * N > 0) select_patches(c, call.threads);
  }
}

}  // namespace

std::vector<Handler> patch_handlers() {
  return {{"mix_patches", handler<mix_patches_xla>},
          {"select_patches", handler<select_patches_xla>}};
}

}  // namespace pydiffuse
