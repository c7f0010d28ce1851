// pydiffuse._host: the CPU kernels on NumPy arrays, with no torch in between.
#include "../cpu/capability.h"
#include "arrays.h"

using namespace pydiffuse;

PYBIND11_MODULE(_host, m) {
  m.doc() = "The CPU kernels of pydiffuse on NumPy arrays; pydiffuse.numpy is their public face.";
  bind_guidance(m);
  bind_scan(m);
  bind_conv(m);
  bind_attention(m);
  bind_patch(m);
  bind_adaln(m);
  bind_routing(m);
  bind_floors(m);
  m.def("capability", &capability_name, "The instruction set in use: default, avx2 or avx512.");
  m.def("threads", &thread_count, "How many threads share a call.");
  m.def("set_threads", [](int n) {
    require(n >= 1 && n <= 1024, "set_threads: accepted 1 to 1024");
    unlocked([n] { set_thread_count(n); });
  });
  m.add_object("_join", py::capsule(&end_threads));  // threads end before the module does
}
