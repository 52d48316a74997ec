"""The cache's shape on every target, and models that run on a cache laid out as a target's is."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.models.kv_cache import CacheSpec
from pallasite.models.partition import Partition
from pallasite.pallas_kernels import paged_attention
from pallasite.pallas_kernels.paged_attention import reference
from pallasite.pallas_kernels.target import CPU, H100, V6E, V7X
from tests.models.running import mesh_of
from tests.parity.forward import Forward
from tests.parity.tiny_models import TINY_MODELS
from tests.tiny_checkpoints import TINY, write_hf

L, K = TINY.num_layers, TINY.num_kv_heads


def spec(target, form="f32", **changes):
    partition = Partition(config=replace(TINY, **changes))
    return CacheSpec(partition=partition, target=target, form=form, num_pages=7)


@pytest.mark.parametrize(
    ("target", "head_width", "page"),
    [
        (CPU, 16, (2, 16, 16)),
        (CPU, 80, (2, 16, 80)),
        (H100, 64, (2, 32, 64)),
        (V6E, 16, (1, 128, 128)),
        (V6E, 64, (1, 128, 128)),
        (V6E, 80, (2, 128, 128)),
        (V7X, 128, (2, 128, 128)),
        (V7X, 256, (2, 128, 256)),
    ],
)
def test_rows_lie_as_the_target_says(target, head_width, page):
    assert spec(target, head_width=head_width).shape == (L, 7, K, *page)
    assert spec(target, head_width=head_width).scales_shape is None
    for form in ("int8", "fp8"):
        quantized = spec(target, form, head_width=head_width)
        assert quantized.shape == (L, 7, K, *page)
        assert quantized.scales_shape == (L, 7, K, 2, target.page_size)


@pytest.mark.parametrize(
    ("form", "target", "dtype", "row_bytes"),
    [
        ("f32", CPU, jnp.float32, 2 * 16 * 4),
        ("bf16", CPU, jnp.uint16, 2 * 16 * 2),
        ("int8", CPU, jnp.int8, 2 * (16 + 4)),
        ("bf16", V6E, jnp.bfloat16, 128 * 2),
        ("int8", V6E, jnp.int8, 128 + 2 * 4),
        ("fp8", V7X, jnp.float8_e4m3fn, 128 + 2 * 4),
        ("fp8", H100, jnp.float8_e4m3fn, 2 * (16 + 4)),
    ],
)
def test_bytes_are_those_of_the_arrays(form, target, dtype, row_bytes):
    held = spec(target, form)
    cache = held.allocate(mesh_of())
    assert (cache.values.shape, cache.values.dtype) == (held.shape, dtype)
    assert (cache.scales is None) == (form in ("f32", "bf16"))
    scales_bytes = 0 if cache.scales is None else cache.scales.nbytes
    assert held.num_bytes == cache.values.nbytes + scales_bytes
    assert held.page_bytes == L * K * target.page_size * row_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny = TINY_MODELS["groups-of-3-tied"]
    return write_hf(tmp_path_factory.mktemp("model"), tiny.config, tiny.tensors())


SIZE = 40
CHUNKS = [SIZE, 25, *[1] * 3]


@pytest.mark.parametrize("cache", ["f32", "int8", "fp8"])
@pytest.mark.parametrize("target", [V7X, H100], ids=lambda target: target.name)
def test_a_model_attends_over_its_targets_cache(target, cache, folder, monkeypatch):
    """By the definition in place of kernels: what is cached and how, not where, makes a logit."""
    seen = []

    def body(q, kv_new, held, layer, ragged, config, sinks):
        seen.append((config.target, held.values.shape[3:], held.scales is not None))
        return reference.paged_attention(q, kv_new, held, layer, ragged, config, sinks)

    monkeypatch.setitem(paged_attention._BODIES, target.platform, body)
    token_ids = TINY_MODELS["groups-of-3-tied"].token_ids()[: sum(CHUNKS)]
    ours = Forward(folder, "f32", SIZE, cache=cache, target=target).logits(token_ids, CHUNKS)
    width = TINY_MODELS["groups-of-3-tied"].config.head_width
    R, W = target.cache_row(width)
    assert set(seen) == {(target, (R, target.page_size, W), cache != "f32")}
    right = Forward(folder, "f32", SIZE, cache=cache).logits(token_ids, CHUNKS)
    assert right.std() > 0.1 * np.abs(right).max()
    np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * np.abs(right).max())
