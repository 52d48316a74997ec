// A large array of zeros: a custom call that asks for large pages before it touches any.
//
// A step walks through the whole cache, some kilobytes here and there. In pages of 4 KiB each of
// them waits for its address first.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"

namespace pallasite {
namespace {

constexpr size_t kLargePage = 2 << 20;

// Has the system back memory by large pages, where it does that and they lie wholly within.
void prefer_large_pages(std::byte* begin, size_t size) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const size_t before = (kLargePage - address % kLargePage) % kLargePage;
  if (size < before + kLargePage) return;
  const size_t whole = (size - before) / kLargePage * kLargePage;
  // Where this fails, pages are small: no other harm is done.
  (void)madvise(begin + before, whole, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)size;
#endif
}

ffi::Error clear(ffi::ThreadPool pool, ffi::Result<ffi::AnyBuffer> out) {
  const auto begin = static_cast<std::byte*>(out->untyped_data());
  const size_t size = out->size_bytes();
  prefer_large_pages(begin, size);
  Call call(pool);
  call.run(static_cast<int64_t>((size + kLargePage - 1) / kLargePage), [&](int64_t chunk) {
    const size_t first = static_cast<size_t>(chunk) * kLargePage;
    std::memset(begin + first, 0, std::min(kLargePage, size - first));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallasite

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasiteClear, pallasite::clear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::AnyBuffer>());
