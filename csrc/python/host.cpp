// pydiffuse._host: the CPU kernels on NumPy arrays, with no torch in between. pydiffuse/numpy.py
// checks the arguments and lays the arrays out; here only what memory safety needs is checked
// again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "../cpu/attention_call.h"
#include "../cpu/guidance_call.h"
#include "../cpu/scan_call.h"
#include "threads.h"

namespace py = pybind11;
using namespace pydiffuse;

namespace {

std::unique_ptr<ThreadPool> pool;

ThreadPool& threads() {
  if (!pool) pool = std::make_unique<ThreadPool>(std::max(1u, std::thread::hardware_concurrency()));
  return *pool;
}

using Arrays = std::vector<py::array>;

DType dtype_of(const py::array& a) {
  const auto name = py::str(a.dtype().attr("name")).cast<std::string>();
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::type_error("accepted: float32, bfloat16, float16; given " + name);
}

Rows rows(const py::array& a, const py::array& like) {
  if (!(a.flags() & py::array::c_style)) throw py::value_error("arrays must be C-contiguous");
  if (a.ndim() < 1 || a.ndim() != like.ndim() ||
      !std::equal(a.shape(), a.shape() + a.ndim(), like.shape()))
    throw py::value_error("arrays must have one shape [B, ...]");
  return {const_cast<void*>(a.data()), a.shape(0) ? a.size() / a.shape(0) : 0, dtype_of(a)};
}

const double* doubles(const py::array& a, int64_t size) {
  if (!(a.flags() & py::array::c_style) || !a.dtype().is(py::dtype::of<double>()) ||
      a.size() != size)
    throw py::value_error("coefficients must be C-contiguous float64, a row per sample");
  return static_cast<const double*>(a.data());
}

template <class T>
void check_count(const char* what, const T& list, size_t most) {
  if (list.empty() || list.size() > most)
    throw py::value_error(std::string(what) + ": accepted 1 to " + std::to_string(most));
}

void guide_arrays(const Arrays& out, const Arrays& preds, const std::optional<py::array>& x,
                  const std::optional<py::array>& history, const std::optional<py::array>& noise,
                  int rule, const std::vector<double>& params, bool rescaled,
                  const std::optional<py::array>& varied, const std::vector<int64_t>& columns,
                  int emit) {
  check_count("predictions", preds, MAX_PREDS);
  check_count("parameters", params, MAX_PARAMS);
  GuideCall call{};
  call.rule = static_cast<Rule>(rule);
  call.k = static_cast<int>(preds.size());
  call.emit = emit;
  if (rule < 0 || rule >= static_cast<int>(Rule::count) ||
      static_cast<int>(out.size()) != bits(emit))
    throw py::value_error("unknown rule, or not one output for each result");
  call.rescaled = rescaled;
  call.batch = preds[0].shape(0);
  call.n = call.batch ? preds[0].size() / call.batch : 0;
  for (int i = 0; i < call.k; ++i) call.pred[i] = rows(preds[i], preds[0]);
  for (auto [array, bit] : {std::pair{&x, HAS_X}, {&history, HAS_HISTORY}, {&noise, HAS_NOISE}})
    if (*array) {
      call.extra[bits(call.has)] = rows(**array, preds[0]);
      call.has |= bit;
    }
  for (size_t i = 0; i < out.size(); ++i) call.out[i] = rows(out[i], preds[0]);
  std::copy(params.begin(), params.end(), call.params);
  call.nparams = static_cast<int>(params.size());
  call.ncolumns = static_cast<int>(columns.size());
  std::copy(columns.begin(), columns.end(), call.columns);
  if (varied) call.varied = doubles(*varied, call.batch * call.ncolumns);
  py::gil_scoped_release release;
  guide(call, threads());
}

void mix_arrays(const Arrays& out, const Arrays& terms, const py::array& matrix) {
  check_count("terms", terms, MAX_TERMS);
  check_count("outputs", out, MAX_OUTS);
  MixCall call{};
  call.terms = static_cast<int>(terms.size());
  call.outs = static_cast<int>(out.size());
  call.batch = terms[0].shape(0);
  call.n = call.batch ? terms[0].size() / call.batch : 0;
  for (int m = 0; m < call.terms; ++m) call.term[m] = rows(terms[m], terms[0]);
  for (int j = 0; j < call.outs; ++j) call.out[j] = rows(out[j], terms[0]);
  call.matrix = doubles(matrix, call.batch * call.outs * call.terms);
  py::gil_scoped_release release;
  mix(call, threads());
}

std::pair<py::array_t<double>, py::array_t<double>> gram_arrays(const Arrays& preds) {
  check_count("predictions", preds, MAX_PREDS);
  const int k = static_cast<int>(preds.size());
  const int64_t batch = preds[0].shape(0), n = batch ? preds[0].size() / batch : 0;
  Rows p[MAX_PREDS];
  for (int i = 0; i < k; ++i) p[i] = rows(preds[i], preds[0]);
  py::array_t<double> matrix({batch, int64_t(k), int64_t(k)}), sums({batch, int64_t(k)});
  double *g = matrix.mutable_data(), *s = sums.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<double> packed(batch * stats(k, true));
    gram(k, true, batch, n, p, packed.data(), threads());
    for (int64_t b = 0; b < batch; ++b)
      unpack(k, packed.data() + b * stats(k, true), true, g + b * k * k, s + b * k);
  }
  return {matrix, sums};
}

