// The bodies for x86-64 with AVX-512 but no VNNI: Intel Skylake-X.

#if defined(__x86_64__)
#define PALLASITE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define PALLASITE_NAMESPACE avx512
#define PALLASITE_SIMD "simd_avx512.h"
#include "body.h"
#endif
