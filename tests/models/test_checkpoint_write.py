"""Folders that we write: read back to the bit, by our reader and by the safetensors package."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.checkpoint_write import Surroundings, surroundings_of, write_checkpoint
from pallasite.models.errors import CheckpointError, ConfigError
from pallasite.models.forms import EVERY_LAYER, form_of, parse_form, pattern_name
from pallasite.models.quantize import QuantizedTensor, quantize
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_gguf, write_family_hf
from tests.models.quantized_files import awq_parts, random_matrices, write_quantized
from tests.tiny_checkpoints import (
    TINY,
    gguf_tokenizer,
    random_tensors,
    write_gguf,
    write_hf,
    write_json,
)

UP = "model.layers.1.mlp.up_proj"
FORMS = ["int8", "int8:32", "w8a8", "w8a8:32", "int4", "int4:64", "fp8", "bf16", "f32"]


@pytest.fixture
def source(tmp_path):
    return write_hf(tmp_path / "source", TINY, random_tensors(TINY, seed=4), dtype="BF16")


def write(source, folder, rules, **arguments):
    checkpoint = open_checkpoint(source)
    write_checkpoint(checkpoint, rules, surroundings_of(source, checkpoint), folder, **arguments)
    return open_checkpoint(folder)


def assert_same(read, expected):
    """The same parts, to the bit and of the same types."""
    assert type(read) is type(expected)
    if isinstance(expected, np.ndarray):
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)
        return
    for part in ("values", "scales", "minimums"):
        ours, theirs = getattr(read, part), getattr(expected, part)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def rounded(tensor, form):
    if form is None:
        return tensor
    if form.is_quantized:
        return quantize(tensor, form)
    return tensor.astype(np.float32 if form.kind == "f32" else ml_dtypes.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_comes_back_as_it_was_rounded(form, source, tmp_path):
    original = open_checkpoint(source)
    written = write(source, tmp_path / "new", ((EVERY_LAYER, form),))
    assert dict(written.shapes) == dict(original.shapes)
    assert replace(written.config, stored_forms=()) == replace(original.config, block_forms=())
    num_rounded = 0
    for name, shape in written.shapes.items():
        chosen = parse_form(form) if len(shape) == 2 and "layers" in name else None
        assert_same(written.read(name), rounded(original.read(name), chosen))
        is_quantized = chosen is not None and chosen.is_quantized
        stored = form_of(pattern_name(name), written.config.stored_forms)
        assert stored == (chosen if is_quantized else None)
        num_rounded += chosen is not None
    assert num_rounded == 14


def test_rules_give_each_matrix_its_own_form(source, tmp_path):
    rules = (
        ("down_proj", "int8:64"),
        ("mlp", "fp8"),
        ("self_attn", "w8a8"),
        ("embed_tokens|lm_head", "int8"),
    )
    written = write(source, tmp_path / "new", rules)
    settings = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "mixed-precision"
    for name, shape in written.shapes.items():
        form = form_of(pattern_name(name), rules) if len(shape) == 2 else None
        assert_same(written.read(name), rounded(open_checkpoint(source).read(name), form))
        assert form_of(pattern_name(name), written.config.stored_forms) == form


def test_int8_is_written_as_compressed_tensors_says(source, tmp_path):
    """What another engine looks at: the settings word by word, and the parts."""
    write(source, tmp_path / "new", ((EVERY_LAYER, "w8a8"),))
    settings = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == group["format"] == "int-quantized"
    assert settings["quantization_status"] == "compressed"
    assert sorted(settings["ignore"]) == ["lm_head", "model.embed_tokens"]
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    assert group["weights"] == weights | {"group_size": None, "dynamic": False}
    inputs = weights | {"strategy": "token", "group_size": None, "dynamic": True}
    assert group["input_activations"] == inputs
    assert r"re:^model\.layers\.\d+\.mlp\.up_proj$" in group["targets"]
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensor = open_checkpoint(source).read(f"{UP}.weight").astype(np.float32)
    scales = np.abs(tensor).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(tensors[f"{UP}.weight_scale"], scales)
    assert tensors[f"{UP}.weight"].dtype == np.int8
    np.testing.assert_array_equal(tensors[f"{UP}.weight"], np.round(tensor / scales))
    assert f"{UP}.weight_zero_point" not in tensors


def test_int8_beside_floats_is_packed_as_other_engines_want_it(source, tmp_path):
    write(source, tmp_path / "new", ((EVERY_LAYER, "int8"),))
    settings = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    assert settings["format"] == group["format"] == "pack-quantized"
    assert group["input_activations"] is None
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensor = open_checkpoint(source).read(f"{UP}.weight").astype(np.float32)
    codes = np.round(tensor / tensors[f"{UP}.weight_scale"]).astype(np.int64) + 128
    expected = sum(codes[:, byte::4] << (8 * byte) for byte in range(4))
    assert tensors[f"{UP}.weight_packed"].dtype == np.int32
    np.testing.assert_array_equal(tensors[f"{UP}.weight_packed"].view(np.uint32), expected)
    np.testing.assert_array_equal(tensors[f"{UP}.weight_shape"], tensor.shape)
    assert f"{UP}.weight" not in tensors


def test_4_bit_matrices_are_held_with_their_minimums(source, tmp_path):
    """As pallas_kernels/quantized_matmul/contract.py lays them out, computed here by hand."""
    write(source, tmp_path / "new", ((EVERY_LAYER, "int4:32"),))
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    values = tensors[f"{UP}.weight"].astype(np.int64)
    assert values.shape == (128, 32)
    scales, minimums = tensors[f"{UP}.weight_scales"], tensors[f"{UP}.weight_minimums"]
    groups = values.reshape(128, 2, 16)
    codes = np.concatenate((groups % 16, groups // 16), axis=2)
    meant = (codes * scales[..., None] + minimums[..., None]).reshape(128, 64)
    tensor = open_checkpoint(source).read(f"{UP}.weight").astype(np.float64)
    steps = np.repeat(scales, 32, axis=1)
    assert (np.abs(meant - tensor) <= steps * 0.5001).all()
    assert (steps < np.ptp(tensor.reshape(128, 2, 32), axis=2).max() / 14).all()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_shards_are_bounded_and_make_one_checkpoint(form, source, tmp_path):
    rules = ((EVERY_LAYER, form),)
    whole = write(source, tmp_path / "whole", rules)
    sharded = write(source, tmp_path / "shards", rules, max_shard_bytes=40_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{index + 1:05}-of-{len(files):05}.safetensors" for index in range(len(files))
    ]
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    in_files = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == in_files
    sizes = [sum(array.nbytes for array in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    # One tensor, the embedding, is larger than a shard.
    assert sorted(sizes)[-3] <= 40_000
    for name in whole.shapes:
        assert_same(sharded.read(name), whole.read(name))
    assert not list((tmp_path / "shards").glob("unfinished*"))


def test_a_tensor_begins_where_its_numbers_may(tmp_path):
    """int8 of odd sizes before floats: other readers map the file."""
    config = replace(TINY, vocab_size=319, ffn_width=33)
    source = write_hf(tmp_path / "source", config, random_tensors(config))
    write(source, tmp_path / "new", ((EVERY_LAYER, "int8"), ("embed", "bf16")))
    for file in (tmp_path / "new").glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        for entry in header.values():
            size = {"F32": 4, "BF16": 2, "I8": 1}[entry["dtype"]]
            assert entry["data_offsets"][0] % size == 0


@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_a_gguf_file_becomes_a_folder(kind, tmp_path):
    tensors = random_tensors(TINY, seed=6)
    path = write_gguf(tmp_path / "model.gguf", TINY, tensors, kind, gguf_tokenizer(TINY))
    original = open_checkpoint(path)
    written = write(path, tmp_path / "new", ((EVERY_LAYER, "int4:32"),))
    assert replace(written.config, stored_forms=()) == replace(original.config, block_forms=())
    for name in written.shapes:
        read, expected = written.read(name), original.read(name)
        if isinstance(read, np.ndarray):
            assert_same(read, expected)
            continue
        assert_same(read, quantize(expected, parse_form("int4:32")))
        if kind == "Q4_1":
            # The groups are those of the file, whose steps are kept but for f32's own rounding.
            largest = np.abs(expected).max()
            assert np.abs(read.dequantize() - expected).max() <= 4 * 2.0**-24 * largest


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_written_and_read(name, tmp_path):
    model = FAMILY_MODELS[name]
    paths = [write_family_hf(tmp_path / "hf", model)]
    if model.has_gguf:
        paths.append(write_family_gguf(tmp_path / "model.gguf", model))
    for index, path in enumerate(paths):
        original = open_checkpoint(path)
        written = write(path, tmp_path / f"new{index}", ((EVERY_LAYER, "int8"),))
        assert replace(written.config, stored_forms=()) == replace(original.config, block_forms=())
        for tensor_name, shape in original.shapes.items():
            is_matrix = len(shape) == 2 and "layers" in tensor_name
            form = parse_form("int8") if is_matrix else None
            assert_same(written.read(tensor_name), rounded(original.read(tensor_name), form))


def test_what_is_quantized_already_is_not_rounded_again(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(16), 4)
    parts = {name: awq_parts(matrix) for name, matrix in matrices.items()}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32}
    source = write_quantized(tmp_path / "awq", TINY, settings, parts)
    original = open_checkpoint(source)
    kept = write(source, tmp_path / "kept", (("lm_head", "int8"),))
    for name in kept.shapes:
        if name == "lm_head.weight":
            assert isinstance(kept.read(name), QuantizedTensor)
        else:
            assert_same(kept.read(name), original.read(name))
    again = write(source, tmp_path / "again", (("up_proj", "int8"), ("down_proj", "f32")))
    expected = original.read(f"{UP}.weight").dequantize()
    assert_same(again.read(f"{UP}.weight"), quantize(expected, parse_form("int8")))
    down = "model.layers.0.mlp.down_proj.weight"
    assert_same(again.read(down), original.read(down).dequantize())


def test_the_tokenizer_and_generation_settings_come_along(source, tmp_path):
    write_json(source / "generation_config.json", {"eos_token_id": [7, 8]})
    (source / "pytorch_model.bin").write_bytes(b"code")
    (source / "modeling.py").write_text("code")
    written = write(source, tmp_path / "new", ((EVERY_LAYER, "int8"),))
    assert written.config.eos_token_ids == (7, 8)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    ]
    tokenizer = (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == tokenizer


def test_progress_counts_the_tensors(source, tmp_path):
    seen = []
    write(source, tmp_path / "new", (), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(index + 1, 21) for index in range(21)]


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ((("q_poj", "int8"),), "'q_poj', which matches none.*self_attn.q_proj"),
        ((("(", "int8"),), "no regular expression"),
        ((("q_proj", "int3"),), "'int3'"),
        ((("q_proj", "int4:48"),), "int4:48 for a weight with rows of 64"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, named, source, tmp_path):
    with pytest.raises(ConfigError, match=named):
        write(source, tmp_path / "new", rules)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "new")


def test_a_folder_that_is_not_empty_is_left_alone(source, tmp_path):
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ConfigError, match="'source', which is not empty") as error:
        write(source, source, ((EVERY_LAYER, "int8"),))
    assert str(tmp_path) not in str(error.value)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="'new', which cannot be written to"):
        write(source, tmp_path / "file" / "new", ((EVERY_LAYER, "int8"),))


def test_an_unfinished_folder_is_no_checkpoint(source, tmp_path):
    """The source is damaged, which is seen when its last tensor is read."""
    checkpoint = open_checkpoint(source)
    name = list(checkpoint.shapes)[-1]
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    surroundings = Surroundings(settings=json.loads((source / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' before the end"):
        write_checkpoint(checkpoint, (), surroundings, tmp_path / "new")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "new")
