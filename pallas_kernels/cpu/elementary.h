// Elementary functions on sixteen lanes. Included within a namespace of its own, after simd_*.h.

// exp(x), to two units in the last place; 0 below -87.3 and infinite above 88.7, NaN for NaN.
// The polynomial is the truncated series on half an octave around 0, with ln 2 split in two so that
// the reduction is exact.
PALLASITE_INLINE Floats exponential(Floats x) {
  // The order of the arguments keeps NaNs.
  x = max(splat(-104.0f), min(splat(104.0f), x));
  const Floats n = round_to_whole(mul(x, splat(1.44269504f)));
  Floats r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

// Two to the power of x, to one unit in the last place; 0 below -150, NaN for NaN.
// The polynomial is the one of least relative error on half a unit around 0 that is 1 at 0.
PALLASITE_INLINE Floats exponential_of_two(Floats x) {
  // The order of the arguments keeps NaNs.
  x = max(splat(-200.0f), x);
  const Floats n = round_to_whole(x);
  const Floats r = sub(x, n);
  Floats p = splat(0.00015353362f);
  p = fma(p, r, splat(0.0013398875f));
  p = fma(p, r, splat(0.00961843692f));
  p = fma(p, r, splat(0.0555033237f));
  p = fma(p, r, splat(0.240226477f));
  p = fma(p, r, splat(0.693147182f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}
