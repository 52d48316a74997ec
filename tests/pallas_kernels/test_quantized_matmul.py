"""The quantized matmul op against float64 products, for every kind of matrix.

Tolerance: what rounding to f32 can come to, output by output, as the oracle counts it; x and the
values are rounded to bfloat16 or int8 on both sides. It is some 1e-5 of the sum of magnitudes:
`test_a_wrong_product_would_be_seen` asks that the commonest faults lie far above it.
"""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.pallas_kernels.quantized_matmul import (
    QuantizedMatrix,
    dequantize,
    quantized_matmul,
)
from tests.pallas_kernels.quantized_oracle import Case

KINDS = {
    "int8": (np.int8, False),
    "int4": (np.uint8, False),
    "fp8": (ml_dtypes.float8_e4m3fn, False),
    "w8a8": (np.int8, True),
    "w4a8": (np.uint8, True),
}
DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}

jitted = jax.jit(quantized_matmul, static_argnums=2)


def make_case(rng, kind, T, out, num_groups, group, spread=1.0):
    """Random inputs; the magnitudes of tokens, rows and groups lie up to 10**spread apart."""
    dtype, quantizes_inputs = KINDS[kind]
    shape = (out, num_groups * group)

    def magnitudes(*sizes):
        return 10.0 ** rng.uniform(-spread, spread, sizes)

    if dtype == np.uint8:
        values = rng.integers(0, 256, (out, num_groups * group // 2))
    elif kind == "fp8":
        values = np.clip(rng.normal(0, 100, shape), -448, 448)
    else:
        values = rng.integers(-128, 128, shape)
    scales = magnitudes(out, 1) * magnitudes(1, num_groups)
    minimums = None
    if dtype == np.uint8:
        # Those of random groups: some 7 steps below zero.
        minimums = (scales * rng.normal(-7.5, 3, scales.shape)).astype(np.float32)
    return Case(
        x=(rng.standard_normal((T, shape[1])) * magnitudes(T, 1)).astype(np.float32),
        values=values.astype(dtype),
        scales=scales.astype(np.float32),
        minimums=minimums,
        quantizes_inputs=quantizes_inputs,
    )


def matrix_of(case):
    return QuantizedMatrix(
        values=jnp.asarray(case.values),
        scales=jnp.asarray(case.scales),
        minimums=None if case.minimums is None else jnp.asarray(case.minimums),
        quantizes_inputs=case.quantizes_inputs,
    )


def run(case, dtype):
    out = np.asarray(jitted(jnp.asarray(case.x), matrix_of(case), dtype))
    assert out.dtype == np.float32
    assert out.shape == (len(case.x), len(case.values))
    assert np.isfinite(out).all()
    return out


def check(case, dtype):
    out = run(case, dtype)
    expected, tolerance = case.product(dtype)
    difference = np.abs(out - expected)
    assert (difference <= tolerance).all(), (difference - tolerance).max()


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind):
    @given(
        T=st.integers(1, 70),
        out=st.integers(1, 41),
        num_groups=st.sampled_from([1, 1, 2, 3, 5]),
        group=st.sampled_from([2, 6, 16, 32, 66]),
        spread=st.sampled_from([0.3, 3.0, 12.0]),
        dtype=st.sampled_from(sorted(DTYPES)),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=25)
    @example(T=1, out=1, num_groups=1, group=2, spread=0.3, dtype="f32", seed=0)
    @example(T=1, out=1, num_groups=3, group=2, spread=0.3, dtype="bf16", seed=1)
    @example(T=70, out=41, num_groups=1, group=128, spread=0.3, dtype="bf16", seed=2)
    @example(T=33, out=7, num_groups=4, group=32, spread=12.0, dtype="f32", seed=3)
    def run(T, out, num_groups, group, spread, dtype, seed):
        rng = np.random.default_rng(seed)
        check(make_case(rng, kind, T, out, num_groups, group, spread), DTYPES[dtype])

    run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_zeros(kind, num_groups, dtype, rng):
    case = make_case(rng, kind, 5, 7, num_groups, 16)
    case.x[1] = 0
    # Rows are zeros by their values, or by their scales as `quantize_rows` leaves them.
    case.values[2], case.scales[3] = 0, 0
    if case.minimums is not None:
        case.minimums[2:4] = 0
    out = run(case, DTYPES[dtype])
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(out[:, 2:4], 0)
    assert (out[np.ix_([0, 2, 3, 4], [0, 1, 4, 5, 6])] != 0).all()
    check(case, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_size", "scale"), [(1e30, 1e-30), (1e-30, 1e30), (1e18, 1e12)])
def test_huge_and_tiny_magnitudes(kind, num_groups, dtype, x_size, scale, rng):
    case = make_case(rng, kind, 3, 5, num_groups, 32)
    case.x[:] = case.x * np.float32(x_size)
    case.scales[:] = case.scales * np.float32(scale)
    if case.minimums is not None:
        case.minimums[:] = case.minimums * np.float32(scale)
    check(case, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_output_is_its_own_tokens_and_rows_alone(kind, num_groups, dtype, rng):
    """One token in a group that no other uses, times one row: nothing else may move."""
    case = make_case(rng, kind, 6, 9, num_groups, 16)
    before = run(case, DTYPES[dtype])
    case.x[4] *= -3
    case.scales[2] *= 5
    after = run(case, DTYPES[dtype])
    changed = before != after
    assert changed[4].all()
    assert changed[:, 2].all()
    changed[4] = changed[:, 2] = False
    assert not changed.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_product_would_be_seen(kind, num_groups, dtype, rng):
    case = make_case(rng, kind, 24, 17, num_groups, 32, spread=0.3)
    right, tolerance = case.product(DTYPES[dtype])
    assert (np.abs(run(case, DTYPES[dtype]) - right) <= tolerance).all()
    faults = {"a dropped group", "the next row's scale"}
    if case.minimums is not None:
        faults |= {"nibbles swapped", "no minimum"}
    if num_groups > 1:
        faults.add("the neighbour's scale")
    for fault in faults:
        wrong, _ = case.with_fault(fault).product(DTYPES[dtype])
        seen = np.abs(wrong - right) > 100 * tolerance
        assert seen.mean() > 0.5, fault


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rounded_is_rounded(kind, num_groups, rng):
    """Products of x as it is would be seen, as would those of another dtype than was asked for."""
    case = make_case(rng, kind, 24, 17, num_groups, 32, spread=0.3)
    exact = case.x.astype(np.float64) @ case.weight()[0].T
    for dtype in DTYPES.values():
        expected, tolerance = case.product(dtype)
        seen = np.abs(exact - expected) > 10 * tolerance
        is_rounded = case.quantizes_inputs or dtype != np.float32
        assert (seen.mean() > 0.5) == is_rounded


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_matrix_stands_for(kind, num_groups, rng):
    case = make_case(rng, kind, 1, 9, num_groups, 16)
    weight, slack = case.weight()
    held = np.asarray(jax.jit(dequantize)(matrix_of(case)))
    assert held.dtype == np.float32
    assert held.shape == (9, num_groups * 16)
    assert (np.abs(held - weight) <= slack).all()


def test_packing_by_hand():
    """Two groups of four: the first bytes hold 1, 3 and 2, 4; the others 5, 7 and 6, 8."""
    matrix = QuantizedMatrix(
        values=jnp.asarray([[0x31, 0x42, 0x75, 0x86]], jnp.uint8),
        scales=jnp.asarray([[1.0, 10.0]]),
        minimums=jnp.asarray([[0.0, -0.5]]),
    )
    assert (matrix.num_inputs, matrix.num_groups, matrix.is_packed) == (8, 2, True)
    expected = [[1, 2, 3, 4, 49.5, 59.5, 69.5, 79.5]]
    np.testing.assert_array_equal(dequantize(matrix), expected)
    out = quantized_matmul(jnp.eye(8, dtype=jnp.float32), matrix, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(out.T, expected)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_f32_products_are_asked_for_as_such(kind, num_groups, rng):
    """A TPU's default would round their inputs to bfloat16; a CPU makes no difference."""
    case = make_case(rng, kind, 2, 3, num_groups, 16)
    for dtype in DTYPES.values():
        lowered = jitted.lower(jnp.asarray(case.x), matrix_of(case), dtype).as_text()
        (product,) = [line for line in lowered.splitlines() if "dot_general" in line]
        assert ("precision = [HIGHEST, HIGHEST]" in product) == (dtype == np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_must_be_the_matrixs(kind, rng):
    matrix = matrix_of(make_case(rng, kind, 1, 3, 2, 16))
    for width in (16, 31, 33, 64):
        with pytest.raises(ValueError, match=f"got {width} inputs for a matrix of 32"):
            quantized_matmul(jnp.zeros((2, width)), matrix, jnp.dtype(jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_must_be_whole(kind, rng):
    case = make_case(rng, kind, 1, 3, 2, 16)
    ones = jnp.ones((3, 5))
    matrix = QuantizedMatrix(values=jnp.asarray(case.values), scales=ones, minimums=ones)
    with pytest.raises(ValueError, match="got 5 groups of 32 inputs; not whole"):
        quantized_matmul(jnp.zeros((2, 32)), matrix, jnp.dtype(jnp.float32))
