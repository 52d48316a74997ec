// Products of many rows with two strips of nibbles at once, and which products are such. Included
// within a namespace of its own, after products.h.
//
// What is read of x serves two strips, and their codes are unpacked once for all rows. A row's sums
// are those of products.h, bit for bit.

// Rows of a tile: with two strips each, their sums stay in registers.
constexpr int kPairRows = kMaxRows / 2;
// Groups that are unpacked before they are multiplied: they stay in the second-level cache.
constexpr int64_t kUnpackedGroups = 48;
// Rows of a run, whose sums wait for the next groups.
constexpr int64_t kMostRows = 288;

// A strip of a matrix.
struct Strip {
  const Matrix* matrix;
  int64_t index;

  int64_t first_group() const { return index * (matrix->num_inputs / kGroup); }
  const uint8_t* codes(int64_t group) const {
    return matrix->values + (first_group() + group) * 256;
  }
};

// A group of both strips, unpacked.
struct Unpacked {
  alignas(64) uint8_t codes[8][2][64];
  Terms terms[2];
};

template <bool kHalfScales>
PALLASITE_INLINE void unpack(const Strip (&strips)[2], int64_t begin, int64_t end, Unpacked* to) {
  for (int64_t group = begin; group < end; ++group, ++to) {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      to->terms[s] =
          load_terms<true, kHalfScales>(*strips[s].matrix, strips[s].first_group() + group);
      const uint8_t* words = strips[s].codes(group);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        prefetch(words + 64 * j);
        const Bytes packed = load_bytes(words + 64 * j);
        store_bytes(to->codes[j][s], low_nibbles(packed));
        store_bytes(to->codes[4 + j][s], high_nibbles(packed));
      }
    }
  }
}

// Adds to `sums` the products of `kPairRows` rows with groups [begin, end).
PALLASITE_INLINE void multiply_pair(const Strip (&strips)[2], int64_t begin, int64_t end,
                                    const Rounded& x, int64_t row, const Unpacked* own,
                                    Floats (&sums)[2][kPairRows]) {
  const int64_t first = x.first_group(row) + begin * kTileRows;
  const Group* groups = x.groups + first;
  const int8_t* values = x.values + first * kGroup;
  for (int64_t group = begin; group < end; ++group, ++own) {
    Ints dots[2][kPairRows];
#pragma GCC unroll 16
    for (int r = 0; r < kPairRows; ++r) dots[0][r] = dots[1][r] = splat_int(0);
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j) {
      const Bytes first_codes = load_bytes(own->codes[j][0]);
      const Bytes second_codes = load_bytes(own->codes[j][1]);
#pragma GCC unroll 16
      for (int r = 0; r < kPairRows; ++r) {
        const auto word = spread(values + r * kGroup + 4 * j);
        dots[0][r] = dot_nibbles(dots[0][r], first_codes, word);
        dots[1][r] = dot_nibbles(dots[1][r], second_codes, word);
      }
    }
    const uint8_t* words[2] = {strips[0].codes(group), strips[1].codes(group)};
    const Terms terms[2] = {own->terms[0], own->terms[1]};
#pragma GCC unroll 16
    for (int r = 0; r < kPairRows; ++r) {
      sums[0][r] = add_nibbles(dots[0][r], words[0], terms[0], groups[r], sums[0][r]);
      sums[1][r] = add_nibbles(dots[1][r], words[1], terms[1], groups[r], sums[1][r]);
    }
    values += kTileRows * kGroup;
    groups += kTileRows;
  }
}

// Sums of a tile that wait for the next groups.
using Waiting = float[2][kPairRows][kLanes];

