"""The one rules table: it covers every axis that is declared, and places arrays as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallasite.models import kv_cache
from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.loader import load_weights
from pallasite.models.registry import FAMILIES, make_model
from pallasite.models.sharding import MESH_AXES, RULES, make_mesh, replicated, sharding
from pallasite.models.weights import named_weights, placed
from pallasite.pallas_kernels.target import CPU
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

WEIGHT_SPECS = {
    "embedding": PartitionSpec("model", None),
    "layers.attention_norm": PartitionSpec(None, None),
    "layers.ffn_norm": PartitionSpec(None, None),
    "layers.q": PartitionSpec(None, "model", None),
    "layers.k": PartitionSpec(None, "model", None),
    "layers.v": PartitionSpec(None, "model", None),
    "layers.o": PartitionSpec(None, None, "model"),
    "layers.gate": PartitionSpec(None, "model", None),
    "layers.up": PartitionSpec(None, "model", None),
    "layers.down": PartitionSpec(None, None, "model"),
    "final_norm": PartitionSpec(None),
    "head": PartitionSpec("model", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_cover_every_declared_axis(family):
    assert TINY.family == family
    axes = set(kv_cache.AXES)
    for name, weight in named_weights(make_model(TINY, "bf16", CPU)):
        assert len(weight.get_metadata("axes")) == len(weight.shape), name
        axes.update(weight.get_metadata("axes"))
    assert axes == set(RULES)
    assert set(RULES.values()) - {None} <= set(MESH_AXES)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="expert"):
        sharding(make_mesh(jax.devices()[:1]), ("expert", "width"))


def load(tmp_path, num_devices):
    config = TINY
    tensors = random_tensors(config)
    mesh = make_mesh(jax.devices()[:num_devices])
    abstract = placed(make_model(config, "f32", CPU), mesh)
    checkpoint = HfCheckpoint(write_hf(tmp_path / "model", config, tensors))
    return dict(named_weights(load_weights(abstract, checkpoint, mesh))), tensors, mesh


def test_on_one_device_everything_is_on_it(tmp_path):
    weights, _, mesh = load(tmp_path, 1)
    assert mesh.shape == {"data": 1, "model": 1}
    assert {name: w[...].sharding.spec for name, w in weights.items()} == WEIGHT_SPECS
    for weight in weights.values():
        assert weight[...].devices() == {jax.devices()[0]}
        assert weight[...].addressable_shards[0].data.shape == weight.shape


def test_on_two_devices_each_holds_half_of_what_is_sharded(tmp_path):
    weights, tensors, mesh = load(tmp_path, 2)
    assert mesh.shape == {"data": 1, "model": 2}
    for name, weight in weights.items():
        array, spec = weight[...], WEIGHT_SPECS[name]
        assert array.sharding.spec == spec, name
        whole = np.asarray(array)
        source = weight.get_metadata("source")
        expected = [tensors[source.format(layer=layer)] for layer in range(TINY.num_layers)]
        np.testing.assert_array_equal(whole, expected if "{layer}" in source else expected[0])
        shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.device for shard in shards] == jax.devices()[:2]
        if "model" in spec:
            halves = np.split(whole, 2, axis=spec.index("model"))
            for shard, half in zip(shards, halves, strict=True):
                np.testing.assert_array_equal(np.asarray(shard.data), half)
        else:
            for shard in shards:
                np.testing.assert_array_equal(np.asarray(shard.data), whole)


def test_the_cache_is_split_by_key_heads():
    mesh = make_mesh(jax.devices()[:2])
    spec = CacheSpec(model=TINY, target=CPU, dtype=jnp.dtype(jnp.bfloat16), num_pages=3)
    assert spec.shape == (2, 3, 2, 2, 16, 16)
    assert spec.page_bytes == 2 * 2 * 2 * 16 * 16 * 2
    assert spec.num_bytes == 3 * spec.page_bytes
    cache = spec.allocate(mesh)
    assert cache.dtype == jnp.uint16  # the CPU holds bfloat16 as its bits
    assert cache.nbytes == spec.num_bytes
    assert [shard.data.shape for shard in cache.addressable_shards] == [(2, 3, 1, 2, 16, 16)] * 2
    assert not np.asarray(cache).any()
    abstract = spec.abstract(mesh)
    assert (abstract.shape, abstract.dtype) == (cache.shape, cache.dtype)
    assert abstract.sharding == cache.sharding


def test_replicated_means_whole_on_every_device():
    mesh = make_mesh(jax.devices()[:4])
    array = jax.device_put(np.arange(6), replicated(mesh))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 4
