// Rows as products take them: int8 in groups, or bfloat16. Included within a namespace of its own,
// after groups.h.

#if !defined(PALLASITE_WIDE)
// Takes from each of four times 32 floats, sixteen in `a` and sixteen in `b`, the first of the largest
// magnitude: says where it is, and gives the largest magnitude of what is left, NaN where any float is.
PALLASITE_INLINE void take_largest(Floats (&a)[4], Floats (&b)[4], float* kept, int32_t* places,
                                   float* left) {
  for (int i = 0; i < 4; ++i) {
    float lanes[32];
    store(lanes, a[i]);
    store(lanes + 16, b[i]);
    bool has_nan = false;
    for (const float lane : lanes) has_nan |= lane != lane;
    const float magnitude = largest(max(abs(a[i]), abs(b[i])));
    int32_t place = 0;
    while (place < 31 && __builtin_fabsf(lanes[place]) != magnitude) ++place;
    places[i] = place;
    kept[i] = lanes[place];
    lanes[place] = 0.0f;
    a[i] = load(lanes);
    b[i] = load(lanes + 16);
    left[i] = has_nan ? __builtin_nanf("") : largest(max(abs(a[i]), abs(b[i])));
  }
}
#endif

// Rounds some groups of a row to int8, each with a scale, as `quantize_rows` defines it, but for the
// largest of each. `value` gives sixteen of the row's floats.
template <typename Value>
PALLASITE_INLINE void quantize_groups(const Value& value, const Rounded& to, int64_t at,
                                      int64_t begin, int64_t count) {
  Floats first[4], second[4];
  for (int64_t i = 0; i < 4; ++i) {
    first[i] = i < count ? value((begin + i) * kGroup) : zeros();
    second[i] = i < count ? value((begin + i) * kGroup + kLanes) : zeros();
  }
  float scales[4], inverses[4], kept[4];
  int32_t places[4], sums[4];
  take_largest(first, second, kept, places, scales);
  for (int64_t i = 0; i < 4; ++i) {
    scales[i] *= 1.0f / 127;
    const bool is_zero = scales[i] < 1.17549435e-38f;
    inverses[i] = is_zero ? 0.0f : 1.0f / scales[i];
    scales[i] = is_zero ? 0.0f : scales[i];
  }
  Ints integers[4];
  for (int64_t i = 0; i < count; ++i) {
    const Floats inverse = splat(inverses[i]);
    const Ints low = to_ints(mul(first[i], inverse)), high = to_ints(mul(second[i], inverse));
    int8_t* values = to.values + (at + (begin + i) * kTileRows) * kGroup;
    store_int8(values, low);
    store_int8(values + kLanes, high);
    integers[i] = add_ints(low, high);
  }
  for (int64_t i = count; i < 4; ++i) integers[i] = splat_int(0);
  totals_of_four(integers, sums);
  for (int64_t i = 0; i < count; ++i) {
    Group& group = to.groups[at + (begin + i) * kTileRows];
    group.scale = scales[i];
    group.largest = kept[i];
    group.place = places[i];
    group.sum = kept[i] + scales[i] * static_cast<float>(sums[i]);
    group.whole_sum = sums[i];
    prepare_pair(group);
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
