"""What each device of a mesh holds of weights and caches, and which meshes there are."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.sharding import MeshShape, make_mesh
from pallasite.models.weights import named_weights, num_bytes
from pallasite.pallas_kernels.target import CPU
from tests.models.running import load
from tests.parity.tiny_models import TINY_MODELS
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

DIVISIBLE = replace(TINY, model_width=256, ffn_width=512, num_query_heads=16, num_kv_heads=8)
"""Every size that devices share is a multiple of 8."""
SOME_MESHES = [
    MeshShape(model=2),
    MeshShape(model=8),
    MeshShape(data=2, model=4),
    MeshShape(data=4, model=2),
    MeshShape(data=8),
]


def load_on(mesh, folder, config, rules=()):
    checkpoint = open_checkpoint(write_hf(folder / "model", config, random_tensors(config)))
    return load(checkpoint, mesh=make_mesh(mesh, jax.devices("cpu")), rules=rules)


def bytes_by_device(arrays):
    held = dict.fromkeys(jax.devices("cpu"), 0)
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return [held[device] for device in jax.devices("cpu")]


@pytest.mark.parametrize("form", ["f32", "int8", "int4:8"])
@pytest.mark.parametrize("mesh", SOME_MESHES, ids=str)
def test_each_device_holds_its_part_of_the_weights(mesh, form, tmp_path):
    model = load_on(mesh, tmp_path, DIVISIBLE, (("", form),))
    assert model.partition.notes() == []
    whole = num_bytes(load_on(MeshShape(), tmp_path, DIVISIBLE, (("", form),)))
    assert num_bytes(model) == whole
    arrays = {name: weight[...] for name, weight in named_weights(model)}
    unshared = 0
    for name, array in arrays.items():
        num_parts = mesh.model if "model" in array.sharding.spec else 1
        for shard in array.addressable_shards:
            assert shard.data.nbytes * num_parts == array.nbytes, name
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(array)[shard.index])
        if num_parts == 1 and mesh.model > 1:
            assert array.ndim <= 2 or array.shape[-1] == 1, name  # a norm, or whole rows' scales
            unshared += array.nbytes
    held = bytes_by_device(arrays.values())
    assert held[mesh.num_devices :] == [0] * (8 - mesh.num_devices)
    (each,) = set(held[: mesh.num_devices])
    assert each - unshared == (whole - unshared) / mesh.model
    assert each < 1.05 * whole / mesh.model


@pytest.mark.parametrize("form", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("mesh", SOME_MESHES, ids=str)
def test_each_device_holds_its_part_of_the_cache(mesh, form, tmp_path):
    model = load_on(mesh, tmp_path, DIVISIBLE)
    spec = CacheSpec(partition=model.partition, target=CPU, form=form, num_pages=24)
    arrays = jax.tree.leaves(spec.allocate(make_mesh(mesh, jax.devices("cpu"))))
    assert len(arrays) == (2 if form == "int8" else 1)
    L, K, H = DIVISIBLE.num_layers, DIVISIBLE.num_kv_heads, DIVISIBLE.head_width
    part = (L, 24 // mesh.data, K // mesh.model, 2, CPU.page_size, H)
    for array in arrays:
        assert {shard.data.shape for shard in array.addressable_shards} == {part[: array.ndim]}
    row = {"f32": 4 * H, "bf16": 2 * H, "int8": H + 4}[form]
    assert spec.num_bytes == 24 * L * K * 2 * CPU.page_size * row
    held = bytes_by_device(arrays)
    assert set(held[: mesh.num_devices]) == {spec.num_bytes // mesh.num_devices}
    assert sum(held) == spec.num_bytes


@pytest.mark.parametrize("mesh", SOME_MESHES[:4], ids=str)
def test_what_does_not_divide_costs_the_padding_alone(mesh, tmp_path):
    """A key head for each device, and its share of 3 queries, 131 rows and 58 channels."""
    config = TINY_MODELS["odd-sizes"].config
    L, D, H, n = config.num_layers, config.model_width, config.head_width, mesh.model
    queries = {2: 2, 4: 1, 8: 1}[n]
    vocab, ffn = -(-131 // n), -(-58 // n)
    expected = {
        "embedding": (vocab, D),
        "head": (vocab, D),
        "layers.attention.q": (L, queries * H, D),
        "layers.attention.k": (L, H, D),
        "layers.attention.v": (L, H, D),
        "layers.attention.o": (L, D, queries * H),
        "layers.ffn.gate": (L, ffn, D),
        "layers.ffn.up": (L, ffn, D),
        "layers.ffn.down": (L, D, ffn),
    }
    model = load_on(mesh, tmp_path, config)
    shapes = {}
    for name, weight in named_weights(model):
        if "norm" not in name:
            (shape,) = {shard.data.shape for shard in weight[...].addressable_shards}
            shapes[name.removesuffix(".values")] = shape
    assert shapes == expected
    spec = CacheSpec(partition=model.partition, target=CPU, form="f32", num_pages=8)
    cache = spec.allocate(make_mesh(mesh, jax.devices("cpu"))).values
    part = (L, 8 // mesh.data, 1, 2, CPU.page_size, H)
    assert {shard.data.shape for shard in cache.addressable_shards} == {part}


def test_a_mesh_is_the_first_devices_those_of_a_model_side_by_side():
    devices = jax.devices("cpu")
    mesh = make_mesh(MeshShape(data=2, model=3), devices)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [devices[:3], devices[3:6]]
    assert MeshShape(data=2, model=3).num_devices == 6
    assert str(MeshShape(data=2, model=3)) == "data=2,model=3"
    assert make_mesh(MeshShape(), devices).devices.tolist() == [devices[:1]]


@pytest.mark.parametrize("axis", ["data", "model"])
@pytest.mark.parametrize("size", [0, -1])
def test_an_axis_without_devices_is_refused(axis, size):
    with pytest.raises(ConfigError, match=f"^got a mesh with {axis}={size}; each axis has .*; "):
        MeshShape(**{axis: size})


@pytest.mark.parametrize(
    ("shape", "count", "allowed"),
    [
        ((4, 4), 8, ["data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8"]),
        ((1, 9), 8, ["data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8"]),
        ((2, 4), 6, ["data=6,model=1", "data=3,model=2", "data=2,model=3", "data=1,model=6"]),
        ((2, 1), 1, ["data=1,model=1"]),
    ],
)
def test_too_few_devices_are_refused_with_the_meshes_that_would_do(shape, count, allowed):
    data, model = shape
    devices = jax.devices("cpu")[:count]
    with pytest.raises(ConfigError) as error:
        make_mesh(MeshShape(data=data, model=model), devices)
    got, rest = str(error.value).split("; there ")
    assert got == f"got the mesh data={data},model={model}, which needs {data * model} devices"
    there, offer, change = rest.replace("allowed are ", "").replace(": ", "; ").split("; ")
    assert there == ("is 1" if count == 1 else f"are {count}")
    assert offer.removesuffix(", and smaller ones").split(" or ") == allowed
    assert change == "choose one of these"
    for text in allowed:
        sizes = dict(pair.split("=") for pair in text.split(","))
        shape = MeshShape(**{axis: int(size) for axis, size in sizes.items()})
        assert make_mesh(shape, devices).devices.size == count
