"""The layers against numpy in float64, and the exactness that `linear` promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallasite.models.config import Llama3Rope
from pallasite.models.forms import parse_form
from pallasite.models.layers import embed, fine_linear, linear, rms_norm, rope, rope_frequencies
from pallasite.models.weights import Matrix, Source, Weight, compute_dtype
from pallasite.pallas_kernels.paged_attention import rotate
from tests.models.running import mesh_of
from tests.tiny_checkpoints import TINY, llama3_divisors

EPS = np.finfo(np.float32).eps
LLAMA31 = Llama3Rope(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_len=8192
)


def bfloat16(values):
    return np.asarray(values).astype(ml_dtypes.bfloat16)


def held(values, form):
    """A matrix as the loader holds it: f32, bfloat16, or the bits of bfloat16."""
    base = "f32" if form == "f32" else "bf16"
    values = np.asarray(values, np.float32)
    array = values if form == "f32" else bfloat16(values)
    array = array.view(np.uint16) if form == "bits" else array
    source = Source(name="w", shape=values.shape)
    parts = {"values": Weight(jnp.asarray(array), axes=("width", "width"))}
    return Matrix(parts, ("width", "width"), (parse_form(base), compute_dtype(base), source))


@pytest.mark.parametrize("form", ["f32", "bf16", "bits"])
def test_linear_is_a_product_summed_in_f32(rng, form):
    x = rng.standard_normal((7, 300)).astype(np.float32)
    w = rng.standard_normal((50, 300)).astype(np.float32)
    y = np.asarray(linear(jnp.asarray(x), held(w, form)))
    if form != "f32":
        x, w = bfloat16(x), bfloat16(w)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    # The bound of any order of summation would be 300 eps; random signs leave about its root.
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    assert y.dtype == np.float32
    assert (np.abs(y - expected) <= np.sqrt(300) * EPS * magnitude / 2).all()


def test_an_f32_product_keeps_what_bfloat16_loses(rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    exact = np.asarray(linear(jnp.asarray(x), held(w, "f32")))
    rounded = np.asarray(linear(jnp.asarray(x), held(w, "bf16")))
    assert np.abs(exact - expected).max() < 1e-5
    assert np.abs(rounded - expected).max() > 1e-2


def test_linear_rounds_its_input_to_nearest_even():
    # 1 + 2**-8 lies halfway between two bfloat16 values; so does 1 + 3 * 2**-8.
    x = jnp.asarray([[1 + 2**-8], [1 + 3 * 2**-8], [1 + 2**-8 + 2**-16]], jnp.float32)
    y = np.asarray(linear(x, held([[1.0]], "bits")))
    np.testing.assert_array_equal(y[:, 0], [1.0, 1 + 2**-6, 1 + 2**-7])


@pytest.mark.parametrize("form", ["bf16", "bits"])
def test_a_fine_product_keeps_16_bits_of_its_input(rng, form):
    x = rng.standard_normal((5, 64)).astype(np.float32)
    w = bfloat16(rng.standard_normal((8, 64)))
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    plain = np.asarray(linear(jnp.asarray(x), held(w, form)))
    fine = np.asarray(fine_linear(jnp.asarray(x), held(w, form)))
    # What two roundings to 8 bits leave is at most 2**-17 of each term.
    assert (np.abs(fine - expected) <= magnitude * 2.0**-16).all()
    assert np.abs(plain - expected).max() > 50 * np.abs(fine - expected).max()


def test_a_fine_product_with_an_f32_weight_is_the_plain_one(rng):
    x, w = rng.standard_normal((2, 6, 32)).astype(np.float32)
    fine, plain = (f(jnp.asarray(x), held(w, "f32")) for f in (fine_linear, linear))
    np.testing.assert_array_equal(np.asarray(fine), np.asarray(plain))


@pytest.mark.parametrize("form", ["f32", "bf16", "bits"])
def test_embed_returns_the_rows_themselves(rng, form):
    table = rng.standard_normal((11, 6)).astype(np.float32)
    ids = np.array([3, 10, 0, 3], np.int32)
    embedding = held(table, form)
    lookup = jax.shard_map(
        lambda ids: embed(ids, embedding),
        mesh=mesh_of(),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    rows = np.asarray(lookup(jnp.asarray(ids)))
    expected = table if form == "f32" else bfloat16(table).astype(np.float32)
    np.testing.assert_array_equal(rows, expected[ids])


def test_rms_norm(rng):
    x = (rng.standard_normal((5, 77)) * 10.0 ** rng.integers(-4, 4, (5, 1))).astype(np.float32)
    scale = rng.standard_normal(77).astype(np.float32)
    y = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5))
    x = x.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(y, expected, rtol=8 * EPS, atol=0)


def test_rms_norm_of_zeros_is_zeros():
    y = np.asarray(rms_norm(jnp.zeros((1, 8)), jnp.ones(8), 1e-6))
    np.testing.assert_array_equal(y, 0)


def test_rope_frequencies_without_scaling():
    expected = [10000.0 ** (-2 * i / 16) for i in range(8)]
    np.testing.assert_allclose(rope_frequencies(TINY), [expected] * 2, rtol=EPS)


@pytest.mark.parametrize("theta", [500000.0, 10000.0])
def test_rope_frequencies_with_llama3_scaling(theta):
    """Those of a published Llama 3.1 head, 128 wide, divided as Meta's code divides them."""
    config = replace(TINY, head_width=128, rope_theta=theta, rope_scaling=LLAMA31)
    plain = theta ** (-np.arange(0, 128, 2) / 128)
    divisors = llama3_divisors(LLAMA31, 128, theta).astype(np.float64)
    assert divisors.min() == 1.0
    assert divisors.max() == 8.0
    assert ((divisors > 1.0) & (divisors < 8.0)).sum() >= 5
    np.testing.assert_allclose(rope_frequencies(config)[1], plain / divisors, rtol=4 * EPS)


def test_rope_turns_each_pair_by_its_angle(rng):
    frequencies = rope_frequencies(TINY)[0]
    x = rng.standard_normal((6, 3, 16)).astype(np.float32)
    positions = np.array([0, 1, 2, 100, 511, 8000], np.int32)
    y = np.asarray(rotate(jnp.asarray(x), rope(jnp.asarray(positions), frequencies)))
    # A pair of dimensions as one complex number.
    pairs = x[..., :8].astype(np.float64) + 1j * x[..., 8:]
    turned = pairs * np.exp(1j * positions[:, None, None] * frequencies.astype(np.float64))
    # An angle of 8,000 radians is rounded by half of its own last place: 2.4e-4.
    tolerance = 8 * EPS * (1 + positions[:, None, None])
    assert (np.abs(y[..., :8] - turned.real) <= tolerance).all()
    assert (np.abs(y[..., 8:] - turned.imag) <= tolerance).all()
    np.testing.assert_array_equal(y[0], x[0])


def test_rope_makes_scores_depend_on_distance_alone(rng):
    frequencies = rope_frequencies(TINY)[0]
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(q_position, k_position):
        at = [rope(jnp.asarray([p], jnp.int32), frequencies) for p in (q_position, k_position)]
        turned = (rotate(jnp.asarray(x), own) for x, own in zip((q, k), at, strict=True))
        return float(np.vdot(*(np.asarray(x) for x in turned)))

    assert score(130, 127) == pytest.approx(score(3, 0), abs=1e-4)
    assert abs(score(130, 127) - score(130, 120)) > 1e-2
