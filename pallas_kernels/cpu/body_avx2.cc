// The bodies for x86-64 with AVX2, FMA and F16C: Intel from Haswell on, AMD from Zen on.

#if defined(__x86_64__)
#define PALLASITE_TARGET "avx2,fma,f16c"
#define PALLASITE_NAMESPACE avx2
#define PALLASITE_SIMD "simd_avx2.h"
#include "body.h"
#endif
