// Patches with a noise level of their own on NumPy arrays.
#include "../cpu/patch_call.h"

#include "arrays.h"

namespace pydiffuse {
namespace {

Grid grid_of(const Ints& flat) {
  require(flat.size() == 7, "grid takes 4 sizes and 3 of a patch");
  Grid g{flat[0], {flat[1], flat[2], flat[3]}, {flat[4], flat[5], flat[6]}};
  require(*std::min_element(flat.begin(), flat.end()) >= 0, "sizes are 0 or more");
  for (int d = 0; d < 3; ++d)
    require(g.patch[d] > 0 ? g.size[d] % g.patch[d] == 0 : g.size[d] == 0,
            "patch_size must divide the image");
  return g;
}

// A value for every patch, [batch, patches] of any strides.
Table table(const Array& a, int64_t batch, int64_t patches) {
  require(a.dtype().num() == py::dtype::num_of<float>() && is_native(a) && is_aligned(a),
          "levels must be float32");
  require(has_shape(a, {batch, patches}), "levels must be one for each patch");
  const int64_t size = sizeof(float);
  require(a.strides(0) % size == 0 && a.strides(1) % size == 0, "levels must be float32");
  return {static_cast<const float*>(a.data()), {a.strides(0) / size, a.strides(1) / size}};
}

Table levels(const std::string& op, const char* argument, const Array& a, int64_t batch,
             int64_t patches) {
  const Table found = table(a, batch, patches);
  if (!patch_kernels().within(found, batch, patches))
    throw py::value_error(op + ": " + argument +
                          " holds a value outside [0, 1] or NaN; accepted: 0 (noise) to 1 (data)");
  return found;
}

// rule: method, path, source, target, and sets of places in the matrix: outputs, then terms.
void mix_patches_arrays(const std::string& op, const Arrays& out, const MaybeArray& arrived,
                        const Arrays& terms, const Array& t, const MaybeArray& next,
                        const MaybeArray& last, const MaybeArray& mask, const MaybeArray& scales,
                        const Ints& grid, const Ints& rule, double scale, double eta) {
  require(rule.size() == 6, "a rule is 6 codes");
  const auto in = [](int64_t code, auto count) { return 0 <= code && code < int64_t(count); };
  require(in(rule[0], Method::count) && in(rule[1], Path::count) && in(rule[2], Kind::count) &&
              in(rule[3], Kind::count),
          "unknown code of a method, path or kind");
  MixPatchesCall call{};
  call.rule = {Method(rule[0]), Path(rule[1]), Kind(rule[2]), Kind(rule[3]), eta};
  call.grid = grid_of(grid);
  require(!terms.empty(), "no images");
  const Ints shape = shape_of(terms[0]);
  const int64_t batch = call.batch = shape.empty() ? 0 : shape[0], patches = call.grid.patches();
  require(terms[0].size() == batch * call.grid.elements(), "the grid is not that of the images");
  const auto places = [&](const Arrays& images, int64_t set, int count, Rows* to, int* place,
                          bool written) {
    int n = 0;
    for (int i = 0; i < count; ++i) {
      if (!(set >> i & 1)) continue;
      require(n < int(images.size()), "too few images");
      to[n] = rows(images[n], shape, written);
      place[n++] = i;
    }
    require(n > 0 && n == int(images.size()), "too many images, or none");
    return n;
  };
  call.outs = places(out, rule[4], OUTS, call.out, call.out_place, true);
  call.terms = places(terms, rule[5], TERMS, call.term, call.term_place, false);
  const bool steps = call.rule.method <= Method::multistep;
  require(steps == next.has_value(), "a step, and nothing else, needs t_next");
  call.t = levels(op, "t", t, batch, patches);
  if (next) call.next = levels(op, "t_next", *next, batch, patches);
  if (last) call.last = levels(op, "history[1]", *last, batch, patches);
  call.mask = reinterpret_cast<const uint8_t*>(plane<const bool>(mask, {batch, patches}));
  call.arrived = plane<float>(arrived, {batch, patches});
  call.scale = float(scale);
  call.scales = plane<const float>(scales, {batch});
  unlocked([&] { mix_patches(call, HostThreads()); });
}

void select_patches_arrays(const std::string& op, const MaybeArray& ids, const MaybeArray& rest,
                           const MaybeArray& mask, const MaybeArray& to, const Array& score,
                           int64_t k, const MaybeArray& t, const MaybeArray& dt) {
  require(score.ndim() == 2, "score must be [B, N]");
  SelectCall call{};
  const int64_t batch = call.batch = score.shape(0), patches = call.patches = score.shape(1);
  require(0 <= k && k <= patches, "k must be 0 to the number of patches");
  call.k = k;
  call.score = plane<const float>(score, {batch, patches});
  require(ids.has_value() == rest.has_value(), "ids and the rest come together");
  call.ids = plane<int64_t>(ids, {batch, k});
  call.rest = plane<int64_t>(rest, {batch, patches - k});
  call.mask = reinterpret_cast<uint8_t*>(plane<bool>(mask, {batch, patches}));
  if (to) {
    require(to->ndim() == 3 && t && dt, "levels are [parts, B, N] and need t and dt");
    call.parts = to->shape(0);
    call.levels = plane<float>(*to, {call.parts, batch, patches});
    call.t = levels(op, "t", *t, batch, patches);
    call.dt = table(*dt, batch, patches);
  }
  unlocked([&] { select_patches(call, HostThreads()); });
}

}  // namespace

void bind_patch(py::module_& m) {
  m.def("mix_patches", &mix_patches_arrays);
  m.def("select_patches", &select_patches_arrays);
}

}  // namespace pydiffuse
