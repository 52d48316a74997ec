#include "host.h"

#include <type_traits>
#include <utility>

namespace check {
namespace {

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->message};
}

void get_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}

void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->ctx->schedule([task = args->task, data = args->data] { task(data); });
  return nullptr;
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->num_threads();
  return nullptr;
}

XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = get_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = count_threads;
  return api;
}

// Buffers as the handler sees them. They point into each other, so they stay where they are made.
struct Seen {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;

  explicit Seen(std::vector<Buffer>& own) {
    for (Buffer& buffer : own) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.type, buffer.data,
                         static_cast<int64_t>(buffer.shape.size()), buffer.shape.data()});
    }
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  }
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;

  int64_t size() const { return static_cast<int64_t>(pointers.size()); }
};

template <typename T>
constexpr XLA_FFI_DataType kScalarType = std::is_same_v<T, bool> ? XLA_FFI_DataType_PRED
                                         : std::is_same_v<T, int32_t>
                                             ? XLA_FFI_DataType_S32
                                             : XLA_FFI_DataType_F32;

}  // namespace

std::string call(Invocation invocation, Pool& pool) {
  static const XLA_FFI_Api api = make_api();
  const Seen arguments(invocation.arguments), results(invocation.results);
  std::vector<XLA_FFI_ArgType> argument_types(arguments.pointers.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.pointers.size(), XLA_FFI_RetType_BUFFER);

  // A map is in order of the names, as a handler expects attributes.
  const size_t num_attributes = invocation.attributes.size();
  std::deque<XLA_FFI_Scalar> scalars;
  std::deque<XLA_FFI_ByteSpan> spans;
  std::vector<XLA_FFI_AttrType> attribute_types;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> attributes;
  for (auto& [name, value] : invocation.attributes) {
    names.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
    std::visit(
        [&](auto& own) {
          using T = std::decay_t<decltype(own)>;
          if constexpr (std::is_same_v<T, std::string>) {
            attribute_types.push_back(XLA_FFI_AttrType_STRING);
            attributes.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{own.data(), own.size()}));
          } else {
            attribute_types.push_back(XLA_FFI_AttrType_SCALAR);
            attributes.push_back(&scalars.emplace_back(XLA_FFI_Scalar{kScalarType<T>, &own}));
          }
        },
        value);
  }

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &pool;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, arguments.size(), argument_types.data(),
                const_cast<void**>(arguments.pointers.data())};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, results.size(), result_types.data(),
                const_cast<void**>(results.pointers.data())};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,   nullptr,      static_cast<int64_t>(num_attributes),
                 attribute_types.data(),      names.data(), attributes.data()};
  XLA_FFI_Error* const error = invocation.handler(&frame);
  if (error == nullptr) return "";
  std::string message = std::move(error->message);
  delete error;
  return message.empty() ? "an error without a message" : message;
}

}  // namespace check
