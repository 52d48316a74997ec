// A block of keys and values, and products with it. Included within a namespace of its own, after
// products.h.

// Keys of a block, at most: for a tile of queries what is packed of them stays in the second-level
// cache, for one query's heads in the first.
constexpr int64_t kBlockKeys = 128, kQueryBlockKeys = 64;

PALLASITE_INLINE int64_t block_keys(const Task& task) {
  return task.num_tokens == 1 ? kQueryBlockKeys : kBlockKeys;
}

// One request's queries of one key head, with room for what a block of keys needs.
struct Block {
  int64_t num_rows;      // queries times heads
  int64_t most_keys;
  int64_t head_width;
  std::byte* queries;    // [rows, H], bfloat16 or f32
  float* largest;        // [rows]: scores over ln 2, as all powers here are of two
  float* sums;           // [rows]
  float* mixed;          // [rows, H]
  // All key heads of a task use these in turn.
  std::byte* keys;       // strips of the keys: [keys / 16, H / 2, 16, 2] bfloat16 or [keys / 16, H, 16] f32
  std::byte* values;     // [H / 16, keys / 2, 16, 2] bfloat16 or [keys, H] f32
  std::byte* rows;       // [16, H]: a page's part, as bfloat16
  float* scores;         // [rows, keys]
  std::byte* weights;    // [rows, keys], bfloat16 or f32
  float* key_scales;     // [keys]
  float* value_scales;   // [keys]
  float* factors;        // [rows]: what a block makes of the sums before it
  int32_t* ends;         // [rows / kMaxRows]: the keys that are computed for these rows
  std::byte* end;

  static Block make(const Attention& a, int64_t num_rows, int64_t num_kv_heads, int64_t most_keys,
                    std::byte* at) {
    Block block{};
    block.num_rows = num_rows;
    block.most_keys = most_keys;
    block.head_width = a.cache.head_width;
    const int64_t all_rows = num_rows * num_kv_heads, width = block.head_width;
    const auto take = [&at](int64_t size) {
      std::byte* taken = at;
      at += (size + 63) / 64 * 64;
      return taken;
    };
    const auto take_floats = [&](int64_t count) {
      return reinterpret_cast<float*>(take(count * 4));
    };
    block.queries = take(all_rows * width * 4);
    block.largest = take_floats(all_rows);
    block.sums = take_floats(all_rows);
    block.mixed = take_floats(all_rows * width);
    block.keys = take(most_keys * width * 4);
    block.values = take(most_keys * width * 4);
    block.rows = take(kLanes * width * 2);
    block.scores = take_floats(num_rows * most_keys);
    block.weights = take(num_rows * most_keys * 4);
    block.key_scales = take_floats(most_keys);
    block.value_scales = take_floats(most_keys);
    block.factors = take_floats(num_rows);
    block.ends = reinterpret_cast<int32_t*>(take((num_rows + kMaxRows - 1) / kMaxRows * 4));
    block.end = at;
    return block;
  }

  // Keys that are computed for a row: whole strips, the same for all rows of a tile.
  int64_t keys_of(int64_t row) const { return ends[row / kMaxRows]; }

  // The block of the task's `index`-th key head.
  Block of_head(int64_t index) const {
    Block own = *this;
    own.queries += index * num_rows * head_width * 4;
    own.largest += index * num_rows;
    own.sums += index * num_rows;
    own.mixed += index * num_rows * head_width;
    return own;
  }
};

size_t attend_scratch(const Attention& a, int64_t num_rows, int64_t num_kv_heads) {
  std::byte* const none = nullptr;
  return static_cast<size_t>(Block::make(a, num_rows, num_kv_heads, kBlockKeys, none).end - none);
}

// The order in which pairs of a key's dimensions are summed, of each sixteen: that in which
// `for_columns` has them, so that a query's scores are the same bits whatever it is computed with.
constexpr int kPairOrder[kLanes] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
PALLASITE_INLINE int64_t ordered(int64_t pair, int64_t num_pairs) {
  return pair < num_pairs / kLanes * kLanes ? pair / kLanes * kLanes + kPairOrder[pair % kLanes]
                                            : pair;
}

// A tile of kRows rows by kStrips strips: sums[r][s] = rows of x times strips of pairs of bfloat16.
template <int kRows, int kStrips, bool kIsOrdered>
PALLASITE_INLINE void multiply_pairs(const uint8_t* weights, int64_t strip_bytes, int64_t num_pairs,
                                     const uint16_t* x, int64_t stride,
                                     Floats (&sums)[kRows][kStrips]) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) sums[r][s] = zeros();
  }
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t pair = kIsOrdered ? ordered(i, num_pairs) : i;
    Bytes own[kStrips];
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) own[s] = load_bytes(weights + s * strip_bytes + pair * 64);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kStrips; ++s) {
        sums[r][s] = dot_bfloat16(sums[r][s], own[s], x + r * stride + 2 * pair);
      }
    }
  }
}

