// The largest value of a row, and where it stands first. Included within a namespace of its own,
// after simd_*.h.

// Values that stay in the first-level cache while the largest of them is looked for.
constexpr int64_t kPeakBlock = 512;

// Returns the index of the first value that equals `value`; 0 where none does.
PALLASITE_INLINE int64_t first_equal(const float* values, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i) {
    if (values[i] == value) return i;
  }
  return 0;
}

// One pass: of each block the largest value is found, and only in the first block that has the
// largest of all is its place looked for.
Peak find_peak(const float* values, int64_t size) {
  constexpr int kStreams = 4;
  constexpr float kLowest = -3.402823466e+38f, kInfinity = __builtin_inff();
  const Floats lowest = splat(kLowest), zero = zeros();
  // Each stays 0 until it meets NaN or infinity. The order of the arguments keeps NaNs.
  Floats checks[kStreams] = {zero, zero, zero, zero};
  const auto check = [&](Floats x, Floats sum) PALLASITE_LAMBDA {
    return fma(max(lowest, x), zero, sum);
  };
  float best = -kInfinity;
  int64_t best_begin = 0, best_size = 0;
  for (int64_t begin = 0; begin < size; begin += kPeakBlock) {
    const float* block = values + begin;
    const int64_t block_size = size - begin < kPeakBlock ? size - begin : kPeakBlock;
    Floats tops[kStreams];
    for (Floats& top : tops) top = splat(-kInfinity);
    int64_t i = 0;
    for (; i + kStreams * kLanes <= block_size; i += kStreams * kLanes) {
#pragma GCC unroll 4
      for (int stream = 0; stream < kStreams; ++stream) {
        const Floats x = load(block + i + stream * kLanes);
        // This order drops NaNs, where the processor has them dropped at all.
        tops[stream] = max(x, tops[stream]);
        checks[stream] = check(x, checks[stream]);
      }
    }
    for (; i < block_size; i += kLanes) {
      float rest[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        rest[lane] = i + lane < block_size ? block[i + lane] : -kInfinity;
      }
      const Floats x = load(rest);
      tops[0] = max(x, tops[0]);
      checks[0] = check(x, checks[0]);
    }
    const float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    if (top > best || begin == 0) {
      best = top;
      best_begin = begin;
      best_size = block_size;
    }
  }
  const float sum = total(add(add(checks[0], checks[1]), add(checks[2], checks[3])));
  const int64_t index = best_begin + first_equal(values + best_begin, best_size, best);
  return {best, static_cast<int32_t>(index), sum == 0};
}
