// Attention over a paged cache, for one instruction set. Included within a namespace of its own,
// after products.h, whose tiles it uses: a block's keys are packed as strips of sixteen, and so are
// its values' channels, and then both are products as any other.
//
// Queries and weights are rounded to bfloat16 where the cache is, or is int8, whose values bfloat16
// holds; scores, sums and an int8 cache's scales are f32. A cache of f32 has f32 products.

// Keys of a block: its scores and packed rows stay in the second-level cache.
constexpr int64_t kBlockKeys = 128;

// One request's queries of one key head, with room for what a block needs.
struct Block {
  int64_t num_rows;      // queries times heads
  int64_t head_width;
  std::byte* queries;    // [rows, H], bfloat16 or f32
  std::byte* keys;       // strips of the block's keys: [8, H / 2, 16, 2] bfloat16 or [8, H, 16] f32
  std::byte* values;     // [H / 16, 64, 16, 2] bfloat16 or [128, H] f32
  std::byte* rows;       // [16, H]: a page's part, as bfloat16
  float* scores;         // [rows, 128]
  std::byte* weights;    // [rows, 128], bfloat16 or f32
  float* key_scales;     // [128]
  float* value_scales;   // [128]
  float* largest;        // [rows]
  float* sums;           // [rows]
  float* factors;        // [rows]: what a block makes of the sums before it
  float* mixed;          // [rows, H]

  static Block make(const Attention& a, int64_t num_tokens, std::byte* at) {
    Block block{};
    block.num_rows = num_tokens * (a.num_heads / a.cache.num_kv_heads);
    block.head_width = a.cache.head_width;
    const int64_t rows = block.num_rows, width = block.head_width;
    const auto take = [&at](int64_t size) {
      std::byte* taken = at;
      at += (size + 63) / 64 * 64;
      return taken;
    };
    const auto take_floats = [&](int64_t count) {
      return reinterpret_cast<float*>(take(count * 4));
    };
    block.queries = take(rows * width * 4);
    block.keys = take(kBlockKeys * width * 4);
    block.values = take(kBlockKeys * width * 4);
    block.rows = take(kLanes * width * 2);
    block.scores = take_floats(rows * kBlockKeys);
    block.weights = take(rows * kBlockKeys * 4);
    block.key_scales = take_floats(kBlockKeys);
    block.value_scales = take_floats(kBlockKeys);
    block.largest = take_floats(rows);
    block.sums = take_floats(rows);
    block.factors = take_floats(rows);
    block.mixed = take_floats(rows * width);
    block.end = at;
    return block;
  }

  std::byte* end;
};

size_t attend_scratch(const Attention& a, int64_t num_tokens) {
  return static_cast<size_t>(Block::make(a, num_tokens, nullptr).end - static_cast<std::byte*>(nullptr));
}

// The products of `kRows` rows of f32 with one strip of f32.
template <int kRows>
PALLASITE_INLINE void multiply_floats(const float* weights, int64_t weight_stride, int64_t count,
                                      const float* x, int64_t stride, Floats (&sums)[kRows]) {
  for (int r = 0; r < kRows; ++r) sums[r] = zeros();
  for (int64_t i = 0; i < count; ++i) {
    const Floats own = load(weights + i * weight_stride);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sums[r] = fma(own, splat(x[r * stride + i]), sums[r]);
  }
}

// Calls tile<kRows>(first row) until all rows have been in one.
template <typename Tile>
PALLASITE_INLINE void for_tiles(int64_t num_rows, const Tile& tile) {
  int64_t row = 0;
  if constexpr (kMaxRows >= 12) {
    for (; row + 12 <= num_rows; row += 12) tile.template operator()<12>(row);
  }
  if constexpr (kMaxRows >= 6) {
    for (; row + 6 <= num_rows; row += 6) tile.template operator()<6>(row);
  }
  for (; row + 3 <= num_rows; row += 3) tile.template operator()<3>(row);
  for (; row < num_rows; ++row) tile.template operator()<1>(row);
}

struct ScoreTile {
  const Block& block;
  bool is_wide;
  int64_t strip;

