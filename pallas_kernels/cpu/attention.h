// Attention over a paged cache. Included within a namespace of its own, after attention_block.h,
// attention_pages.h and softmax.h: a block's keys are packed as strips of sixteen, and so are its
// values' channels, and then both are products as any other.
//
// Queries and weights are rounded to bfloat16 where the cache is, or is int8, whose values bfloat16
// holds; scores, sums and an int8 cache's scales are f32. A cache of f32 has f32 products.

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
    block.largest[row] = has_sink ? a.sinks[head] * kLog2E : -__builtin_inff();
    block.sums[row] = has_sink ? 1.0f : 0.0f;
  }
}

// Where a token's keys end in a block of `seen` keys from `begin` on.
PALLASITE_INLINE int64_t last_key(const Attention& a, const Task& task, int64_t begin, int64_t seen,
                                  int64_t token) {
  const int64_t own = a.positions[task.first_token + token] + 1 - begin;
  return own < seen ? own : seen;
}

// Turns the scores of all rows into weights.
PALLASITE_INLINE void weigh_rows(const Attention& a, const Task& task, const Block& block,
                                 int64_t begin, int64_t seen) {
  const int64_t group = a.num_heads / a.cache.num_kv_heads;
  for (int64_t row = 0; row < block.num_rows; row += 4) {
    const int64_t count = row + 4 < block.num_rows ? 4 : block.num_rows - row;
    int64_t first[4], last[4];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (row + i) / group;
      const int64_t position = a.positions[task.first_token + token];
      first[i] = a.window > 0 ? position - a.window + 1 - begin : 0;
      last[i] = last_key(a, task, begin, seen, token);
    }
    weigh(a, block, row, count, first, last);
  }
}

// Attends a block of keys from `begin` on with the queries of one key head.
PALLASITE_INLINE void attend_block(const Attention& a, const Task& task, int64_t kv_head,
                                   const Block& block, int64_t begin, Ahead& ahead) {
  const int64_t group = a.num_heads / a.cache.num_kv_heads;
  const bool is_wide = a.cache.type == CacheType::kFloat32;
  const int64_t rest = task.key_end - begin;
  const int64_t seen = rest < block.most_keys ? rest : block.most_keys;
  // Rows of a tile see different keys: what none of them sees is not computed.
  for (int64_t row = 0; row < block.num_rows; row += kMaxRows) {
    const int64_t end = row + kMaxRows < block.num_rows ? row + kMaxRows : block.num_rows;
    int64_t most = 0;
    for (int64_t own = row; own < end; ++own) {
      const int64_t last = last_key(a, task, begin, seen, own / group);
      most = last > most ? last : most;
    }
    block.ends[row / kMaxRows] = static_cast<int32_t>((most + kLanes - 1) / kLanes * kLanes);
  }
#if defined(PALLASITE_WIDE)
  {
    const auto attend_query = [&](auto rows) PALLASITE_LAMBDA {
      constexpr int kRows = decltype(rows)::value;
      score_query<kRows>(a, task, kv_head, block, begin, seen, ahead);
      weigh_rows(a, task, block, begin, seen);
      mix_query<kRows>(a, task, kv_head, block, begin, seen, ahead);
    };
    if (is_query(a, task, block)) {
      if (block.num_rows == 1) return attend_query(Size<1>{});
      if (block.num_rows == 2) return attend_query(Size<2>{});
      if (block.num_rows == 3) return attend_query(Size<3>{});
      return attend_query(Size<4>{});
    }
  }
#endif
  const int64_t num_strips = (seen + kLanes - 1) / kLanes;
  for (int64_t strip = 0; strip < num_strips; ++strip) {
    const int64_t count = seen - strip * kLanes;
    pack_rows(a, task.request, kv_head, block, strip, begin + strip * kLanes,
              count < kLanes ? count : kLanes, ahead);
  }
  for_tiles(block.num_rows,
            [&](int64_t row) PALLASITE_LAMBDA { return block.keys_of(row) / kLanes; },
            ScoreTile{block, is_wide});
  weigh_rows(a, task, block, begin, seen);
  const int64_t num_channels = block.head_width / kLanes;
  for_tiles(block.num_rows, [=](int64_t) PALLASITE_LAMBDA { return num_channels; },
            ValueTile{block, is_wide});
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
    // A part's NaN comes into the sum, whatever the largest is.
    float most = -__builtin_inff();
    for (int64_t p = 0; p < num_parts; ++p) most = __builtin_fmaxf(most, own[p * stride]);
    const float reference = most == -__builtin_inff() ? 0.0f : most;
    float* out = a.out + (token * a.num_heads + head) * width;
    for (int64_t i = 0; i < width; i += kLanes) store(out + i, zeros());
    float sum = 0;
    for (int64_t p = 0; p < num_parts; ++p) {
      sum += own[p * stride + 1] * __builtin_exp2f(own[p * stride] - reference);
    }
    if (sum == 0) continue;
    for (int64_t p = 0; p < num_parts; ++p) {
      const Floats factor = splat(__builtin_exp2f(own[p * stride] - reference) / sum);
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
