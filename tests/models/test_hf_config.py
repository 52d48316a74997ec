"""config.json of every family: what transformers writes is read as it means it, or refused."""

import json

import numpy as np
import pytest

from pallasite.models.checkpoint_fields import Fields
from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.config import LinearRope, LongRope, ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.hf_config import ARCHITECTURES, read_architecture, read_config
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_hf
from tests.family_settings import WINDOW, kinds
from tests.parity.family_changes import changed
from tests.tiny_checkpoints import write_json, write_safetensors


def read(hf, num_layers) -> ModelConfig:
    """Reads settings as if they lay beside the tensors of so many layers."""
    whole = Fields(hf, "config.json")
    shapes = {f"model.layers.{layer}.x": (1,) for layer in range(num_layers)}
    return read_config(read_architecture(whole), whole, Fields({}, "none"), shapes)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_config_and_tensors_are_read_exactly(name, tmp_path):
    model = FAMILY_MODELS[name]
    checkpoint = HfCheckpoint(write_family_hf(tmp_path, model, shards=2))
    assert checkpoint.config == model.config
    tensors = model.tensors()
    assert dict(checkpoint.shapes) == {name: tensor.shape for name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(tensor_name), tensor)


def test_every_architecture_has_a_tiny_model():
    assert {m.hf["architectures"][0] for m in FAMILY_MODELS.values()} == set(ARCHITECTURES)


class TestVision:
    MODEL = FAMILY_MODELS["gemma3-with-vision"]

    def write(self, folder, tensors):
        write_safetensors(folder, tensors)
        write_json(folder / "config.json", self.MODEL.hf)
        return folder

    def test_the_names_that_transformers_has_in_memory_are_read_too(self, tmp_path):
        tensors = self.MODEL.tensors()
        named = {
            name.replace("model.", "model.language_model.", 1): tensor
            for name, tensor in tensors.items()
        }
        named["model.vision_tower.vision_model.post_layernorm.bias"] = np.ones(16, np.float32)
        named["model.multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(16, np.float32)
        checkpoint = HfCheckpoint(self.write(tmp_path, named))
        assert set(checkpoint.shapes) == set(tensors)
        name = "model.layers.3.self_attn.q_norm.weight"
        np.testing.assert_array_equal(checkpoint.read(name), tensors[name])

    def test_a_head_of_its_own_is_used(self, tmp_path):
        tensors = {f"language_model.{name}": t for name, t in self.MODEL.tensors().items()}
        head = np.ones((72, 64), np.float32)
        checkpoint = HfCheckpoint(
            self.write(tmp_path, tensors | {"language_model.lm_head.weight": head})
        )
        assert not checkpoint.config.ties_embedding
        np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)

    def test_both_names_of_one_tensor(self, tmp_path):
        names = ("language_model.model.norm.weight", "model.language_model.norm.weight")
        tensors = dict.fromkeys(names, np.ones(64, np.float32))
        with pytest.raises(CheckpointError, match="two names of one"):
            HfCheckpoint(self.write(tmp_path, tensors))

    def test_vision_beside_another_architecture_is_not_left_out(self, tmp_path):
        model = FAMILY_MODELS["gemma3-one-key-head"]
        extra = {"vision_tower.x": np.ones(1, np.float32)}
        write_safetensors(tmp_path, model.tensors() | extra)
        write_json(tmp_path / "config.json", model.hf)
        assert "vision_tower.x" in HfCheckpoint(tmp_path).shapes

    def test_settings_that_are_left_out_are_those_of_transformers(self):
        """The whole text_config of Gemma 3 4B."""
        text = {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        }
        hf = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
        assert read(hf | {"eos_token_id": [1, 106]}, 34) == ModelConfig(
            family="gemma3",
            vocab_size=262208,
            num_layers=34,
            model_width=2560,
            ffn_width=10240,
            num_query_heads=8,
            num_kv_heads=4,
            head_width=256,
            context_len=131072,
            norm_epsilon=1e-6,
            rope_theta=1e6,
            rope_scaling=LinearRope(factor=8.0),
            local_rope_theta=10000.0,
            windows=tuple(None if (n + 1) % 6 == 0 else 1024 for n in range(34)),
            ties_embedding=True,
            eos_token_ids=(1, 106),
            bos_token_id=2,
        )
        assert read(hf, 34).eos_token_ids == (1,)


