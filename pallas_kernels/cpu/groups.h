// A group of 32 inputs and its products with the codes of a strip. Included within a namespace of its
// own, after its simd_*.h.

// How far ahead the codes of a strip are fetched. A strip is read once from memory, in order.
constexpr int64_t kPrefetchBytes = 4096;

PALLASITE_INLINE void prefetch(const void* address, int64_t bytes_ahead = kPrefetchBytes) {
  __builtin_prefetch(static_cast<const std::byte*>(address) + bytes_ahead);
}

template <bool kHalfScales>
PALLASITE_INLINE Floats load_scales(const void* scales, int64_t group) {
  if constexpr (kHalfScales) {
    const uint16_t* at = static_cast<const uint16_t*>(scales) + group * kLanes;
    prefetch(at, kPrefetchBytes / 8);
    return load_float16(at);
  } else {
    const float* at = static_cast<const float*>(scales) + group * kLanes;
    prefetch(at, kPrefetchBytes / 4);
    return load(at);
  }
}

// Where an input of a group lies in a strip: in which of its vectors, and how far up in the words.
struct Spot {
  int32_t offset;
  int32_t shift;
  float unit;  // two to the power of -shift
};
template <bool kIsNibbles>
struct Spots {
  Spot of[kGroup];
  constexpr Spots() : of{} {
    for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t shift = i % 4 * 8 + (kIsNibbles ? i / 16 * 4 : 0);
      of[i] = {(kIsNibbles ? i % 16 : i) / 4 * 64, shift, 1.0f / static_cast<float>(1u << shift)};
    }
  }
};
template <bool kIsNibbles>
constexpr Spots<kIsNibbles> kSpots;

// What a strip's group has beside its codes, and sums with a group's products of nibbles added:
//   scales * (dots * the group's scale + kept * its largest) + minimums * its sum,
// where `kept` are the codes that are multiplied with its largest.
#if defined(PALLASITE_BF16)
// Here one dot of pairs of bfloat16 does what takes two products of floats:
//   scales * (dots * scale - 8 * sum + (kept * largest + ratios * sum)), ratios = minimums / scales + 8.
// A code's middle, 8, is counted in f32, and leaves bfloat16 little to round: weights about zero have
// minimums of about -8 scales.
// Of a group without a scale, which is its minimum: it leaves the codes next to no weight.
constexpr float kLeastScale = 0x1p-60f;

struct Terms {
  Floats scales;
  Ints ratios;  // bfloat16 in the low half of each word
};

template <bool kIsNibbles, bool kHalfScales>
PALLASITE_INLINE Terms load_terms(const Matrix& matrix, int64_t at) {
  const Floats scales = load_scales<kHalfScales>(matrix.scales, at);
  if constexpr (!kIsNibbles) return {scales, splat_int(0)};
  const Floats some = replace_zeros(scales, kLeastScale);
  const Floats minimums = load_scales<kHalfScales>(matrix.minimums, at);
  return {some, low_halves(fma(minimums, inverse(some), splat(8.0f)))};
}

// Prepares what `add_nibbles` takes of a group: as a pair the sum, and above it the largest, over what
// its codes are multiples of where all other bits of their words are cleared. A largest below 2^-98
// may so become zero.
PALLASITE_INLINE void prepare_pair(Group& group) {
  const Spot& spot = kSpots<true>.of[group.place];
  group.pair = bfloat16_bits(group.sum) | bfloat16_bits(group.largest * spot.unit) << 16;
  group.middle = -8.0f * group.sum;
  group.offset = spot.offset;
  group.mask = 15u << spot.shift;
}

PALLASITE_INLINE Floats add_nibbles(Ints dots, const uint8_t* words, const Terms& terms,
                                    const Group& group, Floats sums) {
  const Floats own = fma(to_floats(dots), splat(group.scale), splat(group.middle));
  return fma(dot_bits(own, words + group.offset, group.mask, terms.ratios, group.pair),
             terms.scales, sums);
}
#else

struct Terms {
  Floats scales;
  Floats minimums;
};

template <bool kIsNibbles, bool kHalfScales>
PALLASITE_INLINE Terms load_terms(const Matrix& matrix, int64_t at) {
  const Floats scales = load_scales<kHalfScales>(matrix.scales, at);
  if constexpr (!kIsNibbles) return {scales, scales};
  return {scales, load_scales<kHalfScales>(matrix.minimums, at)};
}

PALLASITE_INLINE void prepare_pair(Group&) {}

PALLASITE_INLINE Floats add_nibbles(Ints dots, const uint8_t* words, const Terms& terms,
                                    const Group& group, Floats sums) {
  const Spot& spot = kSpots<true>.of[group.place];
  const Floats kept = to_floats(part_of_words(words + spot.offset, spot.shift, 15));
  const Floats others = mul(to_floats(dots), splat(group.scale));
  return fma(terms.minimums, splat(group.sum),
             fma(fma(kept, splat(group.largest), others), terms.scales, sums));
}
#endif
