// Attention over a paged cache, for one instruction set. Included within a namespace of its own,
// after products.h, whose tiles it uses: a block's keys are packed as strips of sixteen, and so are
// its values' channels, and then both are products as any other.
//
// Queries and weights are rounded to bfloat16 where the cache is, or is int8, whose values bfloat16
// holds; scores, sums and an int8 cache's scales are f32. A cache of f32 has f32 products.

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
  float* largest;        // [rows]
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
    block.end = at;
    return block;
  }

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

// A tile of kRows rows by kStrips strips: sums[r][s] = rows of x times strips of pairs of bfloat16.
template <int kRows, int kStrips>
PALLASITE_INLINE void multiply_pairs(const uint8_t* weights, int64_t strip_bytes, int64_t num_pairs,
                                     const uint16_t* x, int64_t stride,
                                     Floats (&sums)[kRows][kStrips]) {
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kStrips; ++s) sums[r][s] = zeros();
  }
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
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

// Calls tile<rows, strips>(first row, first strip) until all rows and strips have been in one. As
// many sums as fit in registers, so that one does not wait for the next.
template <typename Tile>
PALLASITE_INLINE void for_tiles(int64_t num_rows, int64_t num_strips, const Tile& tile) {
  int64_t row = 0;
  const auto pass = [&](auto rows, auto strips) PALLASITE_LAMBDA {
    constexpr int kRows = decltype(rows)::value, kStrips = decltype(strips)::value;
    for (; row + kRows <= num_rows; row += kRows) {
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
      multiply_pairs<kRows, kStrips>(keys, width * 32, width / 2, queries, width, sums);
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
  int64_t num_keys;

  template <int kRows, int kStrips>
  PALLASITE_INLINE void operator()(int64_t row, int64_t strip) const {
    const int64_t width = block.head_width;
    Floats sums[kRows][kStrips];
    if (is_wide) {
      const float* values = reinterpret_cast<const float*>(block.values) + strip * kLanes;
      const float* weights = reinterpret_cast<const float*>(block.weights) + row * block.most_keys;
      multiply_floats<kRows, kStrips>(values, kLanes, width, num_keys, weights, block.most_keys, sums);
    } else {
      const uint8_t* values =
          reinterpret_cast<const uint8_t*>(block.values) + strip * block.most_keys * 32;
      const uint16_t* weights = reinterpret_cast<const uint16_t*>(block.weights) + row * block.most_keys;
      multiply_pairs<kRows, kStrips>(values, block.most_keys * 32, num_keys / 2, weights, block.most_keys,
                                     sums);
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

// Sixteen keys or values of a page: where they lie, and what they are scaled by.
struct Rows {
  const std::byte* values;
  const float* scales;
};

PALLASITE_INLINE int64_t item_size(CacheType type) {
  return type == CacheType::kFloat32 ? 4 : type == CacheType::kBfloat16 ? 2 : 1;
}

PALLASITE_INLINE Rows find_rows(const Attention& a, int64_t request, int64_t kv_head, int64_t which,
                                int64_t position) {
  const Cache& cache = a.cache;
  const int64_t page = a.page_table[request * a.pages_per_request + position / cache.page_size];
  const int64_t row = ((page * cache.num_kv_heads + kv_head) * 2 + which) * cache.page_size +
                      position % cache.page_size;
  const bool is_scaled = cache.type == CacheType::kInt8;
  return {cache.values + row * cache.head_width * item_size(cache.type),
          is_scaled ? cache.scales + row : nullptr};
}

// The keys and values of a block, piece by piece, come nearer while the block before is worked on:
// pages lie anywhere, which no processor foresees. A piece is sixteen keys and values of one head.
struct Ahead {
  const Attention& a;
  const Task* task;      // null for nothing to fetch
  int64_t position;
  int64_t num_pieces;
  int64_t next = 0;
  int64_t size = 0;
  const std::byte* at[2] = {nullptr, nullptr};

  static Ahead of(const Attention& a, const Task* task, int64_t position) {
    if (task == nullptr) return {a, nullptr, 0, 0};
    const int64_t most = block_keys(*task), rest = task->key_end - position;
    const int64_t count = rest < most ? rest : most;
    return {a, task, position, (count + kLanes - 1) / kLanes * task->num_kv_heads};
  }

  // Fetches a share of a piece: an eighth, whose keys or values follow one another.
  void fetch() {
    if (next >= 8 * num_pieces) return;
    const int64_t piece = next / 8, part = next % 8;
    if (part == 0) {
      const int64_t num_strips = num_pieces / task->num_kv_heads;
      const int64_t head = task->first_kv_head + piece / num_strips;
      const int64_t key = position + piece % num_strips * kLanes;
      size = kLanes * a.cache.head_width * item_size(a.cache.type);
      at[0] = find_rows(a, task->request, head, 0, key).values;
      at[1] = find_rows(a, task->request, head, 1, key).values;
    }
    const std::byte* begin = at[part / 4] + part % 4 * size / 4;
    for (int64_t i = 0; i < size / 4; i += 64) __builtin_prefetch(begin + i, 0, 2);
    ++next;
  }
};

// Returns sixteen rows as bfloat16, the first `count` of them; the others are zeros. What is not
// written yet may be anything, and 0 times infinity is not 0.
PALLASITE_INLINE const uint16_t* as_halves(const Block& block, CacheType type, const Rows& rows,
                                           int64_t count) {
  const int64_t width = block.head_width;
  const bool is_held = type == CacheType::kBfloat16;
  if (is_held && count == kLanes) return reinterpret_cast<const uint16_t*>(rows.values);
  uint16_t* out = reinterpret_cast<uint16_t*>(block.rows);
  if (is_held) {
    std::memcpy(out, rows.values, count * width * 2);
  } else {
    const int8_t* values = reinterpret_cast<const int8_t*>(rows.values);
    for (int64_t i = 0; i < count * width; i += kLanes) {
      store_bfloat16(out + i, load_int8(values + i));
    }
  }
  std::memset(out + count * width, 0, (kLanes - count) * width * 2);
  return out;
}

// Packs sixteen keys and values of a block, `count` of which there are.
PALLASITE_INLINE void pack_rows(const Attention& a, int64_t request, int64_t kv_head,
                                const Block& block, int64_t strip, int64_t position,
                                int64_t count, Ahead& ahead) {
  const int64_t width = block.head_width;
  const Rows keys = find_rows(a, request, kv_head, 0, position);
  const Rows values = find_rows(a, request, kv_head, 1, position);
  if (a.cache.type == CacheType::kFloat32) {
    const auto* words = reinterpret_cast<const uint32_t*>(keys.values);
    auto* packed = reinterpret_cast<uint32_t*>(block.keys) + strip * width * kLanes;
    for (int64_t column = 0; column < width; column += kLanes) {
      ahead.fetch();
      ahead.fetch();
      transpose_words(words + column, width, packed + column * kLanes);
    }
    std::byte* copied = block.values + strip * kLanes * width * 4;
    std::memcpy(copied, values.values, count * width * 4);
    std::memset(copied + count * width * 4, 0, (kLanes - count) * width * 4);
    return;
  }
  const uint16_t* halves = as_halves(block, a.cache.type, keys, count);
  const auto* words = reinterpret_cast<const uint32_t*>(halves);
  auto* packed = reinterpret_cast<uint32_t*>(block.keys) + strip * width / 2 * kLanes;
  int64_t column = 0;
  for (; column + kLanes <= width / 2; column += kLanes) {
    ahead.fetch();
    transpose_words(words + column, width / 2, packed + column * kLanes);
  }
  for (; column < width / 2; ++column) {
    for (int64_t row = 0; row < kLanes; ++row) {
      packed[column * kLanes + row] = words[row * width / 2 + column];
    }
  }
  halves = as_halves(block, a.cache.type, values, count);
  auto* channels = reinterpret_cast<uint16_t*>(block.values);
  for (int64_t row = 0; row < kLanes; row += 2) {
    if (row < 12) ahead.fetch();
    for (int64_t channel = 0; channel < width; channel += kLanes) {
      const int64_t pair = strip * kLanes / 2 + row / 2;
      interleave_halves(halves + row * width + channel, halves + (row + 1) * width + channel,
                        channels + (channel / kLanes * block.most_keys / 2 + pair) * 32);
    }
  }
  if (keys.scales != nullptr) {
    for (int64_t row = 0; row < kLanes; ++row) {
      block.key_scales[strip * kLanes + row] = row < count ? keys.scales[row] : 0.0f;
      block.value_scales[strip * kLanes + row] = row < count ? values.scales[row] : 0.0f;
    }
  }
}

// Turns a row of scores into weights; the keys [first, last) of the block are seen.
PALLASITE_INLINE void weigh(const Attention& a, const Block& block, int64_t row, int64_t num_keys,
                            int64_t first, int64_t last) {
  float* scores = block.scores + row * block.most_keys;
  const bool is_scaled = a.cache.type == CacheType::kInt8;
  const float nothing = -__builtin_inff();
  Floats most = splat(nothing);
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    Floats some = load(scores + key);
    if (is_scaled) some = mul(some, load(block.key_scales + key));
    if (a.soft_cap > 0) {
      // cap * tanh(s / cap), by the logistic function.
      const Floats power = exponential(mul(some, splat(-2 / a.soft_cap)));
      const Floats logistic = div(splat(2.0f), add(splat(1.0f), power));
      some = mul(splat(a.soft_cap), sub(logistic, splat(1.0f)));
    }
    if (key < first || key + kLanes > last) {
      some = select_lanes(some, nothing, first - key, last - key);
    }
    store(scores + key, some);
    most = max(most, some);
  }
  const float before = block.largest[row];
  const float now = __builtin_fmaxf(before, largest(most));
  // Nothing is seen yet: any finite number keeps the differences from being NaN.
  const Floats reference = splat(now == nothing ? 0.0f : now);
  Floats sum = zeros();
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    Floats weights = exponential(sub(load(scores + key), reference));
    if (key < first || key + kLanes > last) {
      weights = select_lanes(weights, 0.0f, first - key, last - key);
    }
    sum = add(sum, weights);
    if (is_scaled) weights = mul(weights, load(block.value_scales + key));
    if (a.cache.type == CacheType::kFloat32) {
      store(reinterpret_cast<float*>(block.weights) + row * block.most_keys + key, weights);
    } else {
      store_for_dot(reinterpret_cast<uint16_t*>(block.weights) + row * block.most_keys + key, weights);
    }
  }
  const float factor = before == nothing ? 0.0f : __builtin_expf(before - now);
  block.factors[row] = factor;
  block.sums[row] = block.sums[row] * factor + total(sum);
  block.largest[row] = now;
}

// Calls put(i, sixteen values from dimension i on) for all of a head's row, turned by its position.
template <typename Put>
PALLASITE_INLINE void turn_row(const Attention& a, const float* x, int64_t token, const Put& put) {
  const int64_t width = a.cache.head_width, pairs = a.num_pairs;
  const float* cosines = a.cosines + token * pairs;
  const float* sines = a.sines + token * pairs;
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const Floats first = load(x + i), second = load(x + pairs + i);
    const Floats cosine = load(cosines + i), sine = load(sines + i);
    put(i, sub(mul(first, cosine), mul(second, sine)));
    put(pairs + i, add(mul(second, cosine), mul(first, sine)));
  }
  for (int64_t i = 2 * pairs; i < width; i += kLanes) put(i, load(x + i));
}

PALLASITE_INLINE void start(const Attention& a, const Task& task, int64_t kv_head,
                            const Block& block) {
  const int64_t width = block.head_width, group = a.num_heads / a.cache.num_kv_heads;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int64_t token = task.first_token + row / group, head = kv_head * group + row % group;
    turn_row(a, a.q + token * a.stride + head * width, token, [&](int64_t i, Floats x)
             PALLASITE_LAMBDA {
      const Floats scaled = mul(x, splat(a.scale));
      if (a.cache.type == CacheType::kFloat32) {
        store(reinterpret_cast<float*>(block.queries) + row * width + i, scaled);
      } else {
        store_for_dot(reinterpret_cast<uint16_t*>(block.queries) + row * width + i, scaled);
      }
      store(block.mixed + row * width + i, zeros());
    });
    // A sink is a score that adds no value; where keys are in parts, only one has it.
    const bool has_sink = a.sinks != nullptr && task.has_sinks;
    block.largest[row] = has_sink ? a.sinks[head] : -__builtin_inff();
    block.sums[row] = has_sink ? 1.0f : 0.0f;
  }
}

// Attends a block of keys from `begin` on with the queries of one key head.
PALLASITE_INLINE void attend_block(const Attention& a, const Task& task, int64_t kv_head,
                                   const Block& block, int64_t begin, Ahead& ahead) {
  const int64_t group = a.num_heads / a.cache.num_kv_heads;
  const bool is_wide = a.cache.type == CacheType::kFloat32;
  const int64_t rest = task.key_end - begin;
  const int64_t seen = rest < block.most_keys ? rest : block.most_keys;
  const int64_t num_strips = (seen + kLanes - 1) / kLanes;
  for (int64_t strip = 0; strip < num_strips; ++strip) {
    const int64_t count = seen - strip * kLanes;
    pack_rows(a, task.request, kv_head, block, strip, begin + strip * kLanes,
              count < kLanes ? count : kLanes, ahead);
  }
  for_tiles(block.num_rows, num_strips, ScoreTile{block, is_wide});
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int64_t position = a.positions[task.first_token + row / group];
    const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
    const int64_t last = position + 1 - begin < seen ? position + 1 - begin : seen;
    weigh(a, block, row, num_strips * kLanes, oldest - begin, last);
  }
  for_tiles(block.num_rows, block.head_width / kLanes,
            ValueTile{block, is_wide, num_strips * kLanes});
}

