"""How floats are held in fewer bits: rows of int8 or fp8 with a scale, and bfloat16 as its bits."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis.extra.numpy import arrays

from pallasite.pallas_kernels.storage import decode, encode, quantize_rows, storage_dtype
from pallasite.pallas_kernels.target import CPU, GPU, V6E

UNIT = 2.0**-24
LARGEST = float(np.float32(3.4e38))
"""A little below f32's largest, which 127 steps of a rounded scale would overstep."""
TINY = float(np.finfo(np.float32).tiny)
LEAST = 127 * TINY
"""The least magnitude of a row that has a scale."""

jitted = jax.jit(quantize_rows)
jitted_fp8 = jax.jit(lambda values: quantize_rows(values, jnp.float8_e4m3fn))


def quantized(values):
    """The rows and scales of `values`, the same compiled as not; shapes and dtypes checked."""
    rows, scales = map(np.asarray, jitted(jnp.asarray(values)))
    for ours, eager in zip((rows, scales), quantize_rows(jnp.asarray(values)), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(eager))
    assert (rows.dtype, scales.dtype) == (np.int8, np.float32)
    assert (rows.shape, scales.shape) == (values.shape, values.shape[:-1])
    return rows.astype(np.float64), scales


def check(values):
    """Every row is within half a step, and uses all steps; or is zeros."""
    rows, scales = quantized(values)
    exact = np.asarray(values).astype(np.float64)
    # Processors that run XLA's code take f32's subnormal numbers for zeros.
    exact[np.abs(exact) < TINY] = 0
    largest = np.abs(exact).max(axis=-1)
    # Just at the least it may be either; nothing is drawn there.
    has_scale = largest >= LEAST
    assert np.isfinite(scales).all()
    assert (scales >= 0).all()
    np.testing.assert_array_equal(scales == 0, ~has_scale)
    np.testing.assert_array_equal(rows[~has_scale], 0)
    np.testing.assert_array_equal(np.abs(rows[has_scale]).max(axis=-1), 127)
    # The scale, its inverse and their product with a value are rounded once each.
    np.testing.assert_allclose(scales[has_scale], largest[has_scale] / 127, rtol=2 * UNIT)
    steps = scales[..., None].astype(np.float64)
    error = np.abs(rows * steps - exact)[has_scale]
    assert (error <= (steps * (0.5 + 127 * 4 * UNIT))[has_scale]).all()
    with np.errstate(over="raise"):
        assert np.isfinite(rows.astype(np.float32) * scales[..., None]).all()


MAGNITUDES = (
    st.floats(0, LARGEST, width=32)
    | st.floats(0, 1, width=32)
    | st.floats(0, float(np.float32(LEAST * 0.999)), width=32)
)


@given(
    arrays(
        np.float32,
        st.sampled_from([(1,), (6,), (4, 5), (2, 3, 4)]),  # a compilation each
        elements=st.builds(lambda size, sign: sign * size, MAGNITUDES, st.sampled_from([-1, 1])),
    )
)
@example(np.zeros((2, 3), np.float32))
@example(np.array([[LARGEST, -LARGEST, 1.0]], np.float32))
def test_any_rows(values):
    check(values)


def test_rows_of_normal_numbers_of_any_size(rng):
    values = rng.standard_normal((4000, 64)) * 10.0 ** rng.uniform(-33, 37, (4000, 1))
    check(values.astype(np.float32))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_16_bit_rows_are_widened_first(dtype, rng):
    values = rng.standard_normal((50, 32)).astype(dtype)
    check(values)
    rows, scales = quantized(values)
    wide_rows, wide_scales = quantized(values.astype(np.float32))
    np.testing.assert_array_equal(rows, wide_rows)
    np.testing.assert_array_equal(scales, wide_scales)


def test_ties_go_to_the_even_number():
    values = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]], np.float32)
    rows, scales = quantized(values)
    np.testing.assert_array_equal(scales, [1])
    np.testing.assert_array_equal(rows, [[127, 0, 2, 2, 0, -2, 126, -126]])


