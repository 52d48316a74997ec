#include "choose.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace pallasite {

#if defined(__x86_64__)
namespace avx512_vnni {
extern const Bodies kBodies;
}
namespace avx512 {
extern const Bodies kBodies;
}
namespace avx2 {
extern const Bodies kBodies;
}
#elif defined(__aarch64__)
namespace neon {
extern const Bodies kBodies;
}
#endif

namespace {

// Returns the best of those that run here and that `is_wanted` takes.
template <typename IsWanted>
Choice find(const IsWanted& is_wanted) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16");
  if (has_vnni && is_wanted("avx512-vnni")) return {"avx512-vnni", &avx512_vnni::kBodies};
  if (has_avx512 && is_wanted("avx512")) return {"avx512", &avx512::kBodies};
  if (has_avx2 && is_wanted("avx2")) return {"avx2", &avx2::kBodies};
#elif defined(__linux__) && defined(__aarch64__)
  const bool has_dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  if (has_dot && is_wanted("neon")) return {"neon", &neon::kBodies};
#elif defined(__APPLE__) && defined(__aarch64__)
  if (is_wanted("neon")) return {"neon", &neon::kBodies};
#endif
  return {"", nullptr};
}

}  // namespace

Choice choose() {
  static const Choice best = find([](std::string_view) { return true; });
  return best;
}

Choice choose(std::string_view name) {
  if (const Choice best = choose(); name == best.name) return best;
  return find([name](std::string_view own) { return own == name; });
}

}  // namespace pallasite

extern "C" {

// The name of the best bodies that run here; empty where none does.
const char* pallasite_instructions() { return pallasite::choose().name; }

// Whether bodies of that name run here.
bool pallasite_runs(const char* name) { return pallasite::choose(name).bodies != nullptr; }
}
