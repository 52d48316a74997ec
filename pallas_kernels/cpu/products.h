// Products with matrices in strips of sixteen rows, for one instruction set. Included within a
// namespace of its own, after its simd_*.h.
//
// A tile is one strip of a matrix times up to kMaxRows rows of x: each lane is a row of the matrix,
// and the four inputs that an integer dot takes at once are broadcast from x. A group's 32 products
// are summed exactly, as integers; groups are added in f32 in one order, whatever the tile, so a
// row's result does not depend on what it is batched with.

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
};
template <bool kIsNibbles>
struct Spots {
  Spot of[kGroup];
  constexpr Spots() : of{} {
    for (int32_t i = 0; i < kGroup; ++i) {
      of[i] = kIsNibbles ? Spot{i % 16 / 4 * 64, i % 4 * 8 + i / 16 * 4} : Spot{i / 4 * 64, i % 4 * 8};
    }
  }
};
template <bool kIsNibbles>
constexpr Spots<kIsNibbles> kSpots;

// The products of `kRows` rows of x, of one tile, with one strip of integers.
template <int kRows, bool kIsNibbles, bool kHalfScales>
PALLASITE_INLINE void multiply_integers(const Matrix& matrix, int64_t strip, const Rounded& x,
                                        int64_t row, Floats (&sums)[kRows]) {
  constexpr int64_t kVectors = kIsNibbles ? 4 : 8;
  const int64_t num_groups = matrix.num_inputs / kGroup;
  const uint8_t* codes = matrix.values + strip * num_groups * kVectors * 64;
  const Group* groups = x.groups + x.first_group(row);
  const int8_t* values = x.values + x.first_group(row) * kGroup;
  for (int r = 0; r < kRows; ++r) sums[r] = zeros();
  for (int64_t group = 0; group < num_groups; ++group) {
    const uint8_t* words = codes;
    Ints dots[kRows];
    for (int r = 0; r < kRows; ++r) {
      const bool has_zero = !kIsNibbles && kByteZero != 0;
      dots[r] = splat_int(has_zero ? -kByteZero * groups[r].whole_sum : 0);
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVectors; ++j) {
      prefetch(codes);
      const Bytes packed = load_bytes(codes);
      codes += 64;
      if constexpr (kIsNibbles) {
        const Bytes low = low_nibbles(packed), high = high_nibbles(packed);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          dots[r] = dot_nibbles(dots[r], low, values + r * kGroup + 4 * j);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          dots[r] = dot_nibbles(dots[r], high, values + r * kGroup + 16 + 4 * j);
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          dots[r] = dot_bytes(dots[r], packed, values + r * kGroup + 4 * j);
        }
      }
    }
    const Floats own = load_scales<kHalfScales>(matrix.scales, strip * num_groups + group);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Spot& spot = kSpots<kIsNibbles>.of[groups[r].place];
      Ints kept = part_of_words(words + spot.offset, spot.shift, kIsNibbles ? 15 : 255);
      if constexpr (!kIsNibbles) kept = add_ints(kept, splat_int(-128));
      const Floats others = mul(to_floats(dots[r]), splat(groups[r].scale));
      sums[r] = fma(fma(to_floats(kept), splat(groups[r].largest), others), own, sums[r]);
    }
    if constexpr (kIsNibbles) {
      const Floats minimums =
          load_scales<kHalfScales>(matrix.minimums, strip * num_groups + group);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sums[r] = fma(minimums, splat(groups[r].sum), sums[r]);
      }
    }
    values += kTileRows * kGroup;
    groups += kTileRows;
  }
}

// The products of `kRows` rows of bfloat16, `stride` apart, with one strip of pairs.
template <int kRows, bool kFetches>
PALLASITE_INLINE void multiply_pairs(const uint8_t* weights, int64_t num_pairs, const uint16_t* x,
                                     int64_t stride, Floats (&sums)[kRows]) {
  for (int r = 0; r < kRows; ++r) sums[r] = zeros();
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    if constexpr (kFetches) prefetch(weights);
    const Bytes own = load_bytes(weights);
    weights += 64;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sums[r] = dot_bfloat16(sums[r], own, x + r * stride + 2 * pair);
    }
  }
}