def test_a_scale_has_the_same_bits_whoever_computes_it(rng):
    """A cache's rows are written by kernels too: the definition leaves them no choice."""
    values = (rng.standard_normal((5000, 8)) * 10.0 ** rng.uniform(-30, 30, (5000, 1))).astype("f4")
    _, scales = quantized(values)
    largest = np.abs(values).max(axis=-1)
    np.testing.assert_array_equal(scales, largest * np.float32(1 / 127))
    assert (scales != largest / np.float32(127)).any()  # so the choice is one


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1.1754942e-38, 1.2e-38, 1e-37, 1.49e-36])
def test_rows_too_small_for_a_scale_are_zeros(largest):
    values = np.array([[largest, -largest, 0], [1, largest, -largest]], np.float32)
    rows, scales = quantized(values)
    np.testing.assert_array_equal(rows, [[0, 0, 0], [127, 0, 0]])
    assert scales[0] == 0 < scales[1]


def test_the_smallest_rows_with_a_scale():
    check(np.array([[1.5e-36, -1e-36, 1e-38, 0]], np.float32))


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_rows_of_fp8_are_those_of_their_scaled_values(magnitude, rng):
    """All 448 of a row's largest, and the nearest of fp8's numbers to each other value."""
    values = (rng.standard_normal((3000, 16)) * magnitude).astype(np.float32)
    values[:, 3] *= np.float32(1e-3)  # among fp8's subnormal numbers
    values[7] = 0
    rows, scales = map(np.asarray, jitted_fp8(jnp.asarray(values)))
    assert (rows.dtype, scales.dtype) == (ml_dtypes.float8_e4m3fn, np.float32)
    largest = np.abs(values).max(axis=-1)
    np.testing.assert_array_equal(scales, largest * np.float32(1 / 448))
    assert scales[7] == 0
    wide = rows.astype(np.float64)
    np.testing.assert_array_equal(np.abs(wide).max(axis=-1), np.where(largest == 0, 0, 448))
    inverse = np.float32(1) / np.where(largest == 0, np.float32(1), scales)
    scaled = values * inverse[:, None]
    np.testing.assert_array_equal(rows.view(np.uint8), scaled.astype(rows.dtype).view(np.uint8))
    # Three bits behind the leading one, or steps of 2^-9 where there is none.
    error = np.abs(wide - scaled)
    assert (error <= np.maximum(np.abs(scaled) * 2.0**-4, 2.0**-10)).all()


def test_one_wrong_rounding_would_be_seen(rng):
    """Truncation, a step of 1/128 and one scale for two rows all leave the half step's bound."""
    values = rng.standard_normal((2, 64)).astype(np.float32) * np.float32([[1], [3]])
    largest = np.abs(values).max(axis=-1, keepdims=True)
    steps = largest / 127
    for rows, used in (
        (np.trunc(values / steps), steps),
        (np.round(values * 128 / largest), steps),
        (np.round(values / steps), steps[::-1]),
    ):
        assert (np.abs(rows * used - values) > used * (0.5 + 127 * 4 * UNIT)).any()


def test_bfloat16_is_held_as_bits_where_the_target_says_so():
    assert storage_dtype(jnp.bfloat16, CPU) == jnp.uint16
    for target in (GPU, V6E):
        assert storage_dtype(jnp.bfloat16, target) == jnp.bfloat16
    for target in (CPU, GPU, V6E):
        assert storage_dtype(jnp.float32, target) == jnp.float32


def test_what_is_held_comes_back_rounded(rng):
    values = rng.standard_normal(100).astype(np.float32)
    rounded = values.astype(ml_dtypes.bfloat16)
    bits = np.asarray(encode(jnp.asarray(values), jnp.uint16))
    np.testing.assert_array_equal(bits, rounded.view(np.uint16))
    np.testing.assert_array_equal(np.asarray(decode(jnp.asarray(bits))), rounded)
    for held_as in (jnp.float32, jnp.bfloat16):
        held = encode(jnp.asarray(values), held_as)
        assert held.dtype == held_as
        np.testing.assert_array_equal(np.asarray(decode(held)), values.astype(held_as))
