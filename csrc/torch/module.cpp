// pydiffuse._C: importing it registers the compiled ops with torch's dispatcher.
#include <Python.h>

#ifndef PYDIFFUSE_CUDA_ARCHS
#define PYDIFFUSE_CUDA_ARCHS ""
#endif

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "cuda_archs", PYDIFFUSE_CUDA_ARCHS);
  return module;
}
