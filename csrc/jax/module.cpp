// pydiffuse._jax: the CPU kernels as targets of XLA's foreign function interface; pydiffuse.jax
// registers them and is their public face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/capability.h"
#include "call.h"

namespace py = pybind11;

namespace pydiffuse {
namespace {

// Where the arrays of the last call were, inputs then results: for a test that counts copies.
struct Seen {
  std::mutex mutex;
  bool watching = false;
  std::vector<uintptr_t> addresses;
} seen;

template <class List>
std::vector<Buffer> buffers(const List& list) {
  std::vector<Buffer> found(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const auto b = [&] {
      if constexpr (std::is_same_v<List, ffi::RemainingArgs>)
        return list.template get<ffi::AnyBuffer>(i).value();
      else
        return *list.template get<ffi::AnyBuffer>(i).value();
    }();
    const auto dims = b.dimensions();
    found[i] = {b.untyped_data(),
                b.element_type(),
                {dims.begin(), dims.size()},
                static_cast<int64_t>(b.element_count())};
  }
  return found;
}

void note(const std::vector<Buffer>& in, const std::vector<Buffer>& out) {
  std::lock_guard lock(seen.mutex);
  if (!seen.watching) return;
  seen.addresses.clear();
  for (const auto* list : {&in, &out})
    for (const Buffer& b : *list) seen.addresses.push_back(reinterpret_cast<uintptr_t>(b.data));
}

// What a GPU is given in the place of a kernel.
XLA_FFI_Error* no_kernels(XLA_FFI_CallFrame* frame) {
  static auto* bound =
      ffi::Ffi::Bind()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([](ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
            return ffi::Error(ffi::ErrorCode::kUnimplemented,
                              "pydiffuse.jax: its kernels run on the CPU only; put the arrays "
                              "there: jax.device_put(x, jax.devices('cpu')[0])");
          })
          .release();
  return bound->Call(frame);
}

}  // namespace

ffi::Error handled(Run run, ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   const ffi::Dictionary& attributes) {
  try {
    auto in = buffers(args), out = buffers(rets);
    note(in, out);
    Call call(pool, std::move(in), std::move(out), attributes);
    run(call);
    require(!call.inputs() && !call.outputs(), "too many arrays");
    return ffi::Error::Success();
  } catch (const std::invalid_argument& wrong) {
    return ffi::Error::InvalidArgument(std::string("pydiffuse.jax: ") + wrong.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "pydiffuse.jax: out of memory");
  } catch (const std::exception& other) {
    return ffi::Error::Internal(std::string("pydiffuse.jax: ") + other.what());
  }
}

}  // namespace pydiffuse

using namespace pydiffuse;

PYBIND11_MODULE(_jax, m) {
  m.doc() = "The CPU kernels of pydiffuse for XLA; pydiffuse.jax is their public face.";
  py::dict handlers;
  for (const auto& family : {conv_handlers(), guidance_handlers(), scan_handlers()})
    for (const Handler& h : family)
      handlers[h.name] = py::capsule(reinterpret_cast<void*>(h.handler));
  m.attr("handlers") = handlers;
  m.attr("no_kernels") = py::capsule(reinterpret_cast<void*>(&no_kernels));
  m.def("capability", &capability_name, "The instruction set in use: default, avx2 or avx512.");
  m.def("watch", [](bool watching) {
    std::lock_guard lock(seen.mutex);
    seen.watching = watching;
  });
  m.def("seen", [] {
    std::lock_guard lock(seen.mutex);
    return seen.addresses;
  });
}