PALLASITE_INLINE void finish(const Attention& a, const Task& task, int64_t index,
                             const Block& block) {
  const int64_t width = block.head_width, group = a.num_heads / a.cache.num_kv_heads;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int64_t token = task.first_token + row / group;
    const int64_t head = (task.first_kv_head + index) * group + row % group;
    float* out = a.out + (token * a.num_heads + head) * width;
    Floats factor = splat(1.0f);
    if (task.part != nullptr) {
      float* part = task.part + (index * block.num_rows + row) * (2 + width);
      part[0] = block.largest[row];
      part[1] = block.sums[row];
      out = part + 2;
    } else {
      factor = splat(block.sums[row] > 0 ? 1 / block.sums[row] : 0.0f);
    }
    for (int64_t i = 0; i < width; i += kLanes) {
      store(out + i, mul(load(block.mixed + row * width + i), factor));
    }
  }
}

void attend(const Attention& a, const Task& task, const Task* next, std::byte* scratch) {
  const int64_t num_rows = task.num_tokens * (a.num_heads / a.cache.num_kv_heads);
  const int64_t most_keys = block_keys(task);
  const Block block = Block::make(a, num_rows, task.num_kv_heads, most_keys, scratch);
  for (int64_t i = 0; i < task.num_kv_heads; ++i) {
    start(a, task, task.first_kv_head + i, block.of_head(i));
  }
  for (int64_t begin = task.key_begin; begin < task.key_end; begin += most_keys) {
    const int64_t then = begin + most_keys;
    Ahead ahead = then < task.key_end ? Ahead::of(a, &task, then)
                                      : Ahead::of(a, next, next == nullptr ? 0 : next->key_begin);
    for (int64_t i = 0; i < task.num_kv_heads; ++i) {
      attend_block(a, task, task.first_kv_head + i, block.of_head(i), begin, ahead);
    }
  }
  for (int64_t i = 0; i < task.num_kv_heads; ++i) finish(a, task, i, block.of_head(i));
}

