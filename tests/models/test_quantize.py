"""Rounding to the stored forms, held to what the arithmetic allows: half a step of each group.

Everything here is computed again in float64, from the definition of a form's values.
"""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from pallasite.models.errors import ConfigError
from pallasite.models.forms import parse_form
from pallasite.models.quantize import QuantizedTensor, quantize

FORMS = ("int8", "int8:32", "w8a8:48", "int4:32", "int4:2", "int4:96", "fp8")
EPSILON = 2.0**-24
"""Of f32: a rounding moves a number by at most this, relatively."""


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(40, 96))


def heavy_tails(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_cauchy((40, 96)) ** 3


def one_outlier(rng: np.random.Generator) -> np.ndarray:
    weight = rng.normal(size=(40, 96))
    weight[np.arange(40), rng.integers(96, size=40)] = rng.choice([-1e6, 1e6], 40)
    return weight


def far_from_zero(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(40, 96)) + 1e4


def every_size(rng: np.random.Generator) -> np.ndarray:
    """From f32's smallest numbers to its largest, and rows of a size each."""
    signs = rng.choice([-1.0, 1.0], (40, 96))
    return signs * rng.uniform(0.5, 1, (40, 96)) * 2.0 ** np.linspace(-149, 127, 40)[:, None]


def largest_numbers(rng: np.random.Generator) -> np.ndarray:
    return rng.choice([-1.0, 1.0], (40, 96)) * np.finfo(np.float32).max


def zeros_and_constants(rng: np.random.Generator) -> np.ndarray:
    weight = rng.normal(size=(40, 96))
    weight[::2] = 0
    weight[1::4] = -3.7
    weight[3::4, :50] = 0
    return weight


def ties(rng: np.random.Generator) -> np.ndarray:
    """Half steps of a scale of 1, for int8 and for int4."""
    weight = rng.integers(-14, 15, (40, 96)) / 2
    weight[:, ::2] = np.where(rng.random((40, 48)) < 0.5, 7.5, -7.5)
    weight[::2] *= 127 / 7.5
    return weight


WEIGHTS = (
    *(normal, heavy_tails, one_outlier, far_from_zero, every_size, largest_numbers),
    *(zeros_and_constants, ties),
)


def steps(tensor: QuantizedTensor) -> np.ndarray:
    """The scale of every weight, f64 `[out, in]`."""
    return np.repeat(tensor.scales.astype(np.float64), tensor.group, axis=1)


def meant(tensor: QuantizedTensor) -> np.ndarray:
    """What the parts stand for, in float64."""
    values = tensor.values.astype(np.float64) * steps(tensor)
    if tensor.minimums is not None:
        values += np.repeat(tensor.minimums.astype(np.float64), tensor.group, axis=1)
    return values


def largest_error(weight: np.ndarray, tensor: QuantizedTensor, form: str) -> np.ndarray:
    """The bound of each weight's error that `quantize` states, and f32's share of it."""
    groups = np.abs(weight).reshape(len(weight), -1, tensor.group).max(-1)
    largest = np.repeat(groups, tensor.group, axis=1)
    bound = steps(tensor) / 2
    if form == "fp8":
        bound = np.maximum(np.abs(weight) / 16, steps(tensor) / 1024)
    # Roundings of the scale, of the difference to the minimum and of the quotient: each moves
    # what is rounded by an epsilon of the group's largest, or of twice that for a difference.
    f32 = 8 * EPSILON * largest
    # A group whose scale is below f32's normal numbers is held as if it were 0 or flat.
    return np.where(steps(tensor) == 1, np.maximum(bound, 449 * 2.0**-126), bound) + f32


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_no_weight_moves_by_more_than_half_a_step(form, make, rng):
    weight = make(rng).astype(np.float32)
    tensor = quantize(weight, parse_form(form))
    exact = weight.astype(np.float64)
    error = np.abs(meant(tensor) - exact)
    assert np.isfinite(tensor.scales).all()
    assert (tensor.scales > 0).all()
    assert (error <= largest_error(exact, tensor, form)).all()


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_scales_are_the_smallest_that_hold_a_group(form, make, rng):
    weight = make(rng).astype(np.float32)
    tensor = quantize(weight, parse_form(form))
    groups = weight.astype(np.float64).reshape(*tensor.scales.shape, -1)
    if form.startswith("int4"):
        spans = (groups.max(-1) - groups.min(-1)) / 15
        # The difference of two numbers of f32 has the larger one's rounding.
        allowed = 4 * EPSILON * np.abs(groups).max(-1)
        np.testing.assert_array_equal(tensor.minimums, groups.min(-1))
    else:
        spans = np.abs(groups).max(-1) / (448 if form == "fp8" else 127)
        allowed = 2 * EPSILON * spans
    expected = np.where(spans < 2.0**-126, 1, spans)
    is_near_the_limit = np.abs(spans - 2.0**-126) < 2.0**-140
    assert (is_near_the_limit | (np.abs(tensor.scales - expected) <= allowed)).all()


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_the_parts_have_the_types_and_ranges_that_the_forms_say(form, make, rng):
    tensor = quantize(make(rng).astype(np.float32), parse_form(form))
    group = parse_form(form).group or 96
    assert tensor.shape == (40, 96)
    assert tensor.group == group
    assert tensor.scales.shape == (40, 96 // group)
    assert tensor.scales.dtype == np.float32
    if form.startswith("int4"):
        assert tensor.values.dtype == np.uint8
        assert tensor.values.max() <= 15
        assert tensor.minimums.shape == tensor.scales.shape
        assert tensor.minimums.dtype == np.float32
        return
    assert tensor.minimums is None
    assert tensor.values.dtype == (ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8)
    values = tensor.values.astype(np.float32)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= (448 if form == "fp8" else 127)


@pytest.mark.parametrize("form", FORMS)
def test_dequantizing_gives_what_the_parts_stand_for(form, rng):
    tensor = quantize(normal(rng).astype(np.float32), parse_form(form))
    dequantized = tensor.dequantize()
    assert dequantized.dtype == np.float32
    assert dequantized.shape == (40, 96)
    # One rounding of the product, one of the sum: each of a number of at most this size.
    size = np.abs(meant(tensor)) + 15 * steps(tensor)
    assert (np.abs(dequantized - meant(tensor)) <= 2 * EPSILON * size).all()


@pytest.mark.parametrize("group", [32, 64])
def test_what_was_rounded_to_4_bits_before_keeps_its_codes(group, rng):
    """As GGUF's Q4_1 has it: 16 steps of float16 from a minimum of float16, both ends used."""
    codes = rng.integers(16, size=(50, 192 // group, group)).astype(np.uint8)
    codes[..., 0], codes[..., -1] = 0, 15
    scales = rng.uniform(1e-3, 1e-1, codes.shape[:2]).astype(np.float16).astype(np.float32)
    minimums = rng.normal(0, 0.3, codes.shape[:2]).astype(np.float16).astype(np.float32)
    weight = (codes * scales[..., None] + minimums[..., None]).reshape(50, 192)
    tensor = quantize(weight, parse_form(f"int4:{group}"))
    np.testing.assert_array_equal(tensor.values, codes.reshape(50, 192))
    np.testing.assert_array_equal(tensor.minimums, minimums)
    # 15 steps on a minimum, rounded to f32 in the weight, and the fifteenth part of that.
    largest = np.abs(weight).reshape(*scales.shape, -1).max(-1)
    assert (np.abs(tensor.scales - scales) <= 4 * EPSILON * (largest / 15 + scales)).all()


@pytest.mark.parametrize("form", ["int8", "int8:32"])
def test_what_was_rounded_to_8_bits_before_keeps_its_values(form, rng):
    first = quantize(normal(rng).astype(np.float32), parse_form(form))
    again = quantize(first.dequantize(), parse_form(form))
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_allclose(again.scales, first.scales, rtol=3 * EPSILON)


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_belongs_to_its_own_group(form, rng):
    """Other rows and groups change nothing, nor does where the rows are cut into blocks."""
    weight = normal(rng).astype(np.float32)
    group = parse_form(form).group or 96
    whole = quantize(np.tile(weight, (200, 1)), parse_form(form))
    for row, first in ((0, 0), (7980, 0), (7999, 96 - group)):
        part = weight[row % 40, first : first + group]
        alone = quantize(part[None], parse_form(form.replace("w8a8", "int8")))
        np.testing.assert_array_equal(whole.values[row, first : first + group], alone.values[0])
        assert whole.scales[row, first // group] == alone.scales[0, 0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("form", FORMS)
def test_the_weight_may_have_any_type_and_layout_and_stays_as_it_is(form, dtype, rng):
    weight = normal(rng).astype(dtype)
    before = weight.copy()
    expected = quantize(weight.astype(np.float32), parse_form(form))
    for given in (weight, np.asfortranarray(weight)):
        tensor = quantize(given, parse_form(form))
        np.testing.assert_array_equal(tensor.dequantize(), expected.dequantize())
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("form", ["int8", "int4:32", "fp8"])
def test_rounding_takes_little_memory_beside_its_result(form, rng):
    weight = rng.normal(size=(2048, 1024)).astype(ml_dtypes.bfloat16)
    tracemalloc.start()
    try:
        tensor = quantize(weight, parse_form(form))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    parts = (tensor.values, tensor.scales, tensor.minimums)
    result = sum(part.nbytes for part in parts if part is not None)
    # A block is 1 MiB of f32; a copy of the weight in f32 would be 8.
    assert peak < result + (5 << 20)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("int8:36", "int8:36.*rows of 96.*16, 24, 32, 48, 96"),
        ("int4:64", "int4:64.*rows of 96"),
    ],
)
def test_a_group_that_does_not_divide_the_rows_is_named(form, named):
    with pytest.raises(ConfigError, match=named):
        quantize(np.zeros((2, 96), np.float32), parse_form(form))


def test_where_no_usual_group_divides_the_rows_the_whole_row_is_named():
    with pytest.raises(ConfigError, match=r"rows of 7;.*only the whole row"):
        quantize(np.zeros((2, 7), np.float32), parse_form("int4"))
