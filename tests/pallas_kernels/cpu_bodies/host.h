// A host for the CPU's custom calls, as XLA is one: arguments of exactly their size, a pool of
// threads, and errors, by the structures that XLA's FFI declares. No JAX is needed to call a body, so
// that it can run under a sanitizer, or in an emulator of another processor.

#ifndef PALLASITE_TESTS_HOST_H_
#define PALLASITE_TESTS_HOST_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* PallasiteMultiply(XLA_FFI_CallFrame*);
XLA_FFI_Error* PallasiteAttend(XLA_FFI_CallFrame*);
XLA_FFI_Error* PallasiteFindPeaks(XLA_FFI_CallFrame*);
XLA_FFI_Error* PallasiteClear(XLA_FFI_CallFrame*);
bool pallasite_runs(const char* name);
}

struct XLA_FFI_Error {
  std::string message;
};

// A pool of threads: what a call's context is here.
struct XLA_FFI_ExecutionContext {
 public:
  explicit XLA_FFI_ExecutionContext(int num_threads) {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~XLA_FFI_ExecutionContext() {
    {
      const std::lock_guard lock(mutex_);
      is_closed_ = true;
    }
    has_changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }

  void schedule(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    has_changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      has_changed_.wait(lock, [this] { return is_closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_changed_;
  std::deque<std::function<void()>> tasks_;
  bool is_closed_ = false;
  std::vector<std::thread> threads_;
};

namespace check {

using Pool = XLA_FFI_ExecutionContext;

struct Half {
  uint16_t bits;
};

template <typename T>
constexpr XLA_FFI_DataType kType = XLA_FFI_DataType_INVALID;
template <>
inline constexpr XLA_FFI_DataType kType<float> = XLA_FFI_DataType_F32;
template <>
inline constexpr XLA_FFI_DataType kType<Half> = XLA_FFI_DataType_F16;
template <>
inline constexpr XLA_FFI_DataType kType<uint8_t> = XLA_FFI_DataType_U8;
template <>
inline constexpr XLA_FFI_DataType kType<int8_t> = XLA_FFI_DataType_S8;
template <>
inline constexpr XLA_FFI_DataType kType<uint16_t> = XLA_FFI_DataType_U16;
template <>
inline constexpr XLA_FFI_DataType kType<int32_t> = XLA_FFI_DataType_S32;

// What a call is given, or gives, under a name that a fault can be made by. Who makes it owns the
// memory, which is a vector's: exactly as large as what is in it.
struct Buffer {
  std::string name;
  XLA_FFI_DataType type;
  std::vector<int64_t> shape;
  void* data;
};

template <typename T>
Buffer view(const std::string& name, std::vector<T>& values, std::vector<int64_t> shape) {
  return {name, kType<T>, std::move(shape), values.data()};
}

using Attribute = std::variant<bool, int32_t, float, std::string>;

struct Invocation {
  XLA_FFI_Handler* handler;
  std::vector<Buffer> arguments;
  std::vector<Buffer> results;
  std::map<std::string, Attribute> attributes;
};

// Calls the handler; returns the message of its error, nothing where there is none.
std::string call(Invocation invocation, Pool& pool);

}  // namespace check

#endif  // PALLASITE_TESTS_HOST_H_
