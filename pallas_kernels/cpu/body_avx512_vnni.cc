// The bodies for x86-64 with AVX-512 VNNI and BF16: Intel from Cooper Lake on, AMD from Zen 4 on.

#if defined(__x86_64__)
#define PALLASITE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
#define PALLASITE_NAMESPACE avx512_vnni
#define PALLASITE_SIMD "simd_avx512.h"
#define PALLASITE_VNNI
#define PALLASITE_BF16
#include "body.h"
#endif
