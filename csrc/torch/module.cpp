// pydiffuse._C: importing it registers the compiled ops with torch's dispatcher.
#include <Python.h>

#include <utility>

#include "../adaln.h"
#include "../attention.h"
#include "../conv.h"
#include "../guidance.h"
#include "../patch.h"
#include "../scan.h"

#ifndef PYDIFFUSE_CUDA_ARCHS
#define PYDIFFUSE_CUDA_ARCHS ""
#endif

// In csrc/cuda/scan.cu, where CUDA is built: bytes of shared memory that a block of the scan's
// backward takes for so many states.
extern "C" __attribute__((weak)) long long pydiffuse_scan_backward_shared(long long states);

namespace {

// Limits and codes that Python has, too (pydiffuse/_core); a test compares them.
using namespace pydiffuse;
constexpr std::pair<const char*, long long> CONSTANTS[] = {
    {"MAX_STATES", MAX_STATES},
    {"CHUNK", SCAN_CHUNK},
    {"MAX_WIDTH", MAX_WIDTH},
    {"BLOCK", ATTENTION_BLOCK},
    {"MAX_HEAD_DIM", MAX_HEAD_DIM},
    {"MAX_PREDS", MAX_PREDS},
    {"EMIT_UPDATE", EMIT_UPDATE},
    {"EMIT_PREDICT", EMIT_PREDICT},
    {"EMIT_STATE", EMIT_STATE},
    {"Rule.linear", int(Rule::linear)},
    {"Rule.cfg", int(Rule::cfg)},
    {"Rule.tcfg", int(Rule::tcfg)},
    {"Rule.cfg_zero", int(Rule::cfg_zero)},
    {"Rule.apg", int(Rule::apg)},
    {"Rule.magnitude_aware", int(Rule::magnitude_aware)},
    {"Rule.perp_neg", int(Rule::perp_neg)},
    {"Rule.compose", int(Rule::compose)},
    {"Rule.slerp", int(Rule::slerp)},
    {"Rule.rescale", int(Rule::rescale)},
    {"Rule.count", int(Rule::count)},
    {"Path.linear", int(Path::linear)},
    {"Path.vp", int(Path::vp)},
    {"Path.trig", int(Path::trig)},
    {"Path.count", int(Path::count)},
    {"Kind.flow", int(Kind::flow)},
    {"Kind.v", int(Kind::v)},
    {"Kind.eps", int(Kind::eps)},
    {"Kind.x1", int(Kind::x1)},
    {"Kind.count", int(Kind::count)},
    {"Method.euler", int(Method::euler)},
    {"Method.ddim", int(Method::ddim)},
    {"Method.ancestral", int(Method::ancestral)},
    {"Method.multistep", int(Method::multistep)},
    {"Method.noise", int(Method::noise)},
    {"Method.convert", int(Method::convert)},
    {"Method.residual", int(Method::residual)},
    {"Method.count", int(Method::count)},
    {"Term.x", TERM_X},
    {"Term.pred", TERM_PRED},
    {"Term.uncond", TERM_UNCOND},
    {"Term.history", TERM_HISTORY},
    {"Term.noise", TERM_NOISE},
    {"Norm.none", int(Norm::none)},
    {"Norm.layer", int(Norm::layer)},
    {"Norm.rms", int(Norm::rms)},
    {"Norm.count", int(Norm::count)},
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return module;
  PyObject* constants = PyDict_New();
  for (const auto& [name, value] : CONSTANTS) {
    PyObject* number = PyLong_FromLongLong(value);
    PyDict_SetItemString(constants, name, number);
    Py_DECREF(number);
  }
  PyModule_AddObject(module, "constants", constants);
  PyModule_AddStringConstant(module, "cuda_archs", PYDIFFUSE_CUDA_ARCHS);
  const auto shared = [](long long states) {
    return pydiffuse_scan_backward_shared ? pydiffuse_scan_backward_shared(states) : 0;
  };
  PyModule_AddIntConstant(module, "cuda_scan_backward_few", shared(16));   // up to 16 states
  PyModule_AddIntConstant(module, "cuda_scan_backward_many", shared(17));  // more
  return module;
}
