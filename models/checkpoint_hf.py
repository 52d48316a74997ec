"""A Hugging Face folder: config.json, generation_config.json and *.safetensors, one file or shards.

Nothing in the folder is code, and nothing outside it is opened by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_bytes import open_bytes
from pallasite.models.checkpoint_fields import (
    Fields,
    as_checkpoint_errors,
    check_layers,
    parse_json,
    shown,
)
from pallasite.models.checkpoint_safetensors import SafetensorsFile
from pallasite.models.config import Llama3Rope, ModelConfig
from pallasite.models.errors import CheckpointError

# `architectures` of config.json to the registry's family.
FAMILIES = {"LlamaForCausalLM": "llama"}

_MAX_JSON_BYTES = 32 << 20
_ROPE_SETTINGS = {
    "default": {"rope_type", "type", "partial_rotary_factor"},
    "llama3": {
        *("rope_type", "type", "partial_rotary_factor", "factor", "low_freq_factor"),
        *("high_freq_factor", "original_max_position_embeddings"),
    },
}


class HfCheckpoint:
    """An opened folder; satisfies `Checkpoint`. Opening reads the settings and the headers.

    Weights are model.safetensors, or the shards that model.safetensors.index.json lists. An
    output head in the files is used even where config.json ties it to the embedding, and rotary
    frequencies that old files carry are left out: they follow from the config.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, folder: Path) -> None:
        self._files = _files_by_tensor(folder)
        self.shapes = {name: file.tensors[name].shape for name, file in self._files.items()}
        fields = Fields(_read_json(folder / "config.json"), "config.json")
        generation = folder / "generation_config.json"
        ends = Fields(_read_json(generation), generation.name) if generation.exists() else fields
        self.config = _read_config(
            fields, ends if ends.has("eos_token_id") else fields, self.shapes
        )

    def read(self, name: str) -> np.ndarray:
        """See `Checkpoint.read`."""
        if name not in self._files:
            raise CheckpointError(
                f"got no tensor {name!r} in the folder's files; `shapes` lists those there are;"
                " fetch the checkpoint again"
            )
        return self._files[name].read(name)


def _files_by_tensor(folder: Path) -> dict[str, SafetensorsFile]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        names, expected = [single.name], None
    elif index.exists():
        expected = _read_index(index)
        names = sorted(set(expected.values()))
    else:
        raise CheckpointError(
            f"got folder {folder.name!r} without model.safetensors and without"
            " model.safetensors.index.json; weights must be safetensors; convert the checkpoint"
        )
    found: dict[str, SafetensorsFile] = {}
    for shard in names:
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"got no file {shard!r}, which the index names; every shard must be there; fetch"
                " the checkpoint again"
            )
        file = SafetensorsFile(folder / shard)
        for tensor in file.tensors:
            if tensor in found:
                raise CheckpointError(
                    f"got tensor {shown(tensor)} in both {found[tensor].name!r} and {shard!r}; each"
                    " must be in one shard; fetch the checkpoint again"
                )
            found[tensor] = file
    if expected is not None:
        _check_index(expected, found)
    return {name: file for name, file in found.items() if not name.endswith(".rotary_emb.inv_freq")}


