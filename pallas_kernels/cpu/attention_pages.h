// Keys and values from pages into a block. Included within a namespace of its own, after
// attention_block.h.

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

// Copies the scales of sixteen rows, where they have any, the first `count` of them; the others are
// zeros.
PALLASITE_INLINE void copy_scales(const Rows& rows, int64_t count, float* out) {
  if (rows.scales == nullptr) return;
  for (int64_t row = 0; row < kLanes; ++row) out[row] = row < count ? rows.scales[row] : 0.0f;
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
  copy_scales(keys, count, block.key_scales + strip * kLanes);
  copy_scales(values, count, block.value_scales + strip * kLanes);
}
