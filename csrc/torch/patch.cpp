// The torch binding of patches on the CPU. Schemas stand in pydiffuse/_core/schemas.py.
#include <algorithm>

#include "../cpu/patch_call.h"
#include "direct.h"

namespace pydiffuse {
namespace {

using Ints = std::vector<int64_t>;

Grid grid_of(const char* op, const Ints& flat) {
  STD_TORCH_CHECK(flat.size() == 7, op, ": grid takes 4 sizes and 3 of a patch");
  Grid g{flat[0], {flat[1], flat[2], flat[3]}, {flat[4], flat[5], flat[6]}};
  for (int d = 0; d < 3; ++d)
    STD_TORCH_CHECK(g.patch[d] > 0 ? g.size[d] % g.patch[d] == 0 : g.size[d] == 0, op,
                    ": patch_size must divide the image");
  return g;
}

Rows image(const char* op, const Tensor& t, const Grid& g, int64_t batch) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == batch * g.elements(), op,
                  ": images must be contiguous, of one shape that fits the grid");
  return {t.data_ptr(), g.elements(), dtype_of(op, t)};
}

void check_table(const char* op, const Tensor& t, ScalarType dtype, int64_t batch,
                 int64_t columns) {
  STD_TORCH_CHECK(
      t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == batch && t.size(1) == columns, op,
      ": tables must have one value for each of the ", columns, " patches");
}

Table table(const char* op, const Tensor& t, int64_t batch, int64_t patches) {
  check_table(op, t, ScalarType::Float, batch, patches);
  return {static_cast<const float*>(t.data_ptr()), {t.stride(0), t.stride(1)}};
}

template <class T>
T* plane(const char* op, const MaybeTensor& t, ScalarType dtype, int64_t batch, int64_t patches) {
  if (!t) return nullptr;
  check_table(op, *t, dtype, batch, patches);
  STD_TORCH_CHECK(t->is_contiguous(), op, ": masks and what is written must be contiguous");
  return static_cast<T*>(t->data_ptr());
}

void check_levels(const char* op, const char* argument, const Table& t, int64_t batch,
                  int64_t patches) {
  STD_TORCH_CHECK(patch_kernels().within(t, batch, patches), op, ": ", argument,
                  " holds a value outside [0, 1] or NaN; accepted: 0 (noise) to 1 (data)");
}

const char* name_of(Method method) {
  if (method <= Method::multistep) return "patch_step";
  if (method == Method::noise) return "noise_patches";
  return method == Method::convert ? "convert" : "patch_loss";
}

void mix_patches_cpu(const Tensors& out, const MaybeTensor& arrived, const Tensors& terms,
                     const Tensor& t, const MaybeTensor& next, const MaybeTensor& last,
                     const MaybeTensor& mask, const MaybeTensor& scales, const Ints& grid,
                     const Ints& rule, double scale, double eta, bool transposed) {
  STD_TORCH_CHECK(rule.size() == 6, "mix_patches: takes 6 codes");
  const auto in = [](int64_t code, auto count) { return 0 <= code && code < int64_t(count); };
  STD_TORCH_CHECK(in(rule[0], Method::count) && in(rule[1], Path::count) &&
                      in(rule[2], Kind::count) && in(rule[3], Kind::count),
                  "mix_patches: unknown code of a method, path or kind");
  MixPatchesCall call{};
  call.rule = {Method(rule[0]), Path(rule[1]), Kind(rule[2]), Kind(rule[3]), eta};
  const char* op = name_of(call.rule.method);
  call.grid = grid_of(op, grid);
  const int64_t batch = call.batch = t.size(0), patches = call.grid.patches();
  call.transposed = transposed;

  // Bits of rule[4] and rule[5] say which places of the matrix the tensors stand for.
  const auto places = [&](const Tensors& tensors, int64_t set, int count, Rows* rows, int* place) {
    int n = 0;
    for (int i = 0; i < count; ++i) {
      if (!(set >> i & 1)) continue;
      STD_TORCH_CHECK(n < int(tensors.size()), op, ": too few tensors");
      rows[n] = image(op, tensors[n], call.grid, batch);
      place[n++] = i;
    }
    STD_TORCH_CHECK(n > 0 && n == int(tensors.size()), op, ": too many tensors, or none");
    return n;
  };
  call.outs = places(out, rule[4], transposed ? TERMS : OUTS, call.out, call.out_place);
  call.terms = places(terms, rule[5], transposed ? OUTS : TERMS, call.term, call.term_place);

  call.t = table(op, t, batch, patches);
  if (next) call.next = table(op, *next, batch, patches);
  if (last) call.last = table(op, *last, batch, patches);
  STD_TORCH_CHECK(next || call.rule.method == Method::noise || call.rule.method == Method::convert,
                  op, ": a step needs t_next");
  if (call.rule.method != Method::residual) {
    check_levels(op, "t", call.t, batch, patches);
    if (next) check_levels(op, "t_next", call.next, batch, patches);
  }
  call.mask = plane<const uint8_t>(op, mask, ScalarType::Bool, batch, patches);
  call.arrived = plane<float>(op, arrived, ScalarType::Float, batch, patches);
  call.scale = float(scale);
  if (scales) {
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                        scales->numel() == batch,
                    op, ": scale must be a number or contiguous float32, one per sample");
    call.scales = static_cast<const float*>(scales->data_ptr());
  }
  mix_patches(call, TorchThreads{});
}

