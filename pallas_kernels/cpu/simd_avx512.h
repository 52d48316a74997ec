// Sixteen lanes in the registers of AVX-512: with VNNI where PALLASITE_VNNI is defined, and with
// BF16 where PALLASITE_BF16 is. Included within a namespace of its own; see bodies.h for the names.

// A strip is one register: what uses that has bodies of its own.
#define PALLASITE_WIDE

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

// Rows of x that a tile of products takes at once: two sums for each stay in registers.
constexpr int kMaxRows = 12;

PALLASITE_INLINE Floats zeros() { return _mm512_setzero_ps(); }
PALLASITE_INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
PALLASITE_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
PALLASITE_INLINE void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
// Stores a whole line of memory past the caches; `finish_stores` makes it seen by other threads.
PALLASITE_INLINE void store_away(float* out, Floats x) { _mm512_stream_ps(out, x); }
PALLASITE_INLINE void finish_stores() { _mm_sfence(); }
PALLASITE_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
PALLASITE_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
PALLASITE_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
PALLASITE_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
PALLASITE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
PALLASITE_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
PALLASITE_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
PALLASITE_INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
PALLASITE_INLINE float total(Floats a) { return _mm512_reduce_add_ps(a); }
PALLASITE_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a); }
// x times two to the power of n, n a whole number.
PALLASITE_INLINE Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
PALLASITE_INLINE Floats round_to_whole(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PALLASITE_INLINE Floats load_float16(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
PALLASITE_INLINE Floats load_bfloat16(const uint16_t* x) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
PALLASITE_INLINE Floats load_int8(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
// Rounds to the nearest, ties to even; NaNs stay NaNs.
PALLASITE_INLINE void store_bfloat16(uint16_t* out, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// The same for what only `dot_bfloat16` reads, which takes numbers below the normal ones as zeros.
PALLASITE_INLINE void store_for_dot(uint16_t* out, Floats x) {
#if defined(PALLASITE_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
#else
  store_bfloat16(out, x);
#endif
}
PALLASITE_INLINE Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
PALLASITE_INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
PALLASITE_INLINE Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
PALLASITE_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
PALLASITE_INLINE void store_int8(int8_t* out, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
}
PALLASITE_INLINE int32_t total(Ints x) { return _mm512_reduce_add_epi32(x); }
// The largest lane of each of four, and the sum of each: together they cost half as much.
PALLASITE_INLINE void largest_of_four(const Floats (&x)[4], float* out) {
  const __m512 a = max(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = max(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 four = max(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
PALLASITE_INLINE void totals_of_four(const Floats (&x)[4], float* out) {
  const __m512 a = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 four = add(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
PALLASITE_INLINE void totals_of_four(const Ints (&x)[4], int32_t* out) {
  const __m512i a =
      add_ints(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  const __m512i b =
      add_ints(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  const __m512i four = add_ints(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
#if defined(PALLASITE_BF16)
PALLASITE_INLINE uint32_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
PALLASITE_INLINE Floats replace_zeros(Floats x, float by) {
  // Of the eight classes of numbers, all but zeros are taken from x.
  return _mm512_fixupimm_ps(splat(by), x, _mm512_set1_epi32(0x11111011), 0);
}
// One over x, to 14 bits.
PALLASITE_INLINE Floats inverse(Floats x) { return _mm512_rcp14_ps(x); }
// Each as bfloat16, the nearest, in the low half of its word. NaNs may become any number.
PALLASITE_INLINE Ints low_halves(Floats x) {
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)), 16);
}
// Adds the `bits` of each word times the upper one of a pair, and `halves` times the lower one.
PALLASITE_INLINE Floats dot_bits(Floats sums, const uint8_t* words, uint32_t bits, Ints halves,
                                 uint32_t pair) {
  const Ints own = _mm512_and_si512(_mm512_loadu_si512(words), splat_int(static_cast<int>(bits)));
  const Ints pairs = _mm512_or_si512(_mm512_castps_si512(_mm512_cvtepu32_ps(own)), halves);
  return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)splat_int(static_cast<int>(pair)));
}
#endif
// The largest of some numbers, and the second largest.
struct Tops {
  Floats first, second;
};
PALLASITE_INLINE Tops join(const Tops& a, const Tops& b) {
  return {max(a.first, b.first), max(min(a.first, b.first), max(a.second, b.second))};
}
PALLASITE_INLINE Floats unpack_pairs_low(Floats a, Floats b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
PALLASITE_INLINE Floats unpack_pairs_high(Floats a, Floats b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
// Of all lanes of each of four, in the order of the four.
PALLASITE_INLINE void tops_of_four(const Tops (&x)[4], __m128& largest, __m128& second_largest) {
  Tops pairs[2];
  for (int i = 0; i < 2; ++i) {
    const Tops &a = x[2 * i], &b = x[2 * i + 1];
    pairs[i] = join(
        {_mm512_unpacklo_ps(a.first, b.first), _mm512_unpacklo_ps(a.second, b.second)},
        {_mm512_unpackhi_ps(a.first, b.first), _mm512_unpackhi_ps(a.second, b.second)});
  }
  const Tops all = join({unpack_pairs_low(pairs[0].first, pairs[1].first),
                         unpack_pairs_low(pairs[0].second, pairs[1].second)},
                        {unpack_pairs_high(pairs[0].first, pairs[1].first),
                         unpack_pairs_high(pairs[0].second, pairs[1].second)});
  const __m256 a = _mm512_castps512_ps256(all.first), b = _mm512_extractf32x8_ps(all.first, 1);
  const __m256 first = _mm256_max_ps(a, b);
  const __m256 others = _mm256_max_ps(_mm512_castps512_ps256(all.second),
                                      _mm512_extractf32x8_ps(all.second, 1));
  const __m256 second = _mm256_max_ps(_mm256_min_ps(a, b), others);
  const __m128 c = _mm256_castps256_ps128(first), d = _mm256_extractf128_ps(first, 1);
  largest = _mm_max_ps(c, d);
  second_largest = _mm_max_ps(
      _mm_min_ps(c, d),
      _mm_max_ps(_mm256_castps256_ps128(second), _mm256_extractf128_ps(second, 1)));
}
// Takes from each of four times 32 floats, sixteen in `a` and sixteen in `b`, the first of the largest
// magnitude: leaves there what it is more than `kept`, says where that is, and gives the largest
// magnitude of what is left, NaN where any float is.
PALLASITE_INLINE void take_largest(Floats (&a)[4], Floats (&b)[4], float* kept, int32_t* places,
                                   float* left) {
  Tops each[4];
  for (int i = 0; i < 4; ++i) {
    const Floats low = abs(a[i]), high = abs(b[i]);
    each[i] = {max(low, high), min(low, high)};
  }
  __m128 largest, second_largest;
  tops_of_four(each, largest, second_largest);
#if defined(PALLASITE_BF16)
  // Rounded to bfloat16: the rest is rounded with the other floats.
  const __m128i bits = _mm_castps_si128(largest);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i up = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
  const __m128 taken = _mm_castsi128_ps(_mm_slli_epi32(_mm_srli_epi32(up, 16), 16));
  const __m128 rest = _mm_sub_ps(largest, taken);
  _mm_storeu_ps(left, _mm_max_ps(second_largest, _mm_andnot_ps(_mm_set1_ps(-0.0f), rest)));
#else
  const __m128 taken = largest, rest = _mm_setzero_ps();
  _mm_storeu_ps(left, second_largest);
#endif
  alignas(16) float tops[4], magnitudes[4], rests[4];
  _mm_store_ps(tops, largest);
  _mm_store_ps(magnitudes, taken);
  _mm_store_ps(rests, rest);
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  for (int i = 0; i < 4; ++i) {
    if (_mm512_cmp_ps_mask(a[i], b[i], _CMP_UNORD_Q) != 0) left[i] = __builtin_nanf("");
    const Floats top = splat(tops[i]);
    const __m512i own = _mm512_castps_si512(splat(rests[i]));
    const uint32_t low = _mm512_cmp_ps_mask(abs(a[i]), top, _CMP_EQ_OQ);
    const uint32_t high = _mm512_cmp_ps_mask(abs(b[i]), top, _CMP_EQ_OQ);
    const uint32_t signs = _mm512_movepi32_mask(_mm512_castps_si512(a[i])) |
                           static_cast<uint32_t>(_mm512_movepi32_mask(_mm512_castps_si512(b[i]))) << 16;
    // Where none is equal, as among NaNs, it is the last.
    const uint32_t equal = low | high << 16 | 1u << 31;
    const uint32_t first = equal & -equal;
    const auto take = [&](Floats x, uint32_t mask) PALLASITE_LAMBDA {
      return _mm512_castsi512_ps(_mm512_mask_ternarylogic_epi32(
          _mm512_castps_si512(x), static_cast<__mmask16>(mask), sign, own, 0x6a));
    };
    a[i] = take(a[i], first);
    b[i] = take(b[i], first >> 16);
    places[i] = __builtin_ctz(equal);
    kept[i] = (signs & first) != 0 ? -magnitudes[i] : magnitudes[i];
  }
}
// Each word of 64 bytes, shifted down and masked.
PALLASITE_INLINE Ints part_of_words(const uint8_t* words, int32_t shift, int32_t mask) {
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(words), splat_int(shift)),
                          splat_int(mask));
}
PALLASITE_INLINE Bytes load_bytes(const uint8_t* x) { return _mm512_loadu_si512(x); }
PALLASITE_INLINE void store_bytes(uint8_t* out, Bytes x) { _mm512_storeu_si512(out, x); }
PALLASITE_INLINE Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
PALLASITE_INLINE Bytes high_nibbles(Bytes x) {
  return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}

PALLASITE_INLINE int32_t load_word(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof(word));
  return word;
}

// Four bytes of x, in each lane.
PALLASITE_INLINE Bytes spread(const int8_t* x) { return _mm512_set1_epi32(load_word(x)); }
// Adds to each lane its four bytes of `codes`, each below 16, times the four of x.
PALLASITE_INLINE Ints dot_nibbles(Ints sums, Bytes codes, Bytes word) {
#if defined(PALLASITE_VNNI)
  return _mm512_dpbusd_epi32(sums, codes, word);
#else
  const __m512i pairs = _mm512_maddubs_epi16(codes, word);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

#if defined(PALLASITE_VNNI)
// What a byte that stands for 0 holds, as `dot_bytes` sees it.
constexpr int32_t kByteZero = 128;
// The same for bytes of any value.
PALLASITE_INLINE Ints dot_bytes(Ints sums, Bytes codes, const int8_t* x) {
  return _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(load_word(x)));
}
#else
constexpr int32_t kByteZero = 0;
PALLASITE_INLINE Ints dot_bytes(Ints sums, Bytes codes, const int8_t* x) {
  // Sixteen bits do not hold a sum of two products of these bytes, so they are widened first.
  const __m512i word = _mm512_set1_epi32(load_word(x));
  const __m512i values = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
  const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8),
                                         _mm512_srai_epi16(_mm512_slli_epi16(word, 8), 8));
  const __m512i odd =
      _mm512_madd_epi16(_mm512_srai_epi16(values, 8), _mm512_srai_epi16(word, 8));
  return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
}
#endif

// Adds to each lane its pair of bfloat16 weights times the pair of x.
PALLASITE_INLINE Floats dot_bfloat16(Floats sums, Bytes weights, const uint16_t* x) {
  const __m512i pair = _mm512_set1_epi32(load_word(reinterpret_cast<const int8_t*>(x)));
#if defined(PALLASITE_BF16)
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)pair);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  sums = fma(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)),
             _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), sums);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(weights, high)),
             _mm512_castsi512_ps(_mm512_and_si512(pair, high)), sums);