  template <int kRows>
  PALLASITE_INLINE void operator()(int64_t row) const {
    const int64_t width = block.head_width;
    Floats sums[kRows];
    if (is_wide) {
      const float* keys = reinterpret_cast<const float*>(block.keys) + strip * width * kLanes;
      const float* queries = reinterpret_cast<const float*>(block.queries) + row * width;
      multiply_floats<kRows>(keys, kLanes, width, queries, width, sums);
    } else {
      const uint8_t* keys = reinterpret_cast<const uint8_t*>(block.keys) + strip * width * 32;
      const uint16_t* queries = reinterpret_cast<const uint16_t*>(block.queries) + row * width;
      multiply_pairs<kRows, false>(keys, width / 2, queries, width, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      store(block.scores + (row + r) * kBlockKeys + strip * kLanes, sums[r]);
    }
  }
};

struct ValueTile {
  const Block& block;
  bool is_wide;
  int64_t num_keys;
  int64_t strip;

  template <int kRows>
  PALLASITE_INLINE void operator()(int64_t row) const {
    const int64_t width = block.head_width;
    Floats sums[kRows];
    if (is_wide) {
      const float* values = reinterpret_cast<const float*>(block.values) + strip * kLanes;
      const float* weights = reinterpret_cast<const float*>(block.weights) + row * kBlockKeys;
      multiply_floats<kRows>(values, width, num_keys, weights, kBlockKeys, sums);
    } else {
      const uint8_t* values =
          reinterpret_cast<const uint8_t*>(block.values) + strip * kBlockKeys * 32;
      const uint16_t* weights = reinterpret_cast<const uint16_t*>(block.weights) + row * kBlockKeys;
      multiply_pairs<kRows, false>(values, num_keys / 2, weights, kBlockKeys, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      float* mixed = block.mixed + (row + r) * width + strip * kLanes;
      store(mixed, fma(load(mixed), splat(block.factors[row + r]), sums[r]));
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
PALLASITE_INLINE void pack_rows(const Attention& a, const Task& task, const Block& block,
                                int64_t strip, int64_t position, int64_t count) {
  const int64_t width = block.head_width;
  const Rows keys = find_rows(a, task.request, task.kv_head, 0, position);
  const Rows values = find_rows(a, task.request, task.kv_head, 1, position);
  if (a.cache.type == CacheType::kFloat32) {
    const auto* words = reinterpret_cast<const uint32_t*>(keys.values);
    auto* packed = reinterpret_cast<uint32_t*>(block.keys) + strip * width * kLanes;
    for (int64_t column = 0; column < width; column += kLanes) {
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
    for (int64_t channel = 0; channel < width; channel += kLanes) {
      const int64_t pair = strip * kLanes / 2 + row / 2;
      interleave_halves(halves + row * width + channel, halves + (row + 1) * width + channel,
                        channels + (channel / kLanes * kBlockKeys / 2 + pair) * 32);
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
  float* scores = block.scores + row * kBlockKeys;
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
      store(reinterpret_cast<float*>(block.weights) + row * kBlockKeys + key, weights);
    } else {
      store_bfloat16(reinterpret_cast<uint16_t*>(block.weights) + row * kBlockKeys + key, weights);
    }
  }
  const float factor = before == nothing ? 0.0f : __builtin_expf(before - now);
  block.factors[row] = factor;
  block.sums[row] = block.sums[row] * factor + total(sum);
  block.largest[row] = now;
}

PALLASITE_INLINE void start(const Attention& a, const Task& task, const Block& block) {
  const int64_t width = block.head_width, group = a.num_heads / a.cache.num_kv_heads;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int64_t token = task.first_token + row / group, head = task.kv_head * group + row % group;
    const float* q = a.q + (token * a.num_heads + head) * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats scaled = mul(load(q + i), splat(a.scale));
      if (a.cache.type == CacheType::kFloat32) {
        store(reinterpret_cast<float*>(block.queries) + row * width + i, scaled);
      } else {
        store_bfloat16(reinterpret_cast<uint16_t*>(block.queries) + row * width + i, scaled);
      }
      store(block.mixed + row * width + i, zeros());
    }
    // A sink is a score that adds no value; where keys are in parts, only one has it.
    const bool has_sink = a.sinks != nullptr && task.has_sinks;
    block.largest[row] = has_sink ? a.sinks[head] : -__builtin_inff();
    block.sums[row] = has_sink ? 1.0f : 0.0f;
  }
}

void attend(const Attention& a, const Task& task, std::byte* scratch) {
  const Block block = Block::make(a, task.num_tokens, scratch);
  const int64_t width = block.head_width, group = a.num_heads / a.cache.num_kv_heads;
  const bool is_wide = a.cache.type == CacheType::kFloat32;
  start(a, task, block);
  for (int64_t begin = task.key_begin; begin < task.key_end; begin += kBlockKeys) {
    const int64_t seen = task.key_end - begin < kBlockKeys ? task.key_end - begin : kBlockKeys;
    const int64_t num_strips = (seen + kLanes - 1) / kLanes;
    for (int64_t strip = 0; strip < num_strips; ++strip) {
      const int64_t rest = seen - strip * kLanes;
      pack_rows(a, task, block, strip, begin + strip * kLanes, rest < kLanes ? rest : kLanes);
    }
    for (int64_t strip = 0; strip < num_strips; ++strip) {
      for_tiles(block.num_rows, ScoreTile{block, is_wide, strip});
    }
    for (int64_t row = 0; row < block.num_rows; ++row) {
      const int64_t position = a.positions[task.first_token + row / group];
      const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
      const int64_t last = position + 1 - begin < seen ? position + 1 - begin : seen;
      weigh(a, block, row, num_strips * kLanes, oldest - begin, last);
    }
    for (int64_t strip = 0; strip < width / kLanes; ++strip) {
      for_tiles(block.num_rows, ValueTile{block, is_wide, num_strips * kLanes, strip});
    }
  }
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const int64_t token = task.first_token + row / group, head = task.kv_head * group + row % group;
    float* out = a.out + (token * a.num_heads + head) * width;
    Floats factor = splat(1.0f);
    if (task.part != nullptr) {
      float* part = task.part + row * (2 + width);
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

void merge(const Attention& a, int64_t token, int64_t kv_head, const float* parts,
           int64_t num_parts) {
  const int64_t width = a.cache.head_width, group = a.num_heads / a.cache.num_kv_heads;
  const int64_t stride = group * (2 + width);
  for (int64_t g = 0; g < group; ++g) {
    const float* own = parts + g * (2 + width);
    float most = -__builtin_inff();
    for (int64_t p = 0; p < num_parts; ++p) most = __builtin_fmaxf(most, own[p * stride]);
    float* out = a.out + (token * a.num_heads + kv_head * group + g) * width;
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

void write_rows(const Attention& a, int64_t request, int64_t begin, int64_t end) {
  const int64_t width = a.cache.head_width;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t kv_head = 0; kv_head < a.cache.num_kv_heads; ++kv_head) {
      for (int64_t which = 0; which < 2; ++which) {
        const float* x = a.kv_new + ((token * a.cache.num_kv_heads + kv_head) * 2 + which) * width;
        const Rows rows = find_rows(a, request, kv_head, which, a.positions[token]);
        std::byte* out = const_cast<std::byte*>(rows.values);
        if (a.cache.type == CacheType::kFloat32) {
          std::memcpy(out, x, width * 4);
        } else if (a.cache.type == CacheType::kBfloat16) {
          for (int64_t i = 0; i < width; i += kLanes) {
            store_bfloat16(reinterpret_cast<uint16_t*>(out) + i, load(x + i));
          }
        } else {
          Floats most = zeros();
          for (int64_t i = 0; i < width; i += kLanes) most = max(most, abs(load(x + i)));
          const float scale = largest(most) * (1.0f / 127);
          const bool is_zero = scale < 1.17549435e-38f;
          const Floats inverse = splat(is_zero ? 0.0f : 1.0f / scale);
          for (int64_t i = 0; i < width; i += kLanes) {
            store_int8(reinterpret_cast<int8_t*>(out) + i, to_ints(mul(load(x + i), inverse)));
          }
          *const_cast<float*>(rows.scales) = is_zero ? 0.0f : scale;
        }
      }
    }
  }
}
