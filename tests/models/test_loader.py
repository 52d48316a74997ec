"""The loader: what it refuses before it allocates, where each value lands, how little it holds."""

import tracemalloc
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from pallasite.models import host_layout, loader
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import CheckpointError
from pallasite.models.loader import check_tensors
from pallasite.models.registry import make_model
from pallasite.models.weights import Matrix, declared_weights, named_weights, source_of
from pallasite.pallas_kernels.target import CPU, GPU
from tests.models.running import load, mesh_of
from tests.tiny_checkpoints import TINY, random_tensors, write_gguf, write_hf

GATE = "model.layers.1.mlp.gate_proj.weight"


class InMemory:
    """A checkpoint of arrays, which notes what is read."""

    def __init__(self, tensors, config=TINY):
        self.config = config
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.reads = []
        self._tensors = tensors

    def read(self, name, form=None):
        self.reads.append(name)
        return self._tensors[name]


def renamed(tensors, old, new):
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named_and_nothing_is_read_or_allocated(name):
    tensors = random_tensors(TINY)
    shape = list(tensors.pop(name).shape)
    refused(tensors, rf"no tensor {name}.*{shape[0]}, {shape[1]}")


def test_a_surplus_tensor_is_named_and_nothing_is_read_or_allocated():
    name = "model.layers.0.self_attn.q_proj.bias"
    refused(random_tensors(TINY) | {name: np.zeros(64, np.float32)}, f"has a tensor {name}")


def test_a_layer_too_many_is_surplus():
    tensors = random_tensors(TINY)
    tensors["model.layers.2.mlp.gate_proj.weight"] = tensors[GATE]
    refused(tensors, r"has a tensor model\.layers\.2\.mlp\.gate_proj\.weight")


def test_a_head_beside_a_tied_embedding_is_surplus():
    config = replace(TINY, ties_embedding=True)
    refused(random_tensors(TINY), r"has a tensor lm_head\.weight", config)


@pytest.mark.parametrize("shape", [(64, 128), (128, 63), (128, 64, 1), (8192,)])
def test_a_misshapen_tensor_is_named_and_nothing_is_read_or_allocated(shape):
    tensors = random_tensors(TINY)
    tensors[GATE] = np.zeros(shape, np.float32)
    sizes = ", ".join(map(str, shape))
    refused(tensors, rf"{GATE} has the shape \[{sizes}\].*needs \[128, 64\]")


def refused(tensors, message, config=TINY):
    checkpoint = InMemory(tensors, config)
    before = {id(array) for array in jax.live_arrays()}
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)
    assert checkpoint.reads == []
    assert [array for array in jax.live_arrays() if id(array) not in before] == []


def test_the_check_alone_reads_nothing():
    checkpoint = InMemory(random_tensors(TINY))
    check_tensors(make_model(TINY, "f32", CPU), checkpoint)
    assert checkpoint.reads == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_value_that_is_not_finite_is_refused_by_its_tensors_name(tmp_path, value, dtype):
    tensors = random_tensors(TINY)
    tensors[GATE][127, 63] = value
    with pytest.raises(CheckpointError, match=GATE):
        load(open_checkpoint(write_hf(tmp_path / "model", TINY, tensors, dtype=dtype)))


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_value_that_is_not_finite_in_a_gguf_is_refused_by_its_tensors_name(tmp_path, kind):
    tensors = random_tensors(TINY)
    tensors[GATE][0, 0] = np.nan
    # GGUF's own name for it is what its reader knows.
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate\.weight|mlp\.gate_proj"):
        load(open_checkpoint(write_gguf(tmp_path / "model.gguf", TINY, tensors, kind)))


@pytest.mark.parametrize("target", [CPU, GPU], ids=lambda target: target.name)
@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_every_value_lands_in_its_place(form, target):
    tensors = random_tensors(TINY, seed=5)
    model = load(InMemory(tensors), form, target)
    used = set()
    for path, weight in declared_weights(model):
        source = source_of(weight)
        names = source.names(TINY.num_layers)
        used.update(names)
        held = np.asarray(weight.values if isinstance(weight, Matrix) else weight)
        held = held if source.is_stacked else held[None]
        for name, values in zip(names, held, strict=True):
            expected = tensors[name]
            if form == "bf16" and expected.ndim == 2:
                expected = expected.astype(ml_dtypes.bfloat16)
                if values.dtype == np.uint16:
                    assert target is CPU, path
                    expected = expected.view(np.uint16)
            assert values.dtype == expected.dtype, path
            np.testing.assert_array_equal(values, expected, err_msg=name)
    assert used == set(tensors)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_16_bit_files_give_their_own_values(tmp_path, dtype):
    tensors = random_tensors(TINY)
    model = load(open_checkpoint(write_hf(tmp_path / "model", TINY, tensors, dtype=dtype)))
    stored = tensors[GATE].astype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype])
    gate = np.asarray(dict(named_weights(model))["layers.ffn.gate.values"][...])[1]
    np.testing.assert_array_equal(gate, stored.astype(np.float32))


def test_progress_counts_every_tensor_once():
    tensors = random_tensors(TINY)
    seen = []
    load(InMemory(tensors), progress=lambda done, of: seen.append((done, of)))
    assert {of for _, of in seen} == {len(tensors)}
    assert list(dict.fromkeys(done for done, _ in seen)) == list(range(1, len(tensors) + 1))