ENDS = {"eos_token_ids": (2,), "bos_token_id": 1}
LONG_ROPE = FAMILY_MODELS["phi3-long-rope"].hf["rope_parameters"]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("mistral-window", {"sliding_window": ...}, {"windows": (4096, 4096)}),
        ("mistral-window", {"layer_types": kinds("ss")}, {"windows": (WINDOW, WINDOW)}),
        ("mistral-narrow-heads", {"num_key_value_heads": None}, {"num_kv_heads": 9}),
        (
            "mistral-window",
            {"num_attention_heads": 16, "num_key_value_heads": ...},
            {"num_query_heads": 16, "num_kv_heads": 8, "head_width": 4},
        ),
        ("qwen2-windows", {"layer_types": ..., "max_window_layers": 0}, {"windows": (WINDOW,) * 3}),
        ("qwen2-windows", {"layer_types": ..., "max_window_layers": ...}, {"windows": ()}),
        ("qwen2-windows", {"max_window_layers": 3}, {"windows": (None, WINDOW, WINDOW)}),
        ("qwen2-windows", {"layer_types": ..., "sliding_window": None}, {"windows": ()}),
        # As transformers has them; not where the vocabulary ends before.
        ("llama-one-key-head", {"eos_token_id": ..., "bos_token_id": ...}, ENDS),
        ("mistral-window", {"eos_token_id": ..., "bos_token_id": ...}, ENDS),
        ("phi3-window", {"eos_token_id": ...}, {"eos_token_ids": ()}),
        (
            "phi3-window",
            {"eos_token_id": ..., "vocab_size": 32064},
            {"eos_token_ids": (32000,), "vocab_size": 32064},
        ),
        (
            "olmo2",
            {"eos_token_id": ..., "vocab_size": 50304},
            {"eos_token_ids": (50279,), "vocab_size": 50304},
        ),
        (
            "qwen2-windows",
            {"use_sliding_window": False, "layer_types": kinds("fff")},
            {"windows": ()},
        ),
        ("qwen2-tied", {"attention_bias": True}, {}),
        ("qwen3-wide-heads", {"head_dim": ...}, {"head_width": 128}),
        (
            "gemma3-one-key-head",
            {"sliding_window_pattern": 1},
            {"windows": (), "local_rope_theta": None},
        ),
        ("gemma3-one-key-head", {"sliding_window_pattern": ...}, {}),
        ("gemma3-one-key-head", {"layer_types": kinds("sssssfss")}, {}),
        ("gemma3-one-key-head", {"tie_word_embeddings": ...}, {"ties_embedding": True}),
        ("gemma3-one-key-head", {"hidden_activation": ...}, {}),
        ("gemma3-linear-rope", {"query_pre_attn_scalar": 16}, {"query_scale": None}),
        (
            "gemma3-linear-rope",
            {
                "rope_parameters": ...,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_theta": 1000.0,
                "rope_local_base_freq": 100.0,
            },
            {},
        ),
        ("phi3-window", {"sliding_window": ...}, {"windows": ()}),
        ("phi3-window", {"partial_rotary_factor": 0.5}, {"rotary_width": 8}),
        ("phi3-long-rope", {"partial_rotary_factor": ...}, {}),
        ("phi3-short-rope", {"rope_scaling": {"type": "su"}}, {}),
    ],
)
def test_other_forms(name, change, expected):
    model = FAMILY_MODELS[name]
    hf = {key: value for key, value in changed(model.hf, change).items() if value is not ...}
    fields = {field: getattr(model.config, field) for field in ModelConfig.__dataclass_fields__}
    # Without a head among the tensors, the embedding is one wherever config.json says so.
    assert read(hf, model.config.num_layers) == ModelConfig(**fields | expected)