// The same with f32; of a strip, weights of one x are `step` floats after those of the last.
template <int kRows, int kStrips>
PALLASITE_INLINE void multiply_floats(const float* weights, int64_t strip_size, int64_t step,
                                      int64_t count, const float* x, int64_t stride,
                                      Floats (&sums)[kRows][kStrips]) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) sums[r][s] = zeros();
  }
  for (int64_t i = 0; i < count; ++i) {
    Floats own[kStrips];
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) own[s] = load(weights + s * strip_size + i * step);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < kStrips; ++s) {
        sums[r][s] = fma(own[s], splat(x[r * stride + i]), sums[r][s]);
      }
    }
  }
}

// Calls tile<rows, strips>(first row, first strip) until all rows and the strips of each, as
// `strips_of` tells, have been in one. As many sums as fit in registers, so that one does not wait for
// the next.
template <typename StripsOf, typename Tile>
PALLASITE_INLINE void for_tiles(int64_t num_rows, const StripsOf& strips_of, const Tile& tile) {
  int64_t row = 0;
  const auto pass = [&](auto rows, auto strips) PALLASITE_LAMBDA {
    constexpr int kRows = decltype(rows)::value, kStrips = decltype(strips)::value;
    for (; row + kRows <= num_rows; row += kRows) {
      const int64_t num_strips = strips_of(row);
      int64_t strip = 0;
      for (; strip + kStrips <= num_strips; strip += kStrips) {
        tile.template operator()<kRows, kStrips>(row, strip);
      }
      for (; strip < num_strips; ++strip) tile.template operator()<kRows, 1>(row, strip);
    }
  };
  if constexpr (kMaxRows >= 12) {
    pass(Size<12>{}, Size<2>{});
    pass(Size<6>{}, Size<4>{});
    pass(Size<3>{}, Size<4>{});
    pass(Size<1>{}, Size<8>{});
  } else {
    pass(Size<3>{}, Size<1>{});
    pass(Size<1>{}, Size<4>{});
  }
}

struct ScoreTile {
  const Block& block;
  bool is_wide;

  template <int kRows, int kStrips>
  PALLASITE_INLINE void operator()(int64_t row, int64_t strip) const {
    const int64_t width = block.head_width;
    Floats sums[kRows][kStrips];
    if (is_wide) {
      const float* keys = reinterpret_cast<const float*>(block.keys) + strip * width * kLanes;
      const float* queries = reinterpret_cast<const float*>(block.queries) + row * width;
      multiply_floats<kRows, kStrips>(keys, width * kLanes, kLanes, width, queries, width, sums);
    } else {
      const uint8_t* keys = reinterpret_cast<const uint8_t*>(block.keys) + strip * width * 32;
      const uint16_t* queries = reinterpret_cast<const uint16_t*>(block.queries) + row * width;
      multiply_pairs<kRows, kStrips, true>(keys, width * 32, width / 2, queries, width, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      float* scores = block.scores + (row + r) * block.most_keys + strip * kLanes;
      for (int s = 0; s < kStrips; ++s) store(scores + s * kLanes, sums[r][s]);
    }
  }
};

struct ValueTile {
  const Block& block;
  bool is_wide;

  template <int kRows, int kStrips>
  PALLASITE_INLINE void operator()(int64_t row, int64_t strip) const {
    const int64_t width = block.head_width, num_keys = block.keys_of(row);
    Floats sums[kRows][kStrips];
    if (is_wide) {
      const float* values = reinterpret_cast<const float*>(block.values) + strip * kLanes;
      const float* weights = reinterpret_cast<const float*>(block.weights) + row * block.most_keys;
      multiply_floats<kRows, kStrips>(values, kLanes, width, num_keys, weights, block.most_keys, sums);
    } else {
      const uint8_t* values =
          reinterpret_cast<const uint8_t*>(block.values) + strip * block.most_keys * 32;
      const uint16_t* weights = reinterpret_cast<const uint16_t*>(block.weights) + row * block.most_keys;
      multiply_pairs<kRows, kStrips, false>(values, block.most_keys * 32, num_keys / 2, weights,
                                            block.most_keys, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = splat(block.factors[row + r]);
      float* mixed = block.mixed + (row + r) * width + strip * kLanes;
      for (int s = 0; s < kStrips; ++s) {
        store(mixed + s * kLanes, fma(load(mixed + s * kLanes), factor, sums[r][s]));
      }
    }
  }
};
