// pydiffuse._C: importing it registers the compiled ops with torch's dispatcher.
#include <Python.h>

#ifndef PYDIFFUSE_CUDA_ARCHS
#define PYDIFFUSE_CUDA_ARCHS ""
#endif

// In csrc/cuda/scan.cu, where CUDA is built: bytes of shared memory that a block of the scan's
// backward takes for so many states.
extern "C" __attribute__((weak)) long long pydiffuse_scan_backward_shared(long long states);

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return module;
  PyModule_AddStringConstant(module, "cuda_archs", PYDIFFUSE_CUDA_ARCHS);
  const auto shared = [](long long states) {
    return pydiffuse_scan_backward_shared ? pydiffuse_scan_backward_shared(states) : 0;
  };
  PyModule_AddIntConstant(module, "cuda_scan_backward_few", shared(16));   // up to 16 states
  PyModule_AddIntConstant(module, "cuda_scan_backward_many", shared(17));  // more
  return module;
}