def _read_index(path: Path) -> dict[str, str]:
    """Returns the index's map of tensor to shard. Shards are names of files in the same folder."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"got {path.name!r} without a weight_map; it must map each tensor to its shard; fetch"
            " the checkpoint again"
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise CheckpointError(
                f"got shard {shown(shard)} for tensor {shown(tensor)} in {path.name!r}; it must be"
                " the name of a .safetensors file in the same folder; fetch the checkpoint again"
            )
    return weight_map


def _check_index(expected: Mapping[str, str], found: Mapping[str, SafetensorsFile]) -> None:
    for tensor, shard in expected.items():
        if tensor not in found or found[tensor].name != shard:
            raise CheckpointError(
                f"got no tensor {shown(tensor)} in {shard!r}, where the index puts it; index and"
                " shards must agree; fetch the checkpoint again"
            )
    for tensor, file in found.items():
        if tensor not in expected:
            raise CheckpointError(
                f"got tensor {shown(tensor)} in {file.name!r} and not in the index; index and"
                " shards must agree; fetch the checkpoint again"
            )


def _read_json(path: Path) -> dict[str, object]:
    with open_bytes(path) as file:
        num_bytes = file.seek(0, 2)
        if num_bytes > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"got {path.name!r} of {num_bytes} bytes; it may have {_MAX_JSON_BYTES}; fetch the"
                " checkpoint again"
            )
        file.seek(0)
        return parse_json(file.readall(), path.name)


def _read_config(
    fields: Fields, ends: Fields, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    architectures = fields.values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise fields.error("architectures", "it must be a list of one name")
    name = architectures[0]
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"got architecture {shown(name)} in {fields.source}; known are {', '.join(FAMILIES)};"
            " choose a model of one of these"
        )
    _refuse_unsupported(fields)
    model_width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not fields.has("head_dim") and model_width % num_heads:
        raise fields.error("hidden_size", f"without head_dim it must be a multiple of {num_heads}")
    vocab_size = fields.integer("vocab_size")
    rope_theta, rope_scaling = _read_rope(fields)
    has_tie = fields.flag("tie_word_embeddings", False)
    begins = fields.token_ids("bos_token_id", vocab_size)
    if len(begins) > 1:
        raise fields.error("bos_token_id", "it must be one token id")
    with as_checkpoint_errors():
        config = ModelConfig(
            family=FAMILIES[name],
            vocab_size=vocab_size,
            num_layers=fields.integer("num_hidden_layers"),
            model_width=model_width,
            ffn_width=fields.integer("intermediate_size"),
            num_query_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_width=fields.integer("head_dim", model_width // num_heads),
            context_len=fields.integer("max_position_embeddings"),
            norm_epsilon=fields.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            ties_embedding=has_tie and "lm_head.weight" not in shapes,
            eos_token_ids=ends.token_ids("eos_token_id", vocab_size),
            bos_token_id=begins[0] if begins else None,
        )
    layers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in shapes)
    check_layers(config, {int(layer[1]) for layer in layers if layer})
    return config


def _refuse_unsupported(fields: Fields) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, False):
            raise fields.error(name, "only projections without bias are supported")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "only 'silu' is supported")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    if fields.has("quantization_config"):
        raise fields.error("quantization_config", "only plain floats are supported in a folder")


def _read_rope(fields: Fields) -> tuple[float, Llama3Rope | None]:
    """Reads the rope's base and scaling from either form.

    Until transformers 5, `rope_theta` and `rope_scaling` stand on their own; from 5 on,
    `rope_parameters` holds both. Where a file has both forms they must agree.
    """
    new = fields.fields("rope_parameters")
    theta = fields.number("rope_theta", new.number("rope_theta", 10000.0))
    new_kind = Fields({k: v for k, v in new.values.items() if k != "rope_theta"}, new.source)
    scaling = _read_rope_scaling(new_kind)
    if fields.has("rope_scaling"):
        old_scaling = _read_rope_scaling(fields.fields("rope_scaling"))
        if fields.has("rope_parameters") and old_scaling != scaling:
            raise fields.error("rope_parameters", "it must agree with rope_scaling beside it")
        scaling = old_scaling
    if new.number("rope_theta", theta) != theta:
        raise fields.error("rope_theta", "it must agree with rope_parameters beside it")
    return theta, scaling


def _read_rope_scaling(fields: Fields) -> Llama3Rope | None:
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind not in _ROPE_SETTINGS:
        raise CheckpointError(
            f"got rope type {shown(kind)} in {fields.source}; supported are"
            f" {', '.join(_ROPE_SETTINGS)}; choose another checkpoint"
        )
    for name in fields.values:
        if name not in _ROPE_SETTINGS[kind] and fields.has(name):
            raise CheckpointError(
                f"got {shown(name)} in {fields.source}; a {kind} rope has"
                f" {', '.join(sorted(_ROPE_SETTINGS[kind]))}; choose another checkpoint"
            )
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return None
    scaling = Llama3Rope(
        factor=fields.number("factor"),
        low_frequency_factor=fields.number("low_freq_factor"),
        high_frequency_factor=fields.number("high_freq_factor"),
        original_context_len=fields.integer("original_max_position_embeddings"),
    )
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise fields.error("high_freq_factor", "it must be above low_freq_factor")
    return scaling
