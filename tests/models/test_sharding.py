"""The one rules table: it covers every axis that is declared, and places arrays as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallasite.models import kv_cache
from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.partition import Partition
from pallasite.models.registry import make_model
from pallasite.models.sharding import DATA_AXIS, MODEL_AXIS, RULES, replicated, sharding
from pallasite.models.weights import declared_weights, named_weights, source_of
from pallasite.pallas_kernels.target import CPU, cpu_target
from tests.families import FAMILY_MODELS
from tests.models.running import load, mesh_of
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

WEIGHT_SPECS = {
    "embedding.values": PartitionSpec("model", None),
    "layers.attention_norm.scale": PartitionSpec(None, None),
    "layers.ffn_norm.scale": PartitionSpec(None, None),
    "layers.attention.q.values": PartitionSpec(None, "model", None),
    "layers.attention.k.values": PartitionSpec(None, "model", None),
    "layers.attention.v.values": PartitionSpec(None, "model", None),
    "layers.attention.o.values": PartitionSpec(None, None, "model"),
    "layers.ffn.gate.values": PartitionSpec(None, "model", None),
    "layers.ffn.up.values": PartitionSpec(None, "model", None),
    "layers.ffn.down.values": PartitionSpec(None, None, "model"),
    "final_norm.scale": PartitionSpec(None),
    "head.values": PartitionSpec("model", None),
}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_rules_cover_every_declared_axis(name):
    config = FAMILY_MODELS[name].config
    axes = {*kv_cache.AXES, "slots", "ranks"}
    declared = [(CPU, ()), (CPU, (("proj", "int8"),)), (cpu_target("avx2"), ())]
    for target, rules in declared:
        for name, weight in named_weights(make_model(config, "bf16", target, rules=rules)):
            assert len(weight.get_metadata("axes")) == len(weight.shape), name
            axes.update(weight.get_metadata("axes"))
    # Matrices of few or odd rows do not lie in strips.
    assert axes | {"tile"} == set(RULES)
    assert set(RULES.values()) - {None} == {DATA_AXIS, MODEL_AXIS}


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="expert"):
        sharding(mesh_of(), ("expert", "width"))


def load_tiny(tmp_path, num_devices):
    tensors = random_tensors(TINY)
    mesh = mesh_of(model=num_devices)
    checkpoint = HfCheckpoint(write_hf(tmp_path / "model", TINY, tensors))
    return load(checkpoint, mesh=mesh), tensors, mesh


def test_on_one_device_everything_is_on_it(tmp_path):
    model, _, mesh = load_tiny(tmp_path, 1)
    weights = dict(named_weights(model))
    assert mesh.shape == {"data": 1, "model": 1}
    assert {name: w[...].sharding.spec for name, w in weights.items()} == WEIGHT_SPECS
    for weight in weights.values():
        assert weight[...].devices() == {jax.devices()[0]}
        assert weight[...].addressable_shards[0].data.shape == weight.shape


def test_on_two_devices_each_holds_half_of_what_is_sharded(tmp_path):
    model, tensors, mesh = load_tiny(tmp_path, 2)
    assert mesh.shape == {"data": 1, "model": 2}
    for (name, weight), (_, declared) in zip(
        named_weights(model), declared_weights(model), strict=True
    ):
        array, spec = weight[...], WEIGHT_SPECS[name]
        assert array.sharding.spec == spec, name
        whole = np.asarray(array)
        source = source_of(declared)
        expected = [tensors[part] for part in source.names(TINY.num_layers)]
        np.testing.assert_array_equal(whole, expected if source.is_stacked else expected[0])
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
    mesh = mesh_of(model=2)
    spec = CacheSpec(
        partition=Partition(config=TINY, num_parts=2), target=CPU, form="bf16", num_pages=3
    )
    assert spec.shape == (2, 3, 2, 2, 16, 16)
    assert spec.page_bytes == 2 * 2 * 2 * 16 * 16 * 2
    assert spec.num_bytes == 3 * spec.page_bytes
    cache = spec.allocate(mesh).values
    assert cache.dtype == jnp.uint16  # the CPU holds bfloat16 as its bits
    assert cache.nbytes == spec.num_bytes
    assert [shard.data.shape for shard in cache.addressable_shards] == [(2, 3, 1, 2, 16, 16)] * 2
    assert not np.asarray(cache).any()
    abstract = spec.abstract(mesh).values
    assert (abstract.shape, abstract.dtype) == (cache.shape, cache.dtype)
    assert abstract.sharding == cache.sharding


def test_replicated_means_whole_on_every_device():
    mesh = mesh_of(model=4)
    array = jax.device_put(np.arange(6), replicated(mesh))
    assert [shard.data.shape for shard in array.addressable_shards] == [(6,)] * 4