#endif
}

// Calls use(c, column c) for all columns of 16 rows of 16 words, each row `stride` words after the
// last.
template <typename Use>
PALLASITE_INLINE void for_columns(const uint32_t* rows, int64_t stride, const Use& use) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows + r * stride);
  // Pairs of rows, then pairs of pairs, within each quarter of a register.
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[4 i + c] has columns c, 4 + c, 8 + c, 12 + c of rows 4 i to 4 i + 3, a quarter each.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i first = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i second = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i third = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i fourth = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    use(c, _mm512_shuffle_i32x4(first, third, 0x88));
    use(8 + c, _mm512_shuffle_i32x4(first, third, 0xdd));
    use(4 + c, _mm512_shuffle_i32x4(second, fourth, 0x88));
    use(12 + c, _mm512_shuffle_i32x4(second, fourth, 0xdd));
  }
}
// Writes out[c][r] = rows[r][c].
PALLASITE_INLINE void transpose_words(const uint32_t* rows, int64_t stride, uint32_t* out) {
  for_columns(rows, stride,
              [out](int c, Bytes column) PALLASITE_LAMBDA { _mm512_storeu_si512(out + 16 * c, column); });
}

// Sixteen pairs (a[i], b[i]).
PALLASITE_INLINE Bytes interleaved_halves(const uint16_t* a, const uint16_t* b) {
  const __m512i order = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
      3, 34, 2, 33, 1, 32, 0);
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(first), order,
                                   _mm512_castsi256_si512(second));
}
PALLASITE_INLINE void interleave_halves(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  _mm512_storeu_si512(out, interleaved_halves(a, b));
}

// x in the lanes [begin, end), `other` in the rest.
PALLASITE_INLINE Floats select_lanes(Floats x, float other, int64_t begin, int64_t end) {
  const uint32_t below_end = end >= 16 ? 0xffff : (1u << (end < 0 ? 0 : end)) - 1;
  const uint32_t below_begin = begin >= 16 ? 0xffff : (1u << (begin < 0 ? 0 : begin)) - 1;
  const __mmask16 kept = static_cast<__mmask16>(below_end & ~below_begin);
  return _mm512_mask_blend_ps(kept, splat(other), x);
}
