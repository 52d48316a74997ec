// Products with matrices in strips of sixteen rows. Included within a namespace of its own, after
// groups.h and elementary.h.
//
// A tile is one strip of a matrix times up to kMaxRows rows of x: each lane is a row of the matrix,
// and the four inputs that an integer dot takes at once are broadcast from x. A group's 32 products
// are summed exactly, as integers; groups are added in f32 in one order, whatever the tile, so a
// row's result does not depend on what it is batched with.

// The products of `kRows` rows of x, of one tile, with one strip of integers.
template <int kRows, bool kIsNibbles, bool kHalfScales>
PALLASITE_INLINE void multiply_integers(const Matrix& matrix, int64_t strip, const Rounded& x,
                                        int64_t row, Floats (&sums)[kRows], Upcoming& upcoming) {
  constexpr int64_t kVectors = kIsNibbles ? 4 : 8;
  const int64_t num_groups = matrix.num_inputs / kGroup;
  const uint8_t* codes = matrix.values + strip * num_groups * kVectors * 64;
  const Group* groups = x.groups + x.first_group(row);
  const int8_t* values = x.values + x.first_group(row) * kGroup;
  for (int r = 0; r < kRows; ++r) sums[r] = zeros();
  for (int64_t group = 0; group < num_groups; ++group) {
    if constexpr (kRows >= kFewestFetchingRows) {
      const std::byte* const at = upcoming.take();
#pragma GCC unroll 4
      for (int64_t i = 0; at != nullptr && i < kFetched; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
    const uint8_t* words = codes;
    // Before the dots: they are ready then, whenever the first of these is.
    const Terms terms = load_terms<kIsNibbles, kHalfScales>(matrix, strip * num_groups + group);
    Ints dots[kRows];
    for (int r = 0; r < kRows; ++r) {
      const bool has_zero = !kIsNibbles && kByteZero != 0;
      // Of a NaN's group this overflows, and does not matter.
      const uint32_t zeros_sum = static_cast<uint32_t>(kByteZero) * static_cast<uint32_t>(groups[r].whole_sum);
      dots[r] = splat_int(has_zero ? static_cast<int32_t>(0u - zeros_sum) : 0);
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
          dots[r] = dot_nibbles(dots[r], low, spread(values + r * kGroup + 4 * j));
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          dots[r] = dot_nibbles(dots[r], high, spread(values + r * kGroup + 16 + 4 * j));
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          dots[r] = dot_bytes(dots[r], packed, values + r * kGroup + 4 * j);
        }
      }
    }
    if constexpr (kIsNibbles) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sums[r] = add_nibbles(dots[r], words, terms, groups[r], sums[r]);
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Spot& spot = kSpots<false>.of[groups[r].place];
        const Ints code = part_of_words(words + spot.offset, spot.shift, 255);
        const Floats kept = to_floats(add_ints(code, splat_int(-128)));
        const Floats others = mul(to_floats(dots[r]), splat(groups[r].scale));
        sums[r] = fma(fma(kept, splat(groups[r].largest), others), terms.scales, sums[r]);
      }
    }
    values += kTileRows * kGroup;
    groups += kTileRows;
  }
}

// The products of `kRows` rows of bfloat16, `stride` apart, with one strip of pairs.
template <int kRows>
PALLASITE_INLINE void multiply_pairs(const uint8_t* weights, int64_t num_pairs, const uint16_t* x,
                                     int64_t stride, Floats (&sums)[kRows]) {
  for (int r = 0; r < kRows; ++r) sums[r] = zeros();
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    prefetch(weights);
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
                                     int64_t row, Floats (&sums)[kRows], Upcoming& upcoming) {
  if (matrix.kind == Kind::kBfloat16) {
    const int64_t num_pairs = matrix.num_inputs / 2;
    multiply_pairs<kRows>(matrix.values + strip * num_pairs * 64, num_pairs,
                                x.halves + row * x.num_inputs, x.num_inputs, sums);
    return;
  }
  const bool is_nibbles = matrix.kind == Kind::kNibbles;
  if (matrix.has_half_scales) {
    if (is_nibbles) return multiply_integers<kRows, true, true>(matrix, strip, x, row, sums, upcoming);
    return multiply_integers<kRows, false, true>(matrix, strip, x, row, sums, upcoming);
  }
  if (is_nibbles) return multiply_integers<kRows, true, false>(matrix, strip, x, row, sums, upcoming);
  multiply_integers<kRows, false, false>(matrix, strip, x, row, sums, upcoming);
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

// Stores the products of one strip, with the residual.
template <int kRows>
PALLASITE_INLINE void store_tile(const Product& p, int64_t index, int64_t strip, int64_t row,
                                 const Floats (&sums)[kRows]) {
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

// One strip for `kRows` rows, from the products to the outputs.
template <int kRows>
void fill_tile(const Product& p, int64_t index, int64_t strip, int64_t row) {
  Floats sums[kRows];
  if (p.is_gated) {
    // Kept in memory: the registers are the next strip's.
    alignas(64) float gates[kRows][kLanes];
    multiply_strip<kRows>(p.matrices[0], strip, p.x, row, sums, *p.upcoming);
    for (int r = 0; r < kRows; ++r) store(gates[r], sums[r]);
    multiply_strip<kRows>(p.matrices[1], strip, p.x, row, sums, *p.upcoming);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = mul(activate(load(gates[r]), p.activation), sums[r]);
    }
  } else {
    multiply_strip<kRows>(p.matrices[index], strip, p.x, row, sums, *p.upcoming);
  }
  store_tile(p, index, strip, row, sums);
}

template <int kRows>
PALLASITE_INLINE void fill_rows(const Product& p, int64_t index, int64_t strip, int64_t& row,
                                int64_t end) {
  if constexpr (kRows <= kMaxRows) {
    for (; row + kRows <= end; row += kRows) fill_tile<kRows>(p, index, strip, row);
  }
}

// Some strips of one matrix for some rows, a strip at a time.
void multiply_strips(const Product& p, int64_t index, int64_t begin, int64_t end,
                     int64_t row_begin, int64_t row_end) {
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
}