// A level for every patch, in [0, 1]: float32 (B, N), (B,) or one value.
bool usual_level(const Usual& usual, const Tensor& t, int64_t batch, int64_t patches,
                 Table* table) {
  if (t.scalar_type() != ScalarType::Float || !usual.here(t) || t.dim() > 2) return false;
  if (t.dim() >= 1 && t.size(0) != batch) return false;
  if (t.dim() == 2 && t.size(1) != patches) return false;
  *table = {static_cast<const float*>(t.data_ptr()),
            {t.dim() >= 1 ? t.stride(0) : 0, t.dim() == 2 ? t.stride(1) : 0}};
  return patch_kernels().within(*table, batch, patches);
}

// Contiguous images. Gives what the method makes, and of a step where the patches are.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> mix_patches_new_cpu(
    const Tensor& x, const MaybeTensor& pred, const MaybeTensor& uncond, const MaybeTensor& noise,
    const Tensor& t, const MaybeTensor& next, const MaybeTensor& mask, const Tensor& numbers) {
  const Usual usual(x);
  const double* of = numbers_of(numbers, 12);
  if (!of) return {};
  int64_t n[11];  // the grid's 7, then method, path, source, target; the last number is the scale
  std::transform(of, of + 11, n, [](double v) { return static_cast<int64_t>(v); });
  MixPatchesCall call{};
  call.rule = {Method(n[7]), Path(n[8]), Kind(n[9]), Kind(n[10]), 1.0};
  call.grid = {n[0], {n[1], n[2], n[3]}, {n[4], n[5], n[6]}};
  if (x.numel() == 0 || x.dim() > MAX_DIMS || std::min({n[4], n[5], n[6]}) < 1) return {};
  const int64_t batch = call.batch = x.size(0), patches = call.grid.patches();
  if (x.numel() != batch * call.grid.elements()) return {};
  const auto term = [&](const Tensor& image, int place) {
    Rows& row = call.term[call.terms];
    row = {image.data_ptr(), call.grid.elements(), DType::f32};
    call.term_place[call.terms++] = place;
    return same_sizes(image, x) && usual.floating(image, &row.dtype) && image.is_contiguous();
  };
  if (!term(x, TERM_X) || (pred && !term(*pred, TERM_PRED)) ||
      (uncond && !term(*uncond, TERM_UNCOND)) || (noise && !term(*noise, TERM_NOISE)))
    return {};
  const bool steps = call.rule.method <= Method::multistep;
  if (!usual_level(usual, t, batch, patches, &call.t) ||
      (steps && !(next && usual_level(usual, *next, batch, patches, &call.next))) ||
      !usual.plain(mask, ScalarType::Bool, {batch, patches}, &call.mask))
    return {};
  call.scale = float(of[11]);
  const auto make = [&](int place) {
    const Tensor& own = call.rule.method == Method::convert ? *pred : x;
    const Tensor made = new_like(own);
    call.out[call.outs] = {made.data_ptr(), call.grid.elements(), dtype_of("mix_patches", own)};
    call.out_place[call.outs++] = place;
    return made;
  };
  MaybeTensor first = make(OUT_X), second, arrived;
  if (call.rule.method == Method::noise) second = make(OUT_HISTORY);
  if (steps) {
    arrived = new_tensor(x, aoti_torch_dtype_float32(), {batch, patches});
    call.arrived = static_cast<float*>(arrived->data_ptr());
  }
  mix_patches(call, TorchThreads{});
  return {first, second, arrived};
}

