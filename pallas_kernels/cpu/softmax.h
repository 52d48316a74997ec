// Weights of keys from their scores. Included within a namespace of its own, after attention_block.h.

constexpr float kLog2E = 1.44269504f;

// Makes final scores of a row's: scaled, capped, and without keys outside [first, last). Returns the
// largest of each lane.
PALLASITE_INLINE Floats finish_scores(const Attention& a, const Block& block, int64_t row,
                                      int64_t first, int64_t last) {
  float* scores = block.scores + row * block.most_keys;
  const int64_t num_keys = block.keys_of(row);
  const bool is_scaled = a.cache.type == CacheType::kInt8;
  Floats most = splat(-__builtin_inff());
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    Floats some = load(scores + key);
    const bool is_cut = key < first || key + kLanes > last;
    if (is_scaled) some = mul(some, load(block.key_scales + key));
    if (a.soft_cap > 0) {
      // cap * tanh(s / cap), by the logistic function.
      const Floats power = exponential(mul(some, splat(-2 / a.soft_cap)));
      const Floats logistic = div(splat(2.0f), add(splat(1.0f), power));
      some = mul(splat(a.soft_cap), sub(logistic, splat(1.0f)));
    }
    if (is_cut) some = select_lanes(some, -__builtin_inff(), first - key, last - key);
    if (is_scaled || is_cut || a.soft_cap > 0) store(scores + key, some);
    most = max(most, some);
  }
  return most;
}

// Makes weights of a row's scores: two to the power of score / ln 2 - reference. Returns their sum,
// lane by lane.
PALLASITE_INLINE Floats make_weights(const Attention& a, const Block& block, int64_t row,
                                     float reference) {
  const float* scores = block.scores + row * block.most_keys;
  const int64_t num_keys = block.keys_of(row), at = row * block.most_keys;
  const bool is_scaled = a.cache.type == CacheType::kInt8;
  const bool is_wide = a.cache.type == CacheType::kFloat32;
  Floats sum = zeros();
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    // Of a key that is not seen this is exactly 0.
    Floats weights = exponential_of_two(fma(load(scores + key), splat(kLog2E), splat(-reference)));
    sum = add(sum, weights);
    if (is_scaled) weights = mul(weights, load(block.value_scales + key));
    if (is_wide) {
      store(reinterpret_cast<float*>(block.weights) + at + key, weights);
    } else {
      store_for_dot(reinterpret_cast<uint16_t*>(block.weights) + at + key, weights);
    }
  }
  return sum;
}

// Turns the scores of up to four rows into weights. `first` and `last` are each row's keys of the
// block.
PALLASITE_INLINE void weigh(const Attention& a, const Block& block, int64_t row, int64_t count,
                            const int64_t (&first)[4], const int64_t (&last)[4]) {
  constexpr float kNothing = -__builtin_inff();
  Floats each[4] = {splat(kNothing), splat(kNothing), splat(kNothing), splat(kNothing)};
  for (int64_t i = 0; i < count; ++i) {
    each[i] = finish_scores(a, block, row + i, first[i], last[i]);
  }
  float tops[4];
  largest_of_four(each, tops);
  alignas(64) float changes[kLanes] = {}, references[4];
  for (int64_t i = 0; i < count; ++i) {
    const float before = block.largest[row + i], top = tops[i] * kLog2E;
    const float now = before > top ? before : top;
    block.largest[row + i] = now;
    changes[i] = before - now;
    // Nothing is seen yet: any finite number keeps the differences from being NaN.
    references[i] = now == kNothing ? 0.0f : now;
    if (before == kNothing) changes[i] = -1000.0f;
  }
  alignas(64) float factors[kLanes];
  store(factors, exponential_of_two(load(changes)));
  for (Floats& sum : each) sum = zeros();
  for (int64_t i = 0; i < count; ++i) {
    each[i] = make_weights(a, block, row + i, references[i]);
  }
  float sums[4];
  totals_of_four(each, sums);
  for (int64_t i = 0; i < count; ++i) {
    block.factors[row + i] = factors[i];
    block.sums[row + i] = block.sums[row + i] * factors[i] + sums[i];
  }
}
