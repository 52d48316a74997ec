// Sixteen lanes in pairs of AVX2's registers. Included within a namespace of its own; the names are
// those of simd_avx512.h.

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
using Bytes = Ints;

constexpr int kMaxRows = 3;
constexpr int32_t kByteZero = 0;

PALLASITE_INLINE Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PALLASITE_INLINE Floats zeros() { return splat(0.0f); }
PALLASITE_INLINE Floats load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
PALLASITE_INLINE void store(float* out, Floats x) {
  _mm256_storeu_ps(out, x.low);
  _mm256_storeu_ps(out + 8, x.high);
}
PALLASITE_INLINE void store_away(float* out, Floats x) {
  _mm256_stream_ps(out, x.low);
  _mm256_stream_ps(out + 8, x.high);
}
PALLASITE_INLINE void finish_stores() { _mm_sfence(); }
PALLASITE_INLINE Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats sub(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats mul(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats div(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
PALLASITE_INLINE Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
PALLASITE_INLINE Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
PALLASITE_INLINE float total(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
PALLASITE_INLINE float largest(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
PALLASITE_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// In two steps, each of which an exponent of f32 holds.
PALLASITE_INLINE __m256 scale_half(__m256 x, __m256 n) {
  const __m256 half = _mm256_floor_ps(_mm256_mul_ps(n, _mm256_set1_ps(0.5f)));
  return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_ps(n, half)));
}
PALLASITE_INLINE Floats scale_by_power(Floats x, Floats n) {
  return {scale_half(x.low, n.low), scale_half(x.high, n.high)};
}
PALLASITE_INLINE Floats round_to_whole(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
PALLASITE_INLINE Floats load_float16(const uint16_t* x) {
  const auto* halves = reinterpret_cast<const __m128i*>(x);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
PALLASITE_INLINE Floats load_int8(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
PALLASITE_INLINE __m256i rounded_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
PALLASITE_INLINE void store_bfloat16(uint16_t* out, Floats x) {
  // Packing goes by halves of a register.
  const __m256i packed = _mm256_packus_epi32(rounded_bits(x.low), rounded_bits(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}
// The same for what only `dot_bfloat16` reads.
PALLASITE_INLINE void store_for_dot(uint16_t* out, Floats x) { store_bfloat16(out, x); }
PALLASITE_INLINE Ints to_ints(Floats x) {
  return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}
PALLASITE_INLINE Floats to_floats(Ints x) {
  return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)};
}
PALLASITE_INLINE Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PALLASITE_INLINE Ints add_ints(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
PALLASITE_INLINE void store_int8(int8_t* out, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
PALLASITE_INLINE int32_t total(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
PALLASITE_INLINE void largest_of_four(const Floats (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
}
PALLASITE_INLINE void totals_of_four(const Floats (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(x[i]);
}
PALLASITE_INLINE void totals_of_four(const Ints (&x)[4], int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(x[i]);
}
PALLASITE_INLINE Ints part_of_words(const uint8_t* words, int32_t shift, int32_t mask) {
  const auto* halves = reinterpret_cast<const __m256i*>(words);
  const __m128i count = _mm_cvtsi32_si128(shift);
  const __m256i kept = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256(halves), count), kept),
          _mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256(halves + 1), count), kept)};
}
PALLASITE_INLINE Bytes load_bytes(const uint8_t* x) {
  const auto* halves = reinterpret_cast<const __m256i*>(x);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
PALLASITE_INLINE void store_bytes(uint8_t* out, Bytes x) {
  auto* halves = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(halves, x.low);
  _mm256_storeu_si256(halves + 1, x.high);
}
PALLASITE_INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
PALLASITE_INLINE Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)});
}

PALLASITE_INLINE int32_t load_word(const void* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof(word));
  return word;
}

PALLASITE_INLINE __m256i spread(const int8_t* x) { return _mm256_set1_epi32(load_word(x)); }
PALLASITE_INLINE Ints dot_nibbles(Ints sums, Bytes codes, __m256i word) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.low, word), ones);
  const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.high, word), ones);
  return add_ints(sums, {low, high});
}

// Sixteen bits do not hold a sum of two products of these bytes, so they are widened first.
PALLASITE_INLINE __m256i dot_wide(__m256i values, __m256i even, __m256i odd) {
  const __m256i evens = _mm256_srai_epi16(_mm256_slli_epi16(values, 8), 8);
  return _mm256_add_epi32(_mm256_madd_epi16(evens, even),
                          _mm256_madd_epi16(_mm256_srai_epi16(values, 8), odd));
}

PALLASITE_INLINE Ints dot_bytes(Ints sums, Bytes codes, const int8_t* x) {
  const __m256i word = _mm256_set1_epi32(load_word(x));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8);
  const __m256i odd = _mm256_srai_epi16(word, 8);
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  return add_ints(sums, {dot_wide(_mm256_xor_si256(codes.low, flip), even, odd),
                         dot_wide(_mm256_xor_si256(codes.high, flip), even, odd)});
}

PALLASITE_INLINE Floats dot_bfloat16(Floats sums, Bytes weights, const uint16_t* x) {
  const __m256i pair = _mm256_set1_epi32(load_word(x));
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
  const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(pair, mask));
  sums = fma({_mm256_castsi256_ps(_mm256_slli_epi32(weights.low, 16)),
              _mm256_castsi256_ps(_mm256_slli_epi32(weights.high, 16))},
             {first, first}, sums);
  return fma({_mm256_castsi256_ps(_mm256_and_si256(weights.low, mask)),
              _mm256_castsi256_ps(_mm256_and_si256(weights.high, mask))},
             {second, second}, sums);
}

// Writes out[c][r] = rows[r][c] for 8 rows of 8 words.
PALLASITE_INLINE void transpose_eight(const uint32_t* rows, int64_t stride, uint32_t* out) {
  __m256 a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows + r * stride));
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    float* to = reinterpret_cast<float*>(out);
    _mm256_storeu_ps(to + 16 * c, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + 16 * (4 + c), _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

PALLASITE_INLINE void transpose_words(const uint32_t* rows, int64_t stride, uint32_t* out) {
  for (int r = 0; r < 16; r += 8) {
    for (int c = 0; c < 16; c += 8) {
      transpose_eight(rows + r * stride + c, stride, out + c * 16 + r);
    }
  }
}

PALLASITE_INLINE void interleave_halves(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  const __m256i low = _mm256_unpacklo_epi16(first, second);
  const __m256i high = _mm256_unpackhi_epi16(first, second);
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

PALLASITE_INLINE Floats select_lanes(Floats x, float other, int64_t begin, int64_t end) {
  alignas(32) float lanes[16];
  store(lanes, x);
  for (int64_t i = 0; i < 16; ++i) lanes[i] = i >= begin && i < end ? lanes[i] : other;
  return load(lanes);
}
