// A call as XLA hands it over: buffers and attributes. pydiffuse/jax checks the arguments, with
// words for what is wrong; here what memory safety needs is checked again. Buffers are row-major.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../tensor.h"
#include "threads.h"

namespace pydiffuse {

namespace ffi = xla::ffi;

struct Buffer {
  void* data = nullptr;
  ffi::DataType type = ffi::DataType::INVALID;
  std::span<const int64_t> dims;
  int64_t count = 0;  // of elements
};

[[noreturn]] inline void refuse(const std::string& words) { throw std::invalid_argument(words); }
inline void require(bool fits, const char* words) {
  if (!fits) refuse(words);
}

inline DType dtype_of(const Buffer& b) {
  switch (b.type) {
    case ffi::DataType::F32:
      return DType::f32;
    case ffi::DataType::BF16:
      return DType::bf16;
    case ffi::DataType::F16:
      return DType::f16;
    default:
      refuse("accepted: float32, bfloat16, float16");
  }
}

// The buffers of a call, one after the other, and its attributes by name.
class Call {
 public:
  Call(const ffi::ThreadPool& pool, std::vector<Buffer> in, std::vector<Buffer> out,
       const ffi::Dictionary& attributes)
      : threads(pool), in_(std::move(in)), out_(std::move(out)), attributes_(attributes) {}

  const XlaThreads threads;

  const Buffer& input() { return next(in_, in_at_, "too few arrays"); }
  const Buffer& output() { return next(out_, out_at_, "too few results"); }
  int64_t inputs() const { return static_cast<int64_t>(in_.size()) - in_at_; }
  int64_t outputs() const { return static_cast<int64_t>(out_.size()) - out_at_; }

  template <class T>
  T get(std::string_view name) const {
    auto found = attributes_.get<T>(name);
    if (found.has_error()) refuse("no attribute " + std::string(name));
    return *found;
  }
  int64_t integer(std::string_view name) const { return get<int64_t>(name); }
  bool flag(std::string_view name) const { return integer(name) != 0; }
  // What lists hold; an empty list of numbers is not an attribute.
  template <class T>
  ffi::Span<const T> list(std::string_view name) const {
    return attributes_.contains(name) ? get<ffi::Span<const T>>(name) : ffi::Span<const T>();
  }

 private:
  static const Buffer& next(const std::vector<Buffer>& from, int64_t& at, const char* words) {
    require(at < static_cast<int64_t>(from.size()), words);
    return from[at++];
  }

  std::vector<Buffer> in_, out_;
  int64_t in_at_ = 0, out_at_ = 0;
  const ffi::Dictionary& attributes_;
};

template <class T>
constexpr ffi::DataType type_of() {
  using Plain = std::remove_const_t<T>;
  return std::is_same_v<Plain, int32_t>  ? ffi::DataType::S32
         : std::is_same_v<Plain, double> ? ffi::DataType::F64
                                         : ffi::DataType::F32;
}

// The memory of `count` elements of T.
template <class T>
T* plane(const Buffer& b, int64_t count) {
  require(b.type == type_of<T>(), "an array has the wrong dtype");
  require(b.count == count, "an array has the wrong shape");
  return static_cast<T*>(b.data);
}

// Small tables, float32 where JAX has no float64: as float64 for the kernels.
inline std::vector<double> doubles(const Buffer& b, int64_t count) {
  std::vector<double> to(count);
  if (b.type == ffi::DataType::F64) {
    std::copy_n(plane<const double>(b, count), count, to.begin());
  } else {
    std::copy_n(plane<const float>(b, count), count, to.begin());
  }
  return to;
}
inline void store(const std::vector<double>& from, const Buffer& to) {
  const auto count = static_cast<int64_t>(from.size());
  if (to.type == ffi::DataType::F64) {
    std::copy(from.begin(), from.end(), plane<double>(to, count));
  } else {
    std::transform(from.begin(), from.end(), plane<float>(to, count),
                   [](double x) { return static_cast<float>(x); });
  }
}

// Dimensions in front of the last `inner` ones, taken as one: those of the batch, and vmap's before
// them.
inline int64_t leading(const Buffer& b, int64_t inner) {
  const auto rank = static_cast<int64_t>(b.dims.size());
  require(inner >= 0 && inner <= rank, "an array has too few dimensions");
  int64_t n = 1;
  for (int64_t d = 0; d < rank - inner; ++d) n *= b.dims[d];
  return n;
}

using Run = void (*)(Call&);

struct Handler {
  const char* name;
  XLA_FFI_Handler* handler;
};

ffi::Error handled(Run run, ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   const ffi::Dictionary& attributes);

// An XLA handler that is a function of a Call.
template <Run run>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static auto* bound =
      ffi::Ffi::Bind()
          .Ctx<ffi::ThreadPool>()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([](ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 ffi::Dictionary attributes) { return handled(run, pool, args, rets, attributes); })
          .release();
  return bound->Call(frame);
}

// Each family's handlers.
std::vector<Handler> conv_handlers();
std::vector<Handler> guidance_handlers();
std::vector<Handler> scan_handlers();

}  // namespace pydiffuse
