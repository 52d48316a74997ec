// One query's heads with a block of keys. Included within a namespace of its own, after softmax.h.
//
// Few rows use what is read of a page too seldom for it to be packed first: strips of keys, and pairs of
// values, go from registers into the products.

// Rows that such products have registers for.
constexpr int64_t kMostQueryRows = 4;

// Whether a task is one query's, with keys and values as `score_query` and `mix_query` take them.
PALLASITE_INLINE bool is_query(const Attention& a, const Task& task, const Block& block) {
  return task.num_tokens == 1 && block.num_rows <= kMostQueryRows &&
         a.cache.type != CacheType::kFloat32 && block.head_width % (2 * kLanes) == 0;
}

// Keys or values of a strip, of which a block of `seen` has `count_of` at most.
PALLASITE_INLINE int64_t count_of(int64_t strip, int64_t seen) {
  const int64_t rest = seen - strip * kLanes;
  return rest < kLanes ? rest : kLanes;
}

// Scores of all rows with a block of keys.
template <int kRows>
PALLASITE_INLINE void score_query(const Attention& a, const Task& task, int64_t kv_head,
                                  const Block& block, int64_t begin, int64_t seen, Ahead& ahead) {
  const int64_t width = block.head_width;
  const auto* queries = reinterpret_cast<const uint16_t*>(block.queries);
  for (int64_t strip = 0; strip * kLanes < seen; ++strip) {
    const int64_t count = count_of(strip, seen);
    const int64_t position = begin + strip * kLanes;
    const Rows keys = find_rows(a, task.request, kv_head, 0, position);
    copy_scales(keys, count, block.key_scales + strip * kLanes);
    copy_scales(find_rows(a, task.request, kv_head, 1, position), count,
                block.value_scales + strip * kLanes);
    const auto* words = reinterpret_cast<const uint32_t*>(as_halves(block, a.cache.type, keys, count));
    Floats sums[kRows];
    for (Floats& sum : sums) sum = zeros();
    for (int64_t column = 0; column < width / 2; column += kLanes) {
      for_columns(words + column, width / 2, [&](int c, Bytes own) PALLASITE_LAMBDA {
        if (c % 8 == 0) ahead.fetch();
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r] = dot_bfloat16(sums[r], own, queries + r * width + 2 * (column + c));
        }
      });
    }
    for (int r = 0; r < kRows; ++r) {
      store(block.scores + r * block.most_keys + strip * kLanes, sums[r]);
    }
  }
}

// Adds to what is mixed so far `kStrips` strips of channels of a block's values, as weights tell.
template <int kRows, int kStrips>
PALLASITE_INLINE void mix_channels(const Attention& a, const Task& task, int64_t kv_head,
                                   const Block& block, int64_t begin, int64_t seen, int64_t channel,
                                   Ahead& ahead) {
  const int64_t width = block.head_width;
  const auto* weights = reinterpret_cast<const uint16_t*>(block.weights);
  Floats sums[kRows][kStrips];
  for (auto& row : sums) {
    for (Floats& sum : row) sum = zeros();
  }
  for (int64_t strip = 0; strip * kLanes < seen; ++strip) {
    const Rows rows = find_rows(a, task.request, kv_head, 1, begin + strip * kLanes);
    const uint16_t* values =
        as_halves(block, a.cache.type, rows, count_of(strip, seen)) + channel;
#pragma GCC unroll 8
    for (int64_t key = 0; key < kLanes; key += 2) {
      if (channel == 0 && key < 8) ahead.fetch();
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        const uint16_t* own = values + key * width + s * kLanes;
        const Bytes pairs = interleaved_halves(own, own + width);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[r][s] = dot_bfloat16(sums[r][s], pairs,
                                    weights + r * block.most_keys + strip * kLanes + key);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Floats factor = splat(block.factors[r]);
    float* mixed = block.mixed + r * width + channel;
    for (int s = 0; s < kStrips; ++s) {
      store(mixed + s * kLanes, fma(load(mixed + s * kLanes), factor, sums[r][s]));
    }
  }
}

// The same of all channels.
template <int kRows>
PALLASITE_INLINE void mix_query(const Attention& a, const Task& task, int64_t kv_head,
                                const Block& block, int64_t begin, int64_t seen, Ahead& ahead) {
  int64_t channel = 0;
  for (; channel + 4 * kLanes <= block.head_width; channel += 4 * kLanes) {
    mix_channels<kRows, 4>(a, task, kv_head, block, begin, seen, channel, ahead);
  }
  for (; channel < block.head_width; channel += kLanes) {
    mix_channels<kRows, 1>(a, task, kv_head, block, begin, seen, channel, ahead);
  }
}