template <int kRows>
PALLASITE_INLINE void multiply_strip(const Matrix& matrix, int64_t strip, const Rounded& x,
                                     int64_t row, Floats (&sums)[kRows]) {
  if (matrix.kind == Kind::kBfloat16) {
    const int64_t num_pairs = matrix.num_inputs / 2;
    multiply_pairs<kRows, true>(matrix.values + strip * num_pairs * 64, num_pairs,
                                x.halves + row * x.num_inputs, x.num_inputs, sums);
    return;
  }
  const bool is_nibbles = matrix.kind == Kind::kNibbles;
  if (matrix.has_half_scales) {
    if (is_nibbles) return multiply_integers<kRows, true, true>(matrix, strip, x, row, sums);
    return multiply_integers<kRows, false, true>(matrix, strip, x, row, sums);
  }
  if (is_nibbles) return multiply_integers<kRows, true, false>(matrix, strip, x, row, sums);
  multiply_integers<kRows, false, false>(matrix, strip, x, row, sums);
}

PALLASITE_INLINE Floats activate(Floats x, Activation activation) {
  const Floats one = splat(1.0f);
  Floats exponent = x;
  if (activation == Activation::kGelu) {
    // x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3): the form with tanh.
    const Floats cube = mul(x, mul(x, x));
    exponent = mul(fma(cube, splat(0.044715f), x), splat(1.5957691216057308f));
  }
  return div(x, add(one, exponential(sub(zeros(), exponent))));
}

// One strip for `kRows` rows, from the products to the outputs.
template <int kRows>
void fill_tile(const Product& p, int64_t index, int64_t strip, int64_t row) {
  Floats sums[kRows];
  if (p.is_gated) {
    // Kept in memory: the registers are the next strip's.
    alignas(64) float gates[kRows][kLanes];
    multiply_strip<kRows>(p.matrices[0], strip, p.x, row, sums);
    for (int r = 0; r < kRows; ++r) store(gates[r], sums[r]);
    multiply_strip<kRows>(p.matrices[1], strip, p.x, row, sums);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = mul(activate(load(gates[r]), p.activation), sums[r]);
    }
  } else {
    multiply_strip<kRows>(p.matrices[index], strip, p.x, row, sums);
  }
  int64_t first = strip * kLanes;
  for (int64_t before = 0; before < index; ++before) {
    first += p.matrices[before].num_strips * kLanes;
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = (row + r) * p.num_outputs + first;
    const Floats sum = p.residual == nullptr ? sums[r] : add(sums[r], load(p.residual + at));
    if (p.stores_away) {
      store_away(p.out + at, sum);
    } else {
      store(p.out + at, sum);
    }
  }
}

template <int kRows>
PALLASITE_INLINE void fill_rows(const Product& p, int64_t index, int64_t strip, int64_t& row,
                                int64_t end) {
  if constexpr (kRows <= kMaxRows) {
    for (; row + kRows <= end; row += kRows) fill_tile<kRows>(p, index, strip, row);
  }
}

void multiply(const Product& p, int64_t index, int64_t begin, int64_t end, int64_t row_begin,
              int64_t row_end) {
  for (int64_t strip = begin; strip < end; ++strip) {
    int64_t row = row_begin;
    fill_rows<12>(p, index, strip, row, row_end);
    fill_rows<8>(p, index, strip, row, row_end);
    fill_rows<6>(p, index, strip, row, row_end);
    fill_rows<4>(p, index, strip, row, row_end);
    fill_rows<3>(p, index, strip, row, row_end);
    fill_rows<2>(p, index, strip, row, row_end);
    fill_rows<1>(p, index, strip, row, row_end);
  }
  if (p.stores_away) finish_stores();
}