void patch_loss_cpu(const Tensor& loss, const Tensor& errors, const Tensor& pred,
                    const Tensor& target, const MaybeTensor& logvar, const MaybeTensor& weight,
                    double nll, const Ints& grid) {
  const char* op = "patch_loss";
  PatchLossCall call{};
  call.grid = grid_of(op, grid);
  const int64_t batch = call.batch = loss.numel(), patches = call.grid.patches();
  call.pred = image(op, pred, call.grid, batch);
  call.target = image(op, target, call.grid, batch);
  call.logvar = plane<const float>(op, logvar, ScalarType::Float, batch, patches);
  call.weight = plane<const float>(op, weight, ScalarType::Float, batch, patches);
  call.nll = nll;
  check_doubles(op, loss, batch);
  check_doubles(op, errors, batch * patches);
  call.loss = static_cast<double*>(loss.data_ptr());
  call.errors = static_cast<double*>(errors.data_ptr());
  patch_loss(call, TorchThreads{});
}

void select_patches_cpu(const MaybeTensor& ids, const MaybeTensor& rest, const MaybeTensor& mask,
                        const MaybeTensor& levels, const Tensor& score, int64_t k,
                        const MaybeTensor& t, const MaybeTensor& dts, double dt) {
  const char* op = levels ? "dual_loop_t" : "select_patches";
  STD_TORCH_CHECK(
      score.dim() == 2 && score.scalar_type() == ScalarType::Float && score.is_contiguous(), op,
      ": score must be contiguous float32 [B, N]");
  SelectCall call{};
  const int64_t batch = call.batch = score.size(0), patches = call.patches = score.size(1);
  STD_TORCH_CHECK(0 <= k && k <= patches, op, ": k must be 0 to the number of patches");
  call.k = k;
  call.score = static_cast<const float*>(score.data_ptr());
  STD_TORCH_CHECK(ids.has_value() == rest.has_value(), op, ": ids and the rest come together");
  call.ids = plane<int64_t>(op, ids, ScalarType::Long, batch, k);
  call.rest = plane<int64_t>(op, rest, ScalarType::Long, batch, patches - k);
  call.mask = plane<uint8_t>(op, mask, ScalarType::Bool, batch, patches);
  const float each = float(dt);
  if (levels) {
    STD_TORCH_CHECK(levels->dim() == 3 && levels->size(1) == batch && levels->size(2) == patches &&
                        levels->scalar_type() == ScalarType::Float && levels->is_contiguous(),
                    op, ": levels must be contiguous float32 [parts, ", batch, ", ", patches, "]");
    STD_TORCH_CHECK(t, op, ": levels need t");
    call.levels = static_cast<float*>(levels->data_ptr());
    call.parts = levels->size(0);
    call.t = table(op, *t, batch, patches);
    check_levels(op, "t", call.t, batch, patches);
    call.dt = dts ? table(op, *dts, batch, patches) : Table{&each, {}};
  }
  select_patches(call, TorchThreads{});
}

// score [B, N]: the mask, or ids and the rest.
std::tuple<MaybeTensor, MaybeTensor> select_patches_new_cpu(const Tensor& score, int64_t k,
                                                            bool as_mask) {
  if (score.dim() != 2 || score.numel() == 0 || !score.is_cpu() || !score.is_contiguous() ||
      score.scalar_type() != ScalarType::Float || k < 0 || k > score.size(1))
    return {};
  const int64_t B = score.size(0), N = score.size(1);
  MaybeTensor ids, rest, mask;
  if (as_mask) {
    mask = new_tensor(score, aoti_torch_dtype_bool(), {B, N});
  } else {
    ids = new_tensor(score, aoti_torch_dtype_int64(), {B, k});
    rest = new_tensor(score, aoti_torch_dtype_int64(), {B, N - k});
  }
  select_patches_cpu(ids, rest, mask, {}, score, k, {}, {}, 0);
  return as_mask ? std::tuple{mask, rest} : std::tuple{ids, rest};
}

}  // namespace

PYDIFFUSE_IMPL(CPU, m) {
  m.impl("mix_patches", TORCH_BOX(&mix_patches_cpu));
  m.impl("mix_patches.new", TORCH_BOX(&mix_patches_new_cpu));
  m.impl("patch_loss", TORCH_BOX(&patch_loss_cpu));
  m.impl("select_patches", TORCH_BOX(&select_patches_cpu));
  m.impl("select_patches.new", TORCH_BOX(&select_patches_new_cpu));
}

}  // namespace pydiffuse
