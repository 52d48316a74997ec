"""The Hugging Face folder reader: what it reads is exact, and what it cannot read it names."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.config import Llama3Rope
from pallasite.models.errors import CheckpointError
from tests.tiny_checkpoints import (
    TINY,
    hf_config,
    hf_rope_scaling,
    random_tensors,
    write_hf,
    write_json,
)

TENSORS = random_tensors(TINY, seed=7)
LLAMA3 = Llama3Rope(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_len=8192
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model", TINY, TENSORS)


def rewrite(path: Path, **changes: object) -> None:
    """Sets fields of a JSON file; `...` takes one out."""
    values = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in values.items() if value is not ...})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "stored"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_every_tensor_is_read_exactly_in_its_own_type(tmp_path, shards, dtype, stored):
    checkpoint = HfCheckpoint(write_hf(tmp_path, TINY, TENSORS, shards, dtype))
    assert checkpoint.config == TINY
    assert dict(checkpoint.shapes) == {name: tensor.shape for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == stored
        np.testing.assert_array_equal(read, tensor.astype(stored))
        read[...] = 0  # the caller may keep it, and write to it


def test_opening_reads_headers_only_and_reading_holds_one_tensor(tmp_path):
    config = replace(TINY, vocab_size=64_000)
    tensors = random_tensors(config)
    write_hf(tmp_path, config, tensors)
    largest = tensors["lm_head.weight"].nbytes
    tracemalloc.start()
    try:
        checkpoint = HfCheckpoint(tmp_path)
        opening = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for name in checkpoint.shapes:
            checkpoint.read(name)
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opening < 1 << 20
    assert largest < reading < 1.1 * largest


def test_a_head_in_the_files_is_used_although_the_config_ties_it(folder):
    rewrite(folder / "config.json", tie_word_embeddings=True)
    checkpoint = HfCheckpoint(folder)
    assert not checkpoint.config.ties_embedding
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), TENSORS["lm_head.weight"])


def test_a_tied_head_that_is_not_there_is_the_embedding(tmp_path):
    config = replace(TINY, ties_embedding=True)
    checkpoint = HfCheckpoint(write_hf(tmp_path, config, random_tensors(config)))
    assert checkpoint.config == config
    assert "lm_head.weight" not in checkpoint.shapes


def test_rotary_frequencies_of_old_files_are_left_out(tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    checkpoint = HfCheckpoint(write_hf(tmp_path, TINY, TENSORS | old))
    assert set(checkpoint.shapes) == set(TENSORS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"head_dim": ...}, {}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"tie_word_embeddings": ...}, {}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        ({"rope_theta": ...}, {"rope_theta": 10000.0}),
        ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
        ({"rope_scaling": hf_rope_scaling(LLAMA3)}, {"rope_scaling": LLAMA3}),
        ({"rope_scaling": {"type": "default"}}, {}),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5},
        ),
        (
            {
                "rope_theta": ...,
                "rope_scaling": ...,
                "rope_parameters": {**hf_rope_scaling(LLAMA3), "rope_theta": 5e5},
            },
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": hf_rope_scaling(LLAMA3),
                "rope_parameters": {**hf_rope_scaling(LLAMA3), "rope_theta": 5e5},
            },
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
    ],
)
def test_config_forms(folder, changes, expected):
    rewrite(folder / "config.json", **changes)
    assert HfCheckpoint(folder).config == replace(TINY, **expected)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [5, 3, 5]}, (5, 3)),
        ({}, (258,)),
        (None, (258,)),
    ],
)
def test_ends_come_from_the_generation_config_first(folder, generation, expected):
    path = folder / "generation_config.json"
    path.unlink() if generation is None else write_json(path, generation)
    assert HfCheckpoint(folder).config.eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM.*Olmo2"),
        ({"architectures": ...}, "architectures"),
        ({"architectures": [[]]}, "a list"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"mlp_bias": "no"}, "mlp_bias='no'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": ...}, "no 'hidden_size'"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 10**400}, "hidden_size=an integer of 1329 bits"),
        ({"head_dim": ..., "num_attention_heads": 6}, "multiple of 6"),
        ({"head_dim": 15}, "even"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"num_hidden_layers": 3}, "3 layers"),
        ({"num_hidden_layers": 2**31 - 1}, "2147483647 layers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
        ({"bos_token_id": 320}, "bos_token_id=320.*0 to 319"),
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            {"rope_scaling": hf_rope_scaling(replace(LLAMA3, high_frequency_factor=1.0))},
            "high_freq_factor=1.0",
        ),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000.0.*agree"),
        (
            {"rope_scaling": hf_rope_scaling(LLAMA3), "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.*agree",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_named(folder, changes, named):
    rewrite(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=named) as error:
        HfCheckpoint(folder)
    assert str(folder) not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        ("[]", "a list"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_config_that_is_not_an_object_is_named(folder, text, named):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json.*{named}|{named}.*config.json"):
        HfCheckpoint(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        HfCheckpoint(folder)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        return write_hf(tmp_path / "model", TINY, TENSORS, shards=2)

    @staticmethod
    def set_shard(sharded: Path, tensor: str, shard: object) -> None:
        path = sharded / "model.safetensors.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        rewrite(path, weight_map=weight_map | {tensor: shard})

    def test_a_missing_shard(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no file 'model-00002-of-00002\.safetensors'"):
            HfCheckpoint(sharded)

    def test_a_tensor_missing_from_its_shard(self, sharded):
        self.set_shard(sharded, "model.norm.bias", "model-00001-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"'model\.norm\.bias'.*index puts it"):
            HfCheckpoint(sharded)

    def test_a_tensor_in_another_shard_than_its_own(self, sharded):
        self.set_shard(sharded, "model.embed_tokens.weight", "model-00002-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight'.*index puts it"):
            HfCheckpoint(sharded)

    def test_a_tensor_in_two_shards(self, sharded):
        first = sharded / "model-00001-of-00002.safetensors"
        (sharded / "model-00003.safetensors").write_bytes(first.read_bytes())
        self.set_shard(sharded, "model.norm.bias", "model-00003.safetensors")
        with pytest.raises(CheckpointError, match="in both 'model-00001-of-00002"):
            HfCheckpoint(sharded)

    def test_a_tensor_that_the_index_does_not_know(self, sharded):
        path = sharded / "model.safetensors.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        del weight_map["lm_head.weight"]
        rewrite(path, weight_map=weight_map)
        with pytest.raises(CheckpointError, match=r"'lm_head\.weight'.*not in the index"):
            HfCheckpoint(sharded)

    @pytest.mark.parametrize(
        "shard",
        ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "x.bin", 3],
    )
    def test_a_shard_outside_the_folder_is_refused(self, sharded, shard):
        self.set_shard(sharded, "model.norm.weight", shard)
        (sharded.parent / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="same folder"):
            HfCheckpoint(sharded)

    @pytest.mark.parametrize("weight_map", [None, [], {}])
    def test_an_index_without_a_map(self, sharded, weight_map):
        rewrite(sharded / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(CheckpointError, match="weight_map"):
            HfCheckpoint(sharded)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_its_tensor(tmp_path, dtype, value):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = TENSORS[name].copy()
    bad[-1, -1] = value
    checkpoint = HfCheckpoint(write_hf(tmp_path, TINY, TENSORS | {name: bad}, dtype=dtype))
    checkpoint.read("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"got 1 values.*model\.layers\.1\.mlp\.up_proj"):
        checkpoint.read(name)


def test_a_file_cut_short_after_it_was_opened_names_the_tensor(folder):
    checkpoint = HfCheckpoint(folder)
    path = folder / "model.safetensors"
    name = list(checkpoint.shapes)[-1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"tensor '{name}' before the end"):
        checkpoint.read(name)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("model.norm.weight")


def test_a_tensor_that_is_not_there_is_named(folder):
    with pytest.raises(CheckpointError, match="'nothing'"):
        HfCheckpoint(folder).read("nothing")


def test_300_damaged_headers_give_checkpoint_errors_only(folder, rng):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    num_refused = 0
    for trial in range(300):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: rng.integers(len(whole))]
        else:
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(header_bytes)] = rng.integers(256)
        path.write_bytes(content)
        try:
            checkpoint = HfCheckpoint(folder)
            for name in checkpoint.shapes:
                checkpoint.read(name)
        except CheckpointError:
            num_refused += 1
    # Every cut is refused; a flipped byte may turn one name into another, which the loader sees.
    assert num_refused >= 100


def test_200_damaged_configs_give_checkpoint_errors_only(folder, rng):
    path = folder / "config.json"
    whole = json.dumps(hf_config(replace(TINY, rope_scaling=LLAMA3))).encode()
    num_refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        try:
            HfCheckpoint(folder)
        except CheckpointError:
            num_refused += 1
    assert num_refused >= 100