// Rounds some groups of a row to int8, each with a scale, as `quantize_rows` defines it, but for the
// largest of each. `value` gives sixteen of the row's floats.
template <typename Value>
PALLASITE_INLINE void quantize_groups(const Value& value, const Rounded& to, int64_t at,
                                      int64_t begin, int64_t count) {
  Floats first[4], second[4], most[4];
  for (int64_t i = 0; i < 4; ++i) {
    first[i] = i < count ? value((begin + i) * kGroup) : zeros();
    second[i] = i < count ? value((begin + i) * kGroup + kLanes) : zeros();
    most[i] = max(abs(first[i]), abs(second[i]));
  }
  float largest[4], scales[4], kept[4];
  int32_t places[4], sums[4];
  largest_of_four(most, largest);
  for (int64_t i = 0; i < 4; ++i) {
    places[i] = lane_of(first[i], second[i], largest[i]);
    kept[i] = take_lane(first[i], second[i], places[i]);
    most[i] = max(abs(first[i]), abs(second[i]));
  }
  largest_of_four(most, scales);
  Ints integers[4];
  for (int64_t i = 0; i < count; ++i) {
    scales[i] *= 1.0f / 127;
    const bool is_zero = scales[i] < 1.17549435e-38f;
    const Floats inverse = splat(is_zero ? 0.0f : 1.0f / scales[i]);
    if (is_zero) scales[i] = 0.0f;
    const Ints low = to_ints(mul(first[i], inverse)), high = to_ints(mul(second[i], inverse));
    int8_t* values = to.values + (at + (begin + i) * kTileRows) * kGroup;
    store_int8(values, low);
    store_int8(values + kLanes, high);
    integers[i] = add_ints(low, high);
  }
  for (int64_t i = count; i < 4; ++i) integers[i] = splat_int(0);
  totals_of_four(integers, sums);
  for (int64_t i = 0; i < count; ++i) {
    const float sum = kept[i] + scales[i] * static_cast<float>(sums[i]);
    to.groups[at + (begin + i) * kTileRows] = {scales[i], kept[i], places[i], sum, sums[i]};
  }
}

template <typename Value>
PALLASITE_INLINE void quantize_row(const Value& value, const Rounded& to, int64_t row) {
  const int64_t num_groups = to.num_inputs / kGroup, at = to.first_group(row);
  int64_t group = 0;
  for (; group + 4 <= num_groups; group += 4) quantize_groups(value, to, at, group, 4);
  if (group < num_groups) quantize_groups(value, to, at, group, num_groups - group);
}

template <typename Value>
PALLASITE_INLINE void round_row(const Value& value, bool to_bfloat16, const Rounded& to,
                                int64_t row) {
  if (!to_bfloat16) return quantize_row(value, to, row);
  for (int64_t i = 0; i < to.num_inputs; i += kLanes) {
    store_for_dot(to.halves + row * to.num_inputs + i, value(i));
  }
}

void round_rows(const Rounding& from, const Rounded& to, int64_t begin, int64_t end) {
  const int64_t n = from.num_inputs;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = from.x + row * n;
    if (from.norm == nullptr) {
      round_row([x](int64_t i) PALLASITE_LAMBDA { return load(x + i); }, from.to_bfloat16, to, row);
      continue;
    }
    Floats squares[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats some = load(x + i);
      squares[i / kLanes % 4] = fma(some, some, squares[i / kLanes % 4]);
    }
    const float sum = total(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const Floats factor =
        splat(1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + from.epsilon));
    const float* norm = from.norm;
    const auto normed = [x, norm, factor](int64_t i) PALLASITE_LAMBDA {
      return mul(mul(load(x + i), factor), load(norm + i));
    };
    round_row(normed, from.to_bfloat16, to, row);
  }
}