void merge(const Attention& a, int64_t token, const float* parts, int64_t num_parts) {
  const int64_t width = a.cache.head_width, stride = a.num_heads * (2 + width);
  for (int64_t head = 0; head < a.num_heads; ++head) {
    const float* own = parts + head * (2 + width);
    float most = -__builtin_inff();
    for (int64_t p = 0; p < num_parts; ++p) most = __builtin_fmaxf(most, own[p * stride]);
    float* out = a.out + (token * a.num_heads + head) * width;
    for (int64_t i = 0; i < width; i += kLanes) store(out + i, zeros());
    if (most == -__builtin_inff()) continue;
    float sum = 0;
    for (int64_t p = 0; p < num_parts; ++p) {
      sum += own[p * stride + 1] * __builtin_expf(own[p * stride] - most);
    }
    for (int64_t p = 0; p < num_parts; ++p) {
      const Floats factor = splat(__builtin_expf(own[p * stride] - most) / sum);
      for (int64_t i = 0; i < width; i += kLanes) {
        store(out + i, fma(load(own + p * stride + 2 + i), factor, load(out + i)));
      }
    }
  }
}

PALLASITE_INLINE void write_row(const Attention& a, const Rows& rows, const float* x, bool turns,
                                int64_t token) {
  const int64_t width = a.cache.head_width;
  std::byte* out = const_cast<std::byte*>(rows.values);
  const auto each = [&](const auto& put) PALLASITE_LAMBDA {
    if (turns) return turn_row(a, x, token, put);
    for (int64_t i = 0; i < width; i += kLanes) put(i, load(x + i));
  };
  if (a.cache.type == CacheType::kFloat32) {
    each([&](int64_t i, Floats some) { store(reinterpret_cast<float*>(out) + i, some); });
  } else if (a.cache.type == CacheType::kBfloat16) {
    each([&](int64_t i, Floats some) {
      store_bfloat16(reinterpret_cast<uint16_t*>(out) + i, some);
    });
  } else {
    Floats most = zeros();
    each([&](int64_t, Floats some) { most = max(most, abs(some)); });
    const float scale = largest(most) * (1.0f / 127);
    const bool is_zero = scale < 1.17549435e-38f;
    const Floats inverse = splat(is_zero ? 0.0f : 1.0f / scale);
    each([&](int64_t i, Floats some) {
      store_int8(reinterpret_cast<int8_t*>(out) + i, to_ints(mul(some, inverse)));
    });
    *const_cast<float*>(rows.scales) = is_zero ? 0.0f : scale;
  }
}

void write_rows(const Attention& a, int64_t request, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t kv_head = 0; kv_head < a.cache.num_kv_heads; ++kv_head) {
      const int64_t at = token * a.stride + kv_head * a.cache.head_width;
      const int64_t position = a.positions[token];
      const Rows keys = find_rows(a, request, kv_head, 0, position);
      write_row(a, keys, a.k_new + at, a.num_pairs > 0, token);
      const Rows values = find_rows(a, request, kv_head, 1, position);
      write_row(a, values, a.v_new + at, false, token);
    }
  }
}
