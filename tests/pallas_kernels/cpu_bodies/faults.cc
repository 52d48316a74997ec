#include "faults.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace check {
namespace {

size_t item_size(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_S32:
      return 4;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_U16:
      return 2;
    default:
      return 1;
  }
}

size_t byte_size(const Buffer& buffer) {
  size_t size = item_size(buffer.type);
  for (const int64_t length : buffer.shape) size *= static_cast<size_t>(length);
  return size;
}

std::vector<Buffer> all_buffers(const Invocation& invocation) {
  std::vector<Buffer> all = invocation.arguments;
  all.insert(all.end(), invocation.results.begin(), invocation.results.end());
  return all;
}

}  // namespace

std::byte* Faults::own(size_t size) {
  return memory_.emplace_back(std::make_unique<std::byte[]>(size)).get();
}

// All that have the name: what is written in place is an argument and a result.
void Faults::replace(Invocation& invocation, const std::string& name, const Buffer& buffer) {
  for (auto* buffers : {&invocation.arguments, &invocation.results}) {
    for (Buffer& old : *buffers) {
      if (old.name == name) old = buffer;
    }
  }
}

void Faults::refuse(const std::string& message, const std::function<void(Invocation&)>& change) {
  Invocation invocation = make_();
  change(invocation);
  const std::string error = call(std::move(invocation), pool_);
  memory_.clear();
  if (error.find(message) == std::string::npos) {
    throw Wrong(text("expected the error \"", message, "\", got \"", error, "\""));
  }
  ++num_refused_;
}

void Faults::refuse_numbers(const std::string& message, const std::string& name, size_t first,
                            const std::vector<int32_t>& numbers) {
  refuse(message, [&](Invocation& invocation) {
    for (const Buffer& buffer : all_buffers(invocation)) {
      if (buffer.name != name) continue;
      Buffer changed = buffer;
      changed.data = own(byte_size(buffer));
      std::memcpy(changed.data, buffer.data, byte_size(buffer));
      std::memcpy(static_cast<std::byte*>(changed.data) + first * 4, numbers.data(),
                  numbers.size() * 4);
      replace(invocation, name, changed);
    }
  });
}

void Faults::refuse_each() {
  const Invocation sound = make_();
  for (const Buffer& buffer : all_buffers(sound)) {
    if (item_size(buffer.type) > 1) {
      refuse("got " + buffer.name + " at an address that", [&](Invocation& invocation) {
        Buffer moved = buffer;
        std::byte* const at = own(byte_size(buffer) + 1) + 1;
        if (buffer.data != nullptr) std::memcpy(at, buffer.data, byte_size(buffer));
        moved.data = at;
        replace(invocation, buffer.name, moved);
      });
    }
    refuse("got " + buffer.name + " of a type", [&](Invocation& invocation) {
      Buffer changed = buffer;
      const bool is_truth = buffer.type == XLA_FFI_DataType_PRED;
      changed.type = is_truth ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_PRED;
      replace(invocation, buffer.name, changed);
    });
  }
  refuse("got ", [](Invocation& invocation) { invocation.arguments.pop_back(); });
  for (size_t i = 0; i < sound.results.size(); ++i) {
    refuse("", [&](Invocation& invocation) { invocation.results.resize(i); });
  }
}

void Faults::survive(int num_calls) {
  const auto change_shape = [this](std::vector<int64_t>& shape) {
    const auto last = static_cast<int64_t>(shape.size()) - 1;
    if (shape.empty() || random_.chance(0.1)) {
      shape.push_back(random_.whole(0, 2));
    } else if (random_.chance(0.1)) {
      shape.pop_back();
    } else {
      int64_t& length = shape[static_cast<size_t>(random_.whole(0, last))];
      length = random_.one_of<int64_t>({0, 1, length + 1, std::max<int64_t>(length - 1, 0), 16});
    }
  };
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  const std::vector<Buffer> sound = all_buffers(make_());
  for (int index = 0; index < num_calls; ++index) {
    Invocation invocation = make_();
    const auto& chosen =
        sound[static_cast<size_t>(random_.whole(0, static_cast<int64_t>(sound.size()) - 1))];
    Buffer changed = chosen;
    const bool has_integers = chosen.type == XLA_FFI_DataType_S32;
    if (!has_integers || random_.chance(0.3)) change_shape(changed.shape);
    const size_t size = byte_size(changed), shared = std::min(size, byte_size(chosen));
    changed.data = own(size);
    if (shared > 0) std::memcpy(changed.data, chosen.data, shared);
    if (has_integers) {
      auto* const numbers = static_cast<int32_t*>(changed.data);
      for (size_t i = 0; i < size / 4; ++i) {
        if (!random_.chance(0.2)) continue;
        const auto near = static_cast<int32_t>(random_.whole(-2, 40));
        numbers[i] = random_.one_of<int32_t>({-1, 0, 1, kMost, -kMost - 1, near, near, near});
      }
    }
    replace(invocation, chosen.name, changed);
    num_refused_ += !call(std::move(invocation), pool_).empty();
    memory_.clear();
  }
}

}  // namespace check
