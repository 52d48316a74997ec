// Sixteen lanes in four of NEON's registers. Included within a namespace of its own; the names are
// those of simd_avx512.h.

struct Floats {
  float32x4_t part[4];
};
struct Ints {
  int32x4_t part[4];
};
struct Bytes {
  uint8x16_t part[4];
};

constexpr int kMaxRows = 3;
constexpr int32_t kByteZero = 0;

// Each quarter of the result is what `of` makes of the arguments' quarters.
template <typename Out, typename Of>
PALLASITE_INLINE Out by_quarters(const Of& of) {
  Out out;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out.part[i] = of(i);
  return out;
}

PALLASITE_INLINE Floats splat(float x) {
  return by_quarters<Floats>([&](int) { return vdupq_n_f32(x); });
}
PALLASITE_INLINE Floats zeros() { return splat(0.0f); }
PALLASITE_INLINE Floats load(const float* x) {
  return by_quarters<Floats>([&](int i) { return vld1q_f32(x + 4 * i); });
}
PALLASITE_INLINE void store(float* out, Floats x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, x.part[i]);
}
PALLASITE_INLINE void store_away(float* out, Floats x) { store(out, x); }
PALLASITE_INLINE void finish_stores() {}
PALLASITE_INLINE Floats add(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats sub(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats mul(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats div(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return by_quarters<Floats>([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats max(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats min(Floats a, Floats b) {
  return by_quarters<Floats>([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE Floats abs(Floats a) {
  return by_quarters<Floats>([&](int i) { return vabsq_f32(a.part[i]); });
}
PALLASITE_INLINE float total(Floats a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.part[0], a.part[1]), vaddq_f32(a.part[2], a.part[3])));
}
PALLASITE_INLINE float largest(Floats a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[1]), vmaxq_f32(a.part[2], a.part[3])));
}
PALLASITE_INLINE float32x4_t power_of_two(float32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
// In two steps, each of which an exponent of f32 holds.
PALLASITE_INLINE Floats scale_by_power(Floats x, Floats n) {
  return by_quarters<Floats>([&](int i) {
    const float32x4_t half = vrndmq_f32(vmulq_n_f32(n.part[i], 0.5f));
    const float32x4_t rest = vsubq_f32(n.part[i], half);
    return vmulq_f32(vmulq_f32(x.part[i], power_of_two(half)), power_of_two(rest));
  });
}
PALLASITE_INLINE Floats round_to_whole(Floats x) {
  return by_quarters<Floats>([&](int i) { return vrndnq_f32(x.part[i]); });
}
PALLASITE_INLINE Floats load_float16(const uint16_t* x) {
  return by_quarters<Floats>(
      [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * i))); });
}
PALLASITE_INLINE Floats load_int8(const int8_t* x) {
  const int8x16_t bytes = vld1q_s8(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
PALLASITE_INLINE void store_bfloat16(uint16_t* out, Floats x) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.part[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t is_number = vceqq_f32(x.part[i], x.part[i]);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(out + 4 * i, vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16));
  }
}
// The same for what only `dot_bfloat16` reads.
PALLASITE_INLINE void store_for_dot(uint16_t* out, Floats x) { store_bfloat16(out, x); }
PALLASITE_INLINE Ints to_ints(Floats x) {
  return by_quarters<Ints>([&](int i) { return vcvtnq_s32_f32(x.part[i]); });
}
PALLASITE_INLINE Floats to_floats(Ints x) {
  return by_quarters<Floats>([&](int i) { return vcvtq_f32_s32(x.part[i]); });
}
PALLASITE_INLINE Ints splat_int(int32_t x) {
  return by_quarters<Ints>([&](int) { return vdupq_n_s32(x); });
}
PALLASITE_INLINE Ints add_ints(Ints a, Ints b) {
  return by_quarters<Ints>([&](int i) { return vaddq_s32(a.part[i], b.part[i]); });
}
PALLASITE_INLINE void store_int8(int8_t* out, Ints x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(x.part[0]), vqmovn_s32(x.part[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(x.part[2]), vqmovn_s32(x.part[3]));
  vst1q_s8(out, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
PALLASITE_INLINE int32_t total(Ints x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.part[0], x.part[1]), vaddq_s32(x.part[2], x.part[3])));
}
PALLASITE_INLINE void largest_of_four(const Floats (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
}
PALLASITE_INLINE void totals_of_four(const Floats (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(x[i]);
}
PALLASITE_INLINE void totals_of_four(const Ints (&x)[4], int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(x[i]);
}
PALLASITE_INLINE Ints part_of_words(const uint8_t* words, int32_t shift, int32_t mask) {
  return by_quarters<Ints>([&](int i) {
    const uint32x4_t all = vreinterpretq_u32_u8(vld1q_u8(words + 16 * i));
    const uint32x4_t down = vshlq_u32(all, vdupq_n_s32(-shift));
    return vreinterpretq_s32_u32(vandq_u32(down, vdupq_n_u32(static_cast<uint32_t>(mask))));
  });
}
PALLASITE_INLINE Bytes load_bytes(const uint8_t* x) {
  return by_quarters<Bytes>([&](int i) { return vld1q_u8(x + 16 * i); });
}
PALLASITE_INLINE void store_bytes(uint8_t* out, Bytes x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(out + 16 * i, x.part[i]);
}
PALLASITE_INLINE Bytes low_nibbles(Bytes x) {
  return by_quarters<Bytes>([&](int i) { return vandq_u8(x.part[i], vdupq_n_u8(15)); });
}
PALLASITE_INLINE Bytes high_nibbles(Bytes x) {
  return by_quarters<Bytes>([&](int i) { return vshrq_n_u8(x.part[i], 4); });
}

PALLASITE_INLINE int8x16_t spread(const void* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

PALLASITE_INLINE Ints dot_nibbles(Ints sums, Bytes codes, int8x16_t word) {
  return by_quarters<Ints>([&](int i) {
    return vdotq_s32(sums.part[i], vreinterpretq_s8_u8(codes.part[i]), word);
  });
}

PALLASITE_INLINE Ints dot_bytes(Ints sums, Bytes codes, const int8_t* x) {
  const int8x16_t word = spread(x);
  return by_quarters<Ints>([&](int i) {
    const uint8x16_t values = veorq_u8(codes.part[i], vdupq_n_u8(0x80));
    return vdotq_s32(sums.part[i], vreinterpretq_s8_u8(values), word);
  });
}

PALLASITE_INLINE Floats dot_bfloat16(Floats sums, Bytes weights, const uint16_t* x) {
  const uint32x4_t pair = vreinterpretq_u32_s8(spread(x));
  const float32x4_t first = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
  const float32x4_t second = vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000)));
  return by_quarters<Floats>([&](int i) {
    const uint32x4_t own = vreinterpretq_u32_u8(weights.part[i]);
    const float32x4_t low = vreinterpretq_f32_u32(vshlq_n_u32(own, 16));
    const float32x4_t high = vreinterpretq_f32_u32(vandq_u32(own, vdupq_n_u32(0xffff0000)));
    return vfmaq_f32(vfmaq_f32(sums.part[i], low, first), high, second);
  });
}

PALLASITE_INLINE void transpose_words(const uint32_t* rows, int64_t stride, uint32_t* out) {
  for (int r = 0; r < 16; r += 4) {
    for (int c = 0; c < 16; c += 4) {
      const uint32_t* from = rows + r * stride + c;
      const uint32x4x2_t a = vtrnq_u32(vld1q_u32(from), vld1q_u32(from + stride));
      const uint32x4x2_t b =
          vtrnq_u32(vld1q_u32(from + 2 * stride), vld1q_u32(from + 3 * stride));
      for (int i = 0; i < 2; ++i) {
        const uint32x4_t low = vcombine_u32(vget_low_u32(a.val[i]), vget_low_u32(b.val[i]));
        const uint32x4_t high = vcombine_u32(vget_high_u32(a.val[i]), vget_high_u32(b.val[i]));
        vst1q_u32(out + (c + i) * 16 + r, low);
        vst1q_u32(out + (c + 2 + i) * 16 + r, high);
      }
    }
  }
}

PALLASITE_INLINE void interleave_halves(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  for (int i = 0; i < 16; i += 8) {
    const uint16x8x2_t pairs = {{vld1q_u16(a + i), vld1q_u16(b + i)}};
    vst2q_u16(out + 2 * i, pairs);
  }
}

PALLASITE_INLINE Floats select_lanes(Floats x, float other, int64_t begin, int64_t end) {
  float lanes[16];
  store(lanes, x);
  for (int64_t i = 0; i < 16; ++i) lanes[i] = i >= begin && i < end ? lanes[i] : other;
  return load(lanes);
}
