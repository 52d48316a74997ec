"""The TPU's products with matrices in groups: by interpretation, and as programs for every chip.

Tolerance: the oracle's, as for the reference, in test_quantized_matmul.py. Compiling needs libtpu,
the extra `tpu`, and no TPU.
"""

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.pallas_kernels.compile import compile_for
from pallasite.pallas_kernels.quantized_matmul import QuantizedMatrix, tpu
from pallasite.pallas_kernels.target import TARGETS, V6E, V7X, find_target
from tests.pallas_kernels import quantized_programs
from tests.pallas_kernels.compilers import needs_tpu_compiler
from tests.pallas_kernels.test_quantized_matmul import make_case, matrix_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS = ("int4", "int8", "w8a8")
CHIPS = [name for name, target in TARGETS.items() if target.platform == "tpu"]


def run(case, target=V6E, **given):
    matrix = replace(given.get("matrix") or matrix_of(case), target=target)
    assert tpu.takes(1, matrix, jnp.dtype(jnp.bfloat16))
    return np.asarray(tpu.quantized_matmul(jnp.asarray(case.x), matrix, interpret=True))


def is_spread(case):
    """Whether groups' scales are left to the sums."""
    groups_a_chunk = max(1, 128 * case.scales.shape[1] // case.values.shape[1])
    return len(case.x) * groups_a_chunk <= tpu.MOST_SPREAD


def check(case, target=V6E, **given):
    out = run(case, target, **given)
    assert (out.dtype, out.shape) == (np.float32, (len(case.x), len(case.values)))
    expected, tolerance = case.product(BFLOAT16, rounds_weights=not is_spread(case))
    assert np.isfinite(out).all()
    difference = np.abs(out - expected)
    assert (difference <= tolerance).all(), (difference - tolerance).max()


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind):
    @given(
        T=st.integers(1, 150),
        out=st.sampled_from([128, 256, 384]),
        group=st.sampled_from([32, 64, 128, 256]),
        num_inputs=st.sampled_from([512, 768]),
        spread=st.sampled_from([0.3, 3.0]),
        target=st.sampled_from([V6E, V7X]),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=3)
    @example(T=1, out=128, group=32, num_inputs=512, spread=0.3, target=V6E, seed=0)
    @example(T=130, out=256, group=64, num_inputs=768, spread=3.0, target=V7X, seed=1)
    @example(T=513, out=128, group=128, num_inputs=512, spread=0.3, target=V6E, seed=2)
    @example(T=9, out=128, group=256, num_inputs=768, spread=0.3, target=V7X, seed=3)
    # Groups that fill whole vectors are laid out the other way around.
    @example(T=3, out=256, group=32, num_inputs=4096, spread=0.3, target=V6E, seed=4)
    @example(T=20, out=128, group=32, num_inputs=4096, spread=0.3, target=V6E, seed=5)
    def run(T, out, group, num_inputs, spread, target, seed):
        rng = np.random.default_rng(seed)
        check(make_case(rng, kind, T, out, num_inputs // group, group, spread), target)

    run()


@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_read_where_it_is_stacked(kind, T, rng):
    cases = [make_case(rng, kind, T, 128, 16, 32) for _ in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *map(matrix_of, cases))
    for layer, case in enumerate(cases):
        check(case, matrix=replace(stacked, layer=jnp.asarray(layer, jnp.int32)))


@pytest.mark.parametrize("T", [4, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_product_would_be_seen(kind, T, rng):
    case = make_case(rng, kind, T, 128, 16, 32, spread=0.3)
    out = run(case)
    faults = {"a dropped group", "the next row's scale", "the neighbour's scale"}
    if kind == "int4":
        faults |= {"nibbles swapped", "no minimum"}
    for fault in faults:
        wrong, tolerance = case.with_fault(fault).product(
            BFLOAT16, rounds_weights=not is_spread(case)
        )
        assert (np.abs(wrong - out) > 100 * tolerance).mean() > 0.5, fault


@pytest.mark.parametrize("T", [4, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x_size", "scale"), [(1e30, 1e-30), (1e-30, 1e30)])
def test_huge_and_tiny_magnitudes(kind, T, x_size, scale, rng):
    case = make_case(rng, kind, T, 128, 16, 32)
    case.x[:] = case.x * np.float32(x_size)
    case.x[1] = 0
    case.scales[:] = case.scales * np.float32(scale)
    if case.minimums is not None:
        case.minimums[:] = case.minimums * np.float32(scale)
    check(case)


def test_what_is_left_to_xla():
    def takes(num_tokens=4, dtype=jnp.bfloat16, **options):
        shape = {"num_inputs": 1024, "num_rows": 256} | options
        case = quantized_programs.layers(V6E, **shape)
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        matrix = QuantizedMatrix(
            **case.arguments[1], quantizes_inputs=options.get("kind") == "w8a8", layer=layer
        )
        return tpu.takes(num_tokens, matrix, jnp.dtype(dtype))

    assert takes()
    assert takes(kind="int8", group=128)
    assert takes(kind="w8a8", group=32, dtype=jnp.float32)
    assert takes(num_tokens=tpu.MOST_TOKENS)
    assert not takes(num_tokens=tpu.MOST_TOKENS + 1)
    assert takes(kind="w8a8", num_tokens=tpu.MOST_INTEGER_TOKENS)
    assert not takes(kind="w8a8", num_tokens=tpu.MOST_INTEGER_TOKENS + 1)
    assert not takes(dtype=jnp.float32)
    assert not takes(kind="int8", group=None)
    assert not takes(kind="fp8", group=128)
    assert not takes(group=16)
    assert not takes(num_rows=200)
    assert not takes(num_inputs=960, group=96)
    assert not takes(kind="int8", group=2048, num_inputs=4096)


@needs_tpu_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_and_no_part_of_a_matrix_is_copied(chip):
    report = compile_for(f"{quantized_programs.__name__}:of_all_kinds", chip)
    names = [kernel.name.removeprefix("quantized_matmul_") for kernel in report.kernels]
    assert sorted(names) == ["sums", "sums", "sums", "wide"]
    parts = jax.tree.leaves(
        [weights for _, weights in quantized_programs.of_all_kinds(find_target(chip)).arguments]
    )
    stacks = {part.size * part.dtype.itemsize for part in parts}
    matrices = {size // quantized_programs.NUM_LAYERS for size in stacks}
    copied = {copy.num_bytes for copy in report.copies if not copy.is_on_chip}
    assert not copied & (stacks | matrices)
