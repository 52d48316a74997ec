"""The largest values of rows against numpy: every instruction set that runs here, and none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.engine.sampler import OK, sample
from pallasite.engine.sampler_state import init_state
from pallasite.pallas_kernels import cpu
from pallasite.pallas_kernels.peaks import find_peaks
from pallasite.pallas_kernels.target import CPU, cpu_target
from tests.engine.neutral_rows import neutral_rows

RUNNING = [name for name in cpu.INSTRUCTIONS if cpu.runs(name)]
TARGETS = [CPU, *map(cpu_target, RUNNING)]
SHAPES = [(B, V) for B in (1, 3, 32) for V in (1, 15, 16, 17, 64, 511, 513, 1000, 4111)] + [
    (1, 49152),
    (32, 49157),
    (2, 16384),
    (2, 16385),
]
INFINITY = np.float32(np.inf)
jitted_find_peaks = jax.jit(find_peaks, static_argnums=1)
jitted_sample = jax.jit(sample, static_argnums=4)

each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.instructions)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def run(values, target):
    """Returns the op's results as numpy arrays."""
    peaks = jitted_find_peaks(jnp.asarray(values), target)
    assert [array.dtype for array in peaks] == [jnp.float32, jnp.int32, jnp.bool_]
    return [np.asarray(array) for array in peaks]


def check(values, target):
    """Compares with numpy: all of rows without a NaN, and of others that they are refused."""
    largest, index, is_finite = run(values, target)
    has_nan = np.isnan(values).any(axis=1)
    np.testing.assert_array_equal(is_finite, (values < INFINITY).all(axis=1))
    np.testing.assert_array_equal(largest[~has_nan], values[~has_nan].max(axis=1))
    np.testing.assert_array_equal(index[~has_nan], values[~has_nan].argmax(axis=1))


@each_target
@each_shape
def test_random_values(target, shape, rng):
    check(rng.standard_normal(shape).astype(np.float32), target)
    check(-np.exp(10 * rng.standard_normal(shape)).astype(np.float32), target)


@each_target
@each_shape
def test_the_first_of_several_is_taken(target, shape, rng):
    check(rng.integers(-3, 2, shape).astype(np.float32), target)
    check(np.full(shape, -2.5, np.float32), target)
    values = rng.standard_normal(shape).astype(np.float32)
    for row in values:
        row[rng.integers(0, shape[1], 3)] = 9
    check(values, target)


@each_target
@each_shape
def test_the_largest_is_found_wherever_it_stands(target, shape, rng):
    V = shape[1]
    places = np.unique(np.concatenate((np.arange(min(V, 40)), V - 1 - np.arange(min(V, 40)))))
    for place in rng.permutation(places)[:8]:
        values = np.full(shape, -INFINITY)
        values[:, place] = np.finfo(np.float32).min
        check(values, target)


@each_target
@each_shape
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_one_value_that_is_no_number(target, shape, value, rng):
    B, V = shape
    for place in (0, V // 2, V - 1, rng.integers(V)):
        values = rng.standard_normal(shape).astype(np.float32)
        values[rng.integers(B), place] = value
        check(values, target)
    check(np.full(shape, value, np.float32), target)


@each_target
def test_zeros_of_both_signs_are_equal(target):
    for zeros in ([-0.0, 0.0], [0.0, -0.0]):
        values = np.float32([[-1.0] * 40 + zeros * 3])
        largest, index, is_finite = run(values, target)
        assert (largest[0], index[0], is_finite[0]) == (0.0, 40, True)


@pytest.mark.skipif(not RUNNING, reason="no body runs here")
@pytest.mark.parametrize("num_rows", [1, 6])
def test_bodies_sample_what_xla_does(num_rows, rng):
    V = 5003
    for kind in ("greedy", "drawn", "banned"):
        logits = jnp.asarray((rng.standard_normal((num_rows, V)) * 3).round(1), jnp.float32)
        rows = neutral_rows(num_rows, 1)
        if kind == "drawn":
            rows.temperature[::2] = 0.9
            rows.top_k[0] = 40
            rows.seed[:] = rng.integers(0, 2**31, num_rows)
        if kind == "banned":
            rows.bans[:, 0, 1] = jnp.argmax(logits, axis=1)
        state, is_live = init_state(num_rows, V), jnp.ones((num_rows,), jnp.bool_)
        expected = jax.device_get(jitted_sample(logits, rows, state, is_live, CPU)[1])
        assert (expected.status == OK).all()
        for instructions in RUNNING:
            target = cpu_target(instructions)
            own = jax.device_get(jitted_sample(logits, rows, state, is_live, target)[1])
            jax.tree.map(np.testing.assert_array_equal, own, expected)


@pytest.mark.skipif(not RUNNING, reason="no body runs here")
@pytest.mark.parametrize(
    ("shape", "results", "message"),
    [
        ((4,), (4,), r"got the values \[4\]; they must be \[B, V\]"),
        ((4, 0), (4,), r"got the values \[4, 0\]; they must be \[B, V\], with V from 1"),
        ((4, 16), (5,), r"got the largest \[5\]; it must be \[4\]"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(shape, results, message):
    outputs = [jax.ShapeDtypeStruct(results, dtype) for dtype in (np.float32, np.int32, np.bool_)]
    call = jax.ffi.ffi_call(cpu.FIND_PEAKS, outputs)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(call(jnp.zeros(shape, jnp.float32), instructions=RUNNING[0]))


def test_instructions_that_are_not_here_are_an_error():
    if cpu.library_path() is None:
        pytest.skip("the bodies are not built here")
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="a processor with none"):
        jax.block_until_ready(find_peaks(jnp.zeros((2, 16)), cpu_target("none")))