@pytest.mark.parametrize(
    ("factor", "context_len", "expected"),
    [
        (None, 4096, 1.0),
        (None, 131072, 1.1902380714238083),  # Phi-4 mini's, of 131072 / 4096
        (32.0, 4096, 1.1902380714238083),
        (0.5, 4096, 1.0),
    ],
)
def test_the_attention_factor_of_long_rope(factor, context_len, expected):
    model = FAMILY_MODELS["phi3-long-rope"]
    rope = LONG_ROPE | {"factor": factor, "original_max_position_embeddings": 4096}
    lengths = {
        "max_position_embeddings": context_len,
        "original_max_position_embeddings": 4096,
    }
    scaling = read(model.hf | lengths | {"rope_parameters": rope}, 2).rope_scaling
    assert isinstance(scaling, LongRope)
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("llama-one-key-head", {"sliding_window": 24}, "sliding_window=24.*no windows"),
        ("llama-one-key-head", {"layer_types": kinds("fs")}, "layer_types.*agree"),
        ("llama-one-key-head", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24"),
        ("llama-one-key-head", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        ("llama-eight-key-heads", {"rope_parameters": {"full_attention": {}}}, "'full_attention'"),
        ("mistral-window", {"layer_types": kinds("sf")}, "layer_types.*agree"),
        ("mistral-window", {"layer_types": kinds("s")}, "layer_types of 1 layers.*is 2"),
        (
            "mistral-window",
            {"layer_types": ["sliding_attention", "chunked"]},
            "'chunked'.*full_att",
        ),
        ("mistral-window", {"layer_types": [[], 1]}, "a list among the layer_types"),
        ("mistral-window", {"layer_types": "s"}, "layer_types='s'.*a list"),
        ("mistral-window", {"sliding_window": 0}, "sliding_window=0"),
        ("mistral-window", {"sliding_window": True}, "sliding_window=True"),
        ("mistral-window", {"attention_bias": True}, "attention_bias=True"),
        ("mistral-window", {"rope_scaling": LONG_ROPE}, "'longrope'.*default, linear, llama3"),
        ("qwen2-tied", {"attention_bias": False}, "attention_bias=False"),
        ("qwen2-windows", {"use_sliding_window": False}, "layer_types.*agree"),
        ("qwen2-windows", {"layer_types": kinds("fs")}, "layer_types of 2 layers.*is 3"),
        ("qwen2-windows", {"sliding_window": None}, "layer_types.*agree"),
        ("qwen3-windows", {"max_window_layers": -1}, "max_window_layers=-1"),
        ("qwen3-windows", {"use_sliding_window": 1}, "use_sliding_window=1"),
        ("gemma3-one-key-head", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("gemma3-one-key-head", {"layer_types": kinds("sssssfsf")}, "layer_types.*agree"),
        ("gemma3-one-key-head", {"sliding_window": None}, "no 'sliding_window'"),
        ("gemma3-one-key-head", {"hidden_activation": "gelu"}, "hidden_activation='gelu'.*tanh"),
        ("gemma3-one-key-head", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (
            "gemma3-one-key-head",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            "gemma3-one-key-head",
            {"rope_parameters": {"rope_theta": 1e3}},
            "only full_attention and",
        ),
        ("gemma3-one-key-head", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "gemma3-one-key-head",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 99.0}}},
            "rope_local_base_freq=100.0.*agree",
        ),
        (
            "gemma3-linear-rope",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'linear' in sliding_attention of rope_parameters.*supported are default",
        ),
        (
            "gemma3-linear-rope",
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters.*agree",
        ),
        ("gemma3-with-vision", {"text_config": {"quantization_config": {}}}, "quantization_config"),
        ("gemma3-with-vision", {"text_config": 3}, "text_config=3"),
        ("phi3-long-rope", {"original_max_position_embeddings": None}, "no 'original_max_position"),
        ("phi3-long-rope", {"original_max_position_embeddings": 1}, "from 2 to"),
        ("phi3-long-rope", {"original_max_position_embeddings": 128}, "original.*it is 128"),
        ("phi3-long-rope", {"partial_rotary_factor": 0.5}, "0.75.*it is 0.5.*agree"),
        (
            "phi3-long-rope",
            {"rope_parameters": {"long_factor": [1.0] * 4}},
            "4 rope factors.*3 pairs",
        ),
        (
            "phi3-long-rope",
            {"rope_parameters": {"long_factor": [1.0, 0, 1.0]}},
            "long_factor=a list",
        ),
        ("phi3-long-rope", {"rope_parameters": {"short_factor": None}}, "no 'short_factor'"),
        ("phi3-long-rope", {"rope_parameters": {"short_mscale": 1.2}}, "'short_mscale'"),
        ("phi3-long-rope", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'.*default, longrope"),
        (
            "phi3-long-rope",
            {"rope_parameters": {"attention_factor": -1.0}},
            "attention_factor=-1.0",
        ),
        ("phi3-window", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5.*at most"),
        ("phi3-window", {"partial_rotary_factor": 0.2}, "rotary_width=3.*even"),
        ("olmo2", {"sliding_window": 4096}, "sliding_window=4096.*no windows"),
    ],
)
def test_what_is_not_supported_or_contradicts_is_named(name, change, named):
    with pytest.raises(CheckpointError, match=named):
        read(changed(FAMILY_MODELS[name].hf, change), FAMILY_MODELS[name].config.num_layers)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_layers_that_the_tensors_do_not_have(num_layers):
    with pytest.raises(CheckpointError, match=f"3 layers and tensors of {num_layers}"):
        read(FAMILY_MODELS["qwen3-windows"].hf, num_layers)


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="'Olmo3ForCausalLM'") as error:
        read({"architectures": ["Olmo3ForCausalLM"]}, 1)
    assert all(name in str(error.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    "name", ["qwen2-windows", "gemma3-linear-rope", "gemma3-with-vision", "phi3-long-rope"]
)
def test_200_damaged_configs_give_checkpoint_errors_only(name, tmp_path, rng):
    folder = write_family_hf(tmp_path, FAMILY_MODELS[name])
    path = folder / "config.json"
    whole = json.dumps(FAMILY_MODELS[name].hf).encode()
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