@pytest.mark.parametrize(
    ("form", "rules"), [("f32", ()), ("bf16", ()), ("bf16", (("mlp", "int8"),))]
)
def test_the_host_fills_in_what_devices_do(monkeypatch, form, rules):
    tensors = random_tensors(TINY)
    filled = load(InMemory(tensors), form, rules=rules)
    monkeypatch.setattr(loader, "filling", loader.DeviceFilling)
    expected = dict(named_weights(load(InMemory(tensors), form, rules=rules)))
    for path, weight in named_weights(filled):
        values, others = np.asarray(weight[...]), np.asarray(expected[path][...])
        assert values.dtype == others.dtype
        np.testing.assert_array_equal(values, others, err_msg=path)


def test_jax_takes_the_hosts_memory_over(monkeypatch):
    """A copy would hold each weight twice, if not for long."""
    made = []

    def remember(shape, dtype):
        made.append(allocate(shape, dtype))
        return made[-1]

    allocate = loader._device_memory
    monkeypatch.setattr(loader, "_device_memory", remember)
    leaves = jax.tree.leaves(load(InMemory(random_tensors(TINY))))
    places = {array.ctypes.data for array in made}
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == places


def peak_bytes(folder, form, mesh=None, rules=()):
    """The most bytes that Python and numpy held at once while a folder was opened and loaded."""
    tracemalloc.start()
    try:
        model = load(open_checkpoint(folder), form, mesh=mesh, rules=rules)
        jax.block_until_ready(jax.tree.leaves(model))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BIG = replace(
    TINY, vocab_size=640, num_layers=6, model_width=256, ffn_width=1024, num_query_heads=16
)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_the_host_holds_less_than_the_largest_shard_and_a_third(tmp_path, dtype, form):
    folder = write_hf(tmp_path / "model", BIG, random_tensors(BIG), shards=5, dtype=dtype)
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) == 5
    load(open_checkpoint(folder), form)  # compiles
    peak = peak_bytes(folder, form)
    print(f"peak {peak} bytes; largest shard {max(shards)}; all {sum(shards)}")
    assert peak <= 1.3 * max(shards)
    assert peak > 0.05 * max(shards)  # it is measured at all


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_that_holds_where_one_tensor_is_a_whole_shard(tmp_path, dtype):
    config = replace(BIG, vocab_size=9000, num_layers=1, ties_embedding=True)
    tensors = random_tensors(config)
    # The embedding comes first; the others are dealt into the shards after it.
    shards = len(tensors)
    folder = write_hf(tmp_path / "model", config, tensors, shards=shards, dtype=dtype)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    load(open_checkpoint(folder), "bf16")  # compiles
    peak = peak_bytes(folder, "bf16")
    print(f"peak {peak} bytes; largest shard {largest}")
    assert peak <= 1.3 * largest


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("data", "model"), [(1, 2), (2, 4), (8, 1)])
def test_that_holds_on_a_mesh_whatever_is_padded_and_copied(tmp_path, data, model, dtype):
    config = replace(BIG, vocab_size=641, ffn_width=1022, num_query_heads=6)
    folder = write_hf(tmp_path / "model", config, random_tensors(config), shards=5, dtype=dtype)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    mesh = mesh_of(data, model)
    load(open_checkpoint(folder), "bf16", mesh=mesh)  # compiles
    peak = peak_bytes(folder, "bf16", mesh)
    print(f"peak {peak} bytes; largest shard {largest}")
    assert peak <= 1.3 * largest
    assert peak > 0.05 * largest


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("form", ["bf16", "int8", "int4:32"])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_that_holds_where_a_whole_shard_is_padded_and_rounded(
    tmp_path, monkeypatch, num_shards, form, dtype
):
    monkeypatch.setattr(host_layout, "_PIECE_SIZE", 1 << 18)
    config = replace(BIG, vocab_size=9001, model_width=1024, num_layers=1, ties_embedding=True)
    tensors = random_tensors(config)
    folder = write_hf(tmp_path / "model", config, tensors, shards=len(tensors), dtype=dtype)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    mesh, rules = mesh_of(1, num_shards), (("", form),)
    load(open_checkpoint(folder), "bf16", mesh=mesh, rules=rules)  # compiles
    peak = peak_bytes(folder, "bf16", mesh, rules)
    print(f"peak {peak} bytes; largest shard {largest}")
    assert peak <= 1.3 * largest


@pytest.mark.parametrize("rules", [(), (("", "int8"),), (("", "int4:32"),), (("", "w8a8:32"),)])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_a_weight_loaded_in_pieces_is_the_one_loaded_whole(monkeypatch, num_shards, rules):
    config = replace(TINY, vocab_size=301, ffn_width=192)
    checkpoint = InMemory(random_tensors(config), config)
    mesh = mesh_of(1, num_shards)
    whole = load(checkpoint, "bf16", mesh=mesh, rules=rules)
    monkeypatch.setattr(host_layout, "_PIECE_SIZE", 1000)
    pieces = load(checkpoint, "bf16", mesh=mesh, rules=rules)
    for (path, expected), (_, held) in zip(
        named_weights(whole), named_weights(pieces), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(held), np.asarray(expected), err_msg=path)
        assert held[...].sharding == expected[...].sharding, path
