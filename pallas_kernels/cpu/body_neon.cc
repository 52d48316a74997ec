// The bodies for arm64 with dot products (ARMv8.2): Graviton from 2 on, Apple silicon, Grace.

#if defined(__aarch64__)
#define PALLASITE_TARGET "arch=armv8.2-a+dotprod"
#define PALLASITE_NAMESPACE neon
#define PALLASITE_SIMD "simd_neon.h"
#include "body.h"
#endif
