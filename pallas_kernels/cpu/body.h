// Compiles all kernels for one instruction set; a body_*.cc says which.
//
// The standard headers come first: what they define inline must not be compiled for instructions
// that the processor may lack, since the linker keeps one copy of it for all.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bodies.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(PALLASITE_TARGET))), apply_to = function)
#else
#define PALLASITE_PRAGMA(text) _Pragma(#text)
#define PALLASITE_GCC_TARGET(features) PALLASITE_PRAGMA(GCC target(features))
#pragma GCC push_options
PALLASITE_GCC_TARGET(PALLASITE_TARGET)
#endif

#define PALLASITE_INLINE inline __attribute__((always_inline))
#define PALLASITE_LAMBDA __attribute__((always_inline))

namespace pallasite {
namespace PALLASITE_NAMESPACE {
namespace {

template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

// Compiled for these instructions alone, so no other body may be linked in their place.
#include PALLASITE_SIMD
#include "elementary.h"
#include "groups.h"
#include "rounding.h"
#include "products.h"
#include "strip_pairs.h"
#include "attention_block.h"
#include "attention_pages.h"
#include "softmax.h"
#if defined(PALLASITE_WIDE)
#include "attention_query.h"
#endif
#include "attention.h"
#include "peaks.h"
}  // namespace

extern const Bodies kBodies;
const Bodies kBodies = {kMaxRows >= kFewestFetchingRows,
                        round_rows,
                        multiply,
                        write_rows,
                        attend_scratch,
                        attend,
                        merge,
                        find_peak};

}  // namespace PALLASITE_NAMESPACE
}  // namespace pallasite

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
