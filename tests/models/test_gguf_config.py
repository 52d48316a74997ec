"""GGUF files of every family: names, norms and settings as llama.cpp's converter writes them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pallasite.models.checkpoint_gguf import GgufCheckpoint
from pallasite.models.config import LinearRope, ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_architectures import ARCHITECTURES
from pallasite.models.gguf_config import read_config
from pallasite.models.gguf_file import GgufFile
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_gguf
from tests.family_settings import WINDOW

WHOLE = [name for name, model in FAMILY_MODELS.items() if model.has_gguf]


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("name", WHOLE)
def test_config_and_tensors_are_those_of_the_original(name, kind, tmp_path):
    model = FAMILY_MODELS[name]
    checkpoint = GgufCheckpoint(write_family_gguf(tmp_path / "x.gguf", model, kind))
    assert checkpoint.config == model.gguf_config
    tensors = model.tensors()
    assert dict(checkpoint.shapes) == {name: tensor.shape for name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        expected = tensor if kind == "F32" or tensor.ndim == 1 else tensor.astype(np.float16)
        if model.config.family == "gemma3" and tensor_name.endswith("norm.weight"):
            # One was added to it and taken off again, which costs some of its last digits.
            expected = (tensor + np.float32(1)) - np.float32(1)
            np.testing.assert_allclose(expected, tensor, atol=1.2e-7)
        np.testing.assert_array_equal(checkpoint.read(tensor_name), expected)


def test_every_architecture_has_a_tiny_model():
    assert {FAMILY_MODELS[name].gguf_config.family for name in WHOLE} == set(ARCHITECTURES)


def read(tmp_path, name, changes, num_layers=None, without=()) -> ModelConfig:
    """Reads a model's file as if its metadata were changed, `...` taking an entry out.

    With num_layers, as if it had so many, all but the first holding nothing that counts; and
    `without` some of its tensors.
    """
    path = write_family_gguf(tmp_path / "x.gguf", FAMILY_MODELS[name])
    file, shapes = GgufFile(path), dict(GgufCheckpoint(path).shapes)
    architecture = str(file.metadata["general.architecture"])
    changes = {f"{architecture}.{key}": value for key, value in changes.items()}
    if num_layers is not None:
        changes[f"{architecture}.block_count"] = num_layers
        shapes |= {f"model.layers.{layer}.x": (1,) for layer in range(num_layers)}
    file.metadata |= changes
    file.metadata = {key: value for key, value in file.metadata.items() if value is not ...}
    file.tensors = {key: place for key, place in file.tensors.items() if key not in without}
    return read_config(file, ARCHITECTURES[architecture], architecture, shapes)


GEMMA = "gemma3-one-key-head"
FLAGS = [True, False, True, True, True, False, True, False]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (GEMMA, {"rope.freq_base_swa": ...}, {"local_rope_theta": 10000.0}),
        (
            GEMMA,
            {"attention.sliding_window_pattern": 3},
            {"windows": tuple(WINDOW if layer % 3 < 2 else None for layer in range(8))},
        ),
        (
            GEMMA,
            {"attention.sliding_window_pattern": FLAGS},
            {"windows": tuple(WINDOW if flag else None for flag in FLAGS)},
        ),
        (
            GEMMA,
            {"attention.sliding_window_pattern": [False] * 8},
            {"windows": (), "local_rope_theta": None},
        ),
        (GEMMA, {"attention.sliding_window": ...}, {"windows": (), "local_rope_theta": None}),
        (GEMMA, {"attention.sliding_window": 0}, {"windows": (), "local_rope_theta": None}),
        (
            "qwen3-wide-heads",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_scaling": LinearRope(factor=4.0)},
        ),
        ("phi3-window", {"attention.sliding_window": 0}, {"windows": ()}),
        ("phi3-window", {"rope.dimension_count": ...}, {}),
        ("phi3-long-rope", {"rope.scaling.type": "longrope"}, {}),
    ],
)
def test_other_forms(tmp_path, name, changes, expected):
    config = replace(FAMILY_MODELS[name].gguf_config, **expected)
    assert read(tmp_path, name, changes) == config


def test_gemma_3_27b_is_known_by_its_depth(tmp_path):
    """In the real one a head's share of the width, 5376 / 32, is not the head's width, 128."""
    heads = {"attention.head_count": 8}
    config = read(tmp_path, GEMMA, heads, num_layers=62)
    assert config.head_width == 16
    assert config.query_scale == pytest.approx(1 / math.sqrt(64 / 8), rel=1e-12)
    assert read(tmp_path, GEMMA, heads, num_layers=61).query_scale is None
    assert read(tmp_path, GEMMA, {}, num_layers=62).query_scale is None


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        (GEMMA, {"attention.sliding_window": True}, "sliding_window=True"),
        (GEMMA, {"attention.sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        (GEMMA, {"attention.sliding_window_pattern": [True] * 7}, "pattern=a list.*8 layers"),
        (GEMMA, {"attention.sliding_window_pattern": [1] * 8}, "pattern=a list.*true or false"),
        (GEMMA, {"attention.scale": 0.1}, "attention.scale=0.1"),
        (GEMMA, {"attention.causal": False}, "attention.causal=False"),
        (GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (GEMMA, {"rope.dimension_count": 8}, "rope.dimension_count=8.*16"),
        (GEMMA, {"rope.scaling.type": "longrope"}, "type='longrope'.*linear, none"),
        (GEMMA, {"rope.scaling.type": "linear"}, "no 'gemma3.rope.scaling.factor'"),
        ("qwen2-tied", {"attention.sliding_window": 24}, "sliding_window=24.*not supported"),
        ("qwen3-wide-heads", {"rope.freq_base_swa": 10000.0}, "rope.freq_base_swa"),
        ("olmo2", {"attention.sliding_window_pattern": 4}, "sliding_window_pattern=4"),
        ("olmo2", {"rope.scaling.attn_factor": 1.2}, "attn_factor=1.2"),
        ("llama-eight-key-heads", {"rope.scaling.type": "linear"}, "type='linear'.*rope_freqs"),
        ("phi3-window", {"attention.sliding_window": ...}, "no 'phi3.attention.sliding_window'"),
        ("phi3-window", {"rope.scaling.type": "longrope"}, "needs the tensor 'rope_factors_long"),
        ("phi3-window", {"rope.dimension_count": 18}, "rotary_width=18"),
        ("phi3-window", {"rope.scaling.attn_factor": 1.2}, "attn_factor=1.2"),
        ("phi3-long-rope", {"rope.dimension_count": 8}, r"rope_factors_\w*.weight.*3,.*4,"),
        ("phi3-long-rope", {"rope.scaling.attn_factor": ...}, "no 'phi3.rope.scaling.attn_factor'"),
        ("phi3-long-rope", {"rope.scaling.original_context_length": ...}, "original_context_len"),
        ("phi3-long-rope", {"rope.scaling.type": "linear"}, "type='linear'.*rope_factors"),
    ],
)
def test_metadata_that_is_not_supported_or_contradicts_is_named(tmp_path, name, changes, named):
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, name, changes)


@pytest.mark.parametrize("length", ["long", "short"])
def test_factors_of_one_length_only(tmp_path, length):
    name = f"rope_factors_{length}.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        read(tmp_path, "phi3-long-rope", {}, without=[name])


@pytest.mark.parametrize("name", [GEMMA, "phi3-long-rope", "qwen2-tied", "olmo2-groups"])
def test_100_damaged_files_give_checkpoint_errors_only(name, tmp_path, rng):
    path = write_family_gguf(tmp_path / "x.gguf", FAMILY_MODELS[name])
    whole = path.read_bytes()
    header_bytes = min(place.offset for place in GgufFile(path).tensors.values())
    num_refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(header_bytes)] = rng.integers(256)
        path.write_bytes(content)
        try:
            checkpoint = GgufCheckpoint(path)
            for tensor_name in checkpoint.shapes:
                checkpoint.read(tensor_name)
        except CheckpointError:
            num_refused += 1
    assert num_refused >= 25