// All inputs of both strips for rows [row_begin, row_end), in tiles; `finish` takes each tile's sums.
template <bool kHalfScales, typename Finish>
PALLASITE_INLINE void multiply_tiles(const Strip (&strips)[2], const Rounded& x, int64_t row_begin,
                                     int64_t row_end, const Finish& finish) {
  Unpacked unpacked[kUnpackedGroups];
  alignas(64) Waiting waiting[kMostRows / kPairRows];
  const int64_t num_groups = x.num_inputs / kGroup;
  for (int64_t begin = 0; begin < num_groups; begin += kUnpackedGroups) {
    const int64_t end = begin + kUnpackedGroups < num_groups ? begin + kUnpackedGroups : num_groups;
    unpack<kHalfScales>(strips, begin, end, unpacked);
    for (int64_t row = row_begin; row < row_end; row += kPairRows) {
      Waiting& kept = waiting[(row - row_begin) / kPairRows];
      Floats sums[2][kPairRows];
      for (int r = 0; r < kPairRows; ++r) {
        sums[0][r] = begin == 0 ? zeros() : load(kept[0][r]);
        sums[1][r] = begin == 0 ? zeros() : load(kept[1][r]);
      }
      multiply_pair(strips, begin, end, x, row, unpacked, sums);
      if (end == num_groups) {
        finish(row, sums);
        continue;
      }
      for (int r = 0; r < kPairRows; ++r) {
        store(kept[0][r], sums[0][r]);
        store(kept[1][r], sums[1][r]);
      }
    }
  }
}

// Whether strips of this product are multiplied two at once: of one matrix, or a gate's with that of
// its values.
PALLASITE_INLINE bool takes_pairs(const Product& p, int64_t index, int64_t num_rows) {
  if constexpr (kMaxRows < 12) return false;
  const Matrix& first = p.matrices[index];
  const Matrix& second = p.is_gated ? p.matrices[1] : first;
  return num_rows >= kFewestPairedRows && first.kind == Kind::kNibbles && second.kind == first.kind &&
         second.has_half_scales == first.has_half_scales;
}

template <bool kHalfScales>
void multiply_two(const Product& p, int64_t index, int64_t strip, int64_t row_begin,
                  int64_t row_end) {
  if (p.is_gated) {
    const Strip strips[2] = {{&p.matrices[0], strip}, {&p.matrices[1], strip}};
    multiply_tiles<kHalfScales>(
        strips, p.x, row_begin, row_end,
        [&](int64_t row, Floats(&sums)[2][kPairRows]) PALLASITE_LAMBDA {
          for (int r = 0; r < kPairRows; ++r) {
            sums[1][r] = mul(activate(sums[0][r], p.activation), sums[1][r]);
          }
          store_tile(p, index, strip, row, sums[1]);
        });
    return;
  }
  const Matrix& matrix = p.matrices[index];
  const Strip strips[2] = {{&matrix, strip}, {&matrix, strip + 1}};
  multiply_tiles<kHalfScales>(strips, p.x, row_begin, row_end,
                              [&](int64_t row, Floats(&sums)[2][kPairRows]) PALLASITE_LAMBDA {
                                store_tile(p, index, strip, row, sums[0]);
                                store_tile(p, index, strip + 1, row, sums[1]);
                              });
}

void multiply(const Product& p, int64_t index, int64_t begin, int64_t end, int64_t row_begin,
              int64_t row_end) {
  if (takes_pairs(p, index, row_end - row_begin)) {
    const int64_t strips = p.is_gated ? 1 : 2, num_rows = row_end - row_begin;
    const int64_t num_runs = (num_rows + kMostRows - 1) / kMostRows;
    const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    const int64_t run = (num_tiles + num_runs - 1) / num_runs * kTileRows;
    for (; begin + strips <= end; begin += strips) {
      for (int64_t row = row_begin; row < row_end; row += run) {
        const int64_t rest = row_end - row, rows = rest < run ? rest : run;
        const int64_t tiles_end = row + rows / kPairRows * kPairRows;
        if (p.matrices[index].has_half_scales) {
          multiply_two<true>(p, index, begin, row, tiles_end);
        } else {
          multiply_two<false>(p, index, begin, row, tiles_end);
        }
        multiply_strips(p, index, begin, begin + strips, tiles_end, row + rows);
      }
    }
  }
  multiply_strips(p, index, begin, end, row_begin, row_end);
  if (p.stores_away) finish_stores();
}
