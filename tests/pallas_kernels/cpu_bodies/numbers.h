// Random choices of a case, and numbers of sixteen bits.

#ifndef PALLASITE_TESTS_NUMBERS_H_
#define PALLASITE_TESTS_NUMBERS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "host.h"

namespace check {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What a wrong answer is: who runs a case says which it was.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // From `least` to `most`, both included.
  int64_t whole(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(engine_);
  }
  // The same, but small numbers are as likely as large ones: evenly by their logarithms.
  int64_t any_size(int64_t least, int64_t most) {
    const double low = std::log(static_cast<double>(least));
    const double high = std::log(static_cast<double>(most) + 0.999);
    const double drawn = std::exp(std::uniform_real_distribution<double>(low, high)(engine_));
    return std::min(std::max(static_cast<int64_t>(drawn), least), most);
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  float between(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  template <typename T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[whole(0, static_cast<int64_t>(all.size()) - 1)];
  }
  std::vector<float> normals(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal();
    return values;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline double from_bfloat16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

// To the nearest, ties to even. Of finite numbers.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of a positive or negative normal number of float16.
inline double from_half(Half half) {
  const int exponent = half.bits >> 10 & 31;
  const double size = std::ldexp(1024 + (half.bits & 1023), exponent - 25);
  return half.bits >> 15 ? -size : size;
}

inline double value_of(float x) { return x; }
inline double value_of(Half x) { return from_half(x); }

}  // namespace check

#endif  // PALLASITE_TESTS_NUMBERS_H_
