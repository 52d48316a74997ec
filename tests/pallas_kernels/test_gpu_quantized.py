"""The GPU's products of few tokens, and which products are its own.

They are interpreted or, where tests run on a GPU (`JAX_PLATFORMS=cuda`), run as they are compiled.

Tolerance: the oracle's, as for the reference, in test_quantized_matmul.py.
"""

import re
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.pallas_kernels.quantized_matmul import QuantizedMatrix, gpu
from pallasite.pallas_kernels.target import find_target
from tests.pallas_kernels import quantized_programs
from tests.pallas_kernels.compilers import lowered_for_gpu
from tests.pallas_kernels.quantized_oracle import rounded
from tests.pallas_kernels.test_quantized_matmul import make_case, matrix_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ("int4", "int8", "w8a8", "fp8")


def run(case, matrix=None):
    interpret = jax.default_backend() != "gpu"
    return np.asarray(
        gpu.quantized_matmul(jnp.asarray(case.x), matrix or matrix_of(case), interpret=interpret)
    )


def check(case, matrix=None):
    out = run(case, matrix)
    assert (out.dtype, out.shape) == (np.float32, (len(case.x), len(case.values)))
    expected, tolerance = case.product(BFLOAT16)
    assert np.isfinite(out).all()
    difference = np.abs(out - expected)
    assert (difference <= tolerance).all(), (difference - tolerance).max()


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind):
    @given(
        T=st.integers(1, 140),
        out=st.integers(1, 150),
        num_groups=st.integers(1, 9),
        group=st.sampled_from(gpu.GROUP_SIZES),
        spread=st.sampled_from([0.3, 3.0]),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=8)
    @example(T=1, out=1, num_groups=2, group=32, spread=0.3, seed=0)
    @example(T=129, out=65, num_groups=3, group=64, spread=0.3, seed=1)
    @example(T=16, out=64, num_groups=16, group=128, spread=3.0, seed=2)
    @example(T=5, out=70, num_groups=40, group=32, spread=0.3, seed=3)
    @example(T=3, out=70, num_groups=1, group=256, spread=0.3, seed=4)
    def run(T, out, num_groups, group, spread, seed):
        rng = np.random.default_rng(seed)
        check(make_case(rng, kind, T, out, num_groups, group, spread))

    run()


@pytest.mark.parametrize("kind", ["int8", "w8a8", "fp8"])
@pytest.mark.parametrize("width", [2, 66, 300, 1000])
def test_whole_rows_may_be_of_any_width(kind, width, rng):
    check(make_case(rng, kind, 5, 70, 1, width))


@pytest.mark.parametrize("width", [2, 66, 1000])
def test_floats_stand_for_themselves(width, rng):
    x, values = (rng.standard_normal((n, width)).astype(np.float32) for n in (5, 70))
    matrix = QuantizedMatrix(values=jnp.asarray(values, jnp.bfloat16))
    out = gpu.quantized_matmul(jnp.asarray(x), matrix, interpret=True)
    x, values = rounded(x), rounded(values)
    tolerance = (width + 4) * 2.0**-24 * (np.abs(x) @ np.abs(values).T)
    assert (np.abs(out - x @ values.T) <= tolerance).all()


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_read_where_it_is_stacked(kind, num_groups, rng):
    cases = [make_case(rng, kind, 3, 70, num_groups, 32) for _ in range(3)]
    matrices = [matrix_of(case) for case in cases]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *matrices)
    for layer, case in enumerate(cases):
        matrix = replace(stacked, layer=jnp.asarray(layer, jnp.int32))
        check(case, matrix)
        parts = zip(*map(jax.tree.leaves, (matrix.alone(), matrices[layer])), strict=True)
        assert all(np.array_equal(own, alone) for own, alone in parts)


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_product_would_be_seen(kind, num_groups, rng):
    case = make_case(rng, kind, 24, 17, num_groups, 32, spread=0.3)
    out = run(case)
    faults = {"a dropped group", "the next row's scale"}
    if num_groups > 1:
        faults.add("the neighbour's scale")
    if kind == "int4":
        faults |= {"nibbles swapped", "no minimum"}
    for fault in faults:
        wrong, tolerance = case.with_fault(fault).product(BFLOAT16)
        assert (np.abs(wrong - out) > 100 * tolerance).mean() > 0.5, fault


def lowered(chip="gpu:h100", **options):
    target = find_target(chip)
    case = quantized_programs.layers(target, **options)
    return lowered_for_gpu(target, jax.jit(case.function), *case.arguments)


def is_kernel(text):
    return re.findall(r'name = "(quantized_\w+)"', text) == ["quantized_matmul"]


@pytest.mark.parametrize("chip", ["gpu:h100", "gpu:b200"])
@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_groups_and_few_tokens_are_the_kernels(kind, chip):
    small = {"kind": kind, "num_inputs": 1024, "num_rows": 200}
    for group in gpu.GROUP_SIZES:
        assert is_kernel(lowered(chip, group=group, **small))
    assert is_kernel(lowered(chip, group=32, num_tokens=gpu.MAX_TOKENS, **small))
    assert is_kernel(lowered(chip, group=32, is_stacked=False, **small))


@pytest.mark.parametrize("kind", ["bf16", "int8", "w8a8", "fp8"])
def test_whole_rows_are_xlas_where_they_are_not_stacked(kind):
    small = {"kind": kind, "group": None, "num_inputs": 1000, "num_rows": 200}
    assert is_kernel(lowered(**small))
    assert not is_kernel(lowered(is_stacked=False, **small))
    assert not is_kernel(lowered(num_tokens=gpu.MAX_TOKENS + 1, **small))


def test_what_else_is_left_to_xla():
    def takes(num_tokens=4, dtype=jnp.bfloat16, **options):
        shape = {"num_inputs": 1024, "num_rows": 200} | options
        case = quantized_programs.layers(find_target("gpu"), **shape)
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        matrix = QuantizedMatrix(**case.arguments[1], layer=layer)
        return gpu.takes(num_tokens, matrix, jnp.dtype(dtype))

    assert takes()
    assert not takes(num_tokens=gpu.MAX_TOKENS + 1)
    assert not takes(dtype=jnp.float32)
    assert not takes(group=16)
    assert not takes(group=512)
    assert not takes(num_inputs=960, group=96)
    # Of 2 to 4 GiB, see `is_addressable`.
    assert not takes(num_inputs=2**14, num_rows=2**17)
    assert takes(num_inputs=2**14, num_rows=2**18)


def test_a_cpu_has_no_kernel():
    case = quantized_programs.layers(find_target("cpu"), num_inputs=1024, num_rows=200)
    assert "triton" not in jax.jit(case.function).lower(*case.arguments).as_text()