// What selective_scan's floor is counted in: its exponentials and multiply-adds, in cache.
void scan_floor(int states, int64_t channel_tokens) {
  const auto& kernels = scan_kernels();
  const int64_t steps = channel_tokens / kernels.width, pieces = threads().threads();
  py::gil_scoped_release release;
  threads()(pieces, 1, [&](int64_t begin, int64_t end) {
    const Floats scratch(4096);
    std::fill(scratch.data(), scratch.data() + 4096, -0.01f);
    for (int64_t i = begin; i < end; ++i)
      kernels.floor(states, (i + 1) * steps / pieces - i * steps / pieces, scratch.data());
  });
}

// What tile_attention's floor is counted in: its products and exponentials, in cache.
void attention_floor(int dim, int products, int exponentials, int64_t pairs, bool bf16) {
  const auto& kernels = attention_kernels(bf16 ? DType::bf16 : DType::f32);
  const int64_t strips = pairs / kernels.strip, pieces = threads().threads();
  py::gil_scoped_release release;
  threads()(pieces, 1, [&](int64_t begin, int64_t end) {
    const int64_t n = kernels.floor_scratch(dim);
    const Floats scratch(n);
    std::fill(scratch.data(), scratch.data() + n, -0.01f);
    for (int64_t i = begin; i < end; ++i)
      kernels.floor(dim, products, exponentials, (i + 1) * strips / pieces - i * strips / pieces,
                    scratch.data());
  });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The CPU kernels of pydiffuse on NumPy arrays; pydiffuse.numpy is their public face.";
  m.def("guide", &guide_arrays);
  m.def("mix", &mix_arrays);
  m.def("gram", &gram_arrays);
  m.def("scan_floor", &scan_floor,
        "states exponentials and 2 states multiply-adds for each of channel_tokens, in cache.");
  m.def("attention_floor", &attention_floor,
        "For each of `pairs` of query and key `products` sums of dim products, and exponentials.");
  m.def("capability", &capability_name, "The instruction set in use: default, avx2 or avx512.");
  m.def("threads", [] { return threads().threads(); }, "How many threads share a call.");
  m.def("set_threads", [](int n) {
    if (n < 1 || n > 1024) throw py::value_error("set_threads: accepted 1 to 1024");
    pool = std::make_unique<ThreadPool>(n);
  });
  m.add_object("_join", py::capsule([] { pool.reset(); }));  // threads end before the module does
}
