// What the custom calls share: threads, arguments that are checked as they are taken, and errors.

#ifndef PALLASITE_BINDINGS_H_
#define PALLASITE_BINDINGS_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "bodies.h"
#include "choose.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace pallasite {

using Type = ffi::DataType;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

template <typename Dimensions>
std::string shown(const Dimensions& dimensions) {
  std::string text = "[";
  for (size_t i = 0; i < dimensions.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dimensions[i]);
  }
  return text + "]";
}

// What is wrong with the type, the address or the shape of an argument or a result, in words;
// nothing where all is as it must be.
inline std::string buffer_fault(const char* name, const ffi::AnyBuffer& buffer,
                                std::initializer_list<Type> types) {
  if (std::find(types.begin(), types.end(), buffer.element_type()) == types.end()) {
    return std::string("got ") + name + " of a type that it cannot have";
  }
  const size_t size = ffi::ByteWidth(buffer.element_type());
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % size != 0) {
    return std::string("got ") + name + " at an address that " + std::to_string(size) +
           " does not divide";
  }
  return "";
}

inline std::string buffer_fault(const char* name, const ffi::AnyBuffer& buffer,
                                std::initializer_list<Type> types,
                                const std::vector<int64_t>& shape) {
  const auto dimensions = buffer.dimensions();
  if (!std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end())) {
    return std::string("got ") + name + " " + shown(dimensions) + "; it must be " + shown(shape);
  }
  return buffer_fault(name, buffer, types);
}

// A team for the time of one call; without one, the calling thread works alone.
class Call {
 public:
  explicit Call(ffi::ThreadPool pool) : pool_(pool), team_(Team::take()) {
    if (team_ != nullptr) num_threads_ = std::max<int64_t>(pool.num_threads(), 1);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    if (team_ != nullptr) team_->give_back();
  }

  int64_t num_threads() const { return num_threads_; }

  std::byte* reserve(size_t size) {
    return team_ != nullptr ? team_->scratch.reserve(size) : own_.reserve(size);
  }

  // See `Team`.
  template <typename Each>
  void expect(int64_t num_chunks, int64_t page_size, const Each& each) {
    if (team_ != nullptr) team_->expect(num_chunks, num_threads_, page_size, each);
  }

  Upcoming take_expected(int64_t chunk, int64_t num_chunks, int64_t count) {
    return team_ != nullptr ? team_->take_expected(chunk, num_chunks, count) : Upcoming{};
  }

  template <typename Work>
  void run(int64_t num_chunks, const Work& work) {
    if (team_ == nullptr) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(chunk);
      return;
    }
    team_->run(
        num_chunks, num_threads_ - 1, [this](auto task) { pool_.Schedule(std::move(task)); }, work);
  }

 private:
  ffi::ThreadPool pool_;
  Team* team_;
  int64_t num_threads_ = 1;
  Scratch own_;
};

// Arguments one after another, each checked as it is taken.
class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  bool has_more() const { return next_ < args_.size(); }
  const std::string& error() const { return error_; }

  // Returns the next one, of any of these types; after an error, what is returned has no data.
  ffi::AnyBuffer take(const char* name, std::initializer_list<Type> types) {
    auto found = args_.get<ffi::AnyBuffer>(next_++);
    if (found.has_error()) {
      fail(std::string("got nothing for ") + name);
      return ffi::AnyBuffer(&nothing_);
    }
    const ffi::AnyBuffer buffer = *found;
    fail(buffer_fault(name, buffer, types));
    return buffer;
  }

  ffi::AnyBuffer take(const char* name, std::initializer_list<Type> types,
                      const std::vector<int64_t>& shape) {
    const ffi::AnyBuffer buffer = take(name, types);
    fail(buffer_fault(name, buffer, types, shape));
    return buffer;
  }

  // Keeps the first message that is not empty.
  void fail(const std::string& message) {
    if (error_.empty()) error_ = message;
  }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
  std::string error_;
  XLA_FFI_Buffer nothing_{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_INVALID, nullptr,
                          0, nullptr};
};

template <typename T>
const T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

}  // namespace pallasite

#endif  // PALLASITE_BINDINGS_H_
