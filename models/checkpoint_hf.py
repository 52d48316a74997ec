"""A Hugging Face folder: config.json, generation_config.json and *.safetensors, one file or shards.

Nothing in the folder is code, and nothing outside it is opened by name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_bytes import open_bytes
from pallasite.models.checkpoint_fields import Fields, parse_json, shown
from pallasite.models.checkpoint_quantized import read_quantization
from pallasite.models.checkpoint_safetensors import NUMBERS, SafetensorsFile
from pallasite.models.config import ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.hf_config import (
    Architecture,
    read_architecture,
    read_config,
    tensor_name,
)
from pallasite.models.quantize import Stored

_MAX_JSON_BYTES = 32 << 20


class HfCheckpoint:
    """An opened folder; satisfies `Checkpoint`. Opening reads the settings and the headers.

    Weights are model.safetensors, or the shards that model.safetensors.index.json lists. An
    output head in the files is used even where config.json ties it to the embedding. Left out are
    rotary frequencies, which old files carry and which follow from the config, and what a model has
    beside its language part, vision for example.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, folder: Path) -> None:
        fields = Fields(read_json(folder / "config.json"), "config.json")
        architecture = read_architecture(fields)
        self._stored = _by_declared_name(architecture, _files_by_tensor(folder))
        self._quantization = read_quantization(
            fields, {name: file.tensors[stored] for name, (stored, file) in self._stored.items()}
        )
        self.shapes = {
            name: shape
            for name, shape in self._quantization.shapes.items()
            if not self._is_added_bias(architecture, name)
        }
        generation = folder / "generation_config.json"
        ends = Fields(read_json(generation), generation.name) if generation.exists() else fields
        config = read_config(architecture, fields, ends, self.shapes)
        self.config = replace(config, stored_forms=self._quantization.rules)

    def _is_added_bias(self, architecture: Architecture, name: str) -> bool:
        """Whether it is a bias of zeros that a quantizer wrote beside a matrix that has none."""
        matrix = name.removesuffix("bias") + "weight"
        if not name.endswith(".bias") or matrix not in self._quantization.matrices:
            return False
        has_own = architecture.has_bias and name.endswith(
            ("q_proj.bias", "k_proj.bias", "v_proj.bias")
        )
        bias = self.read(name)
        return not has_own and isinstance(bias, np.ndarray) and not bias.any()

    def read(self, name: str, form: Form | None = None) -> Stored:
        """See `Checkpoint.read`."""
        matrix = self._quantization.matrices.get(name)
        if matrix is not None:
            parts = {part: self._stored[tensor] for part, tensor in matrix.parts.items()}
            return matrix.build({part: file.read(stored) for part, (stored, file) in parts.items()})
        if name not in self._stored:
            raise CheckpointError(
                f"got no tensor {name!r} in the folder's files; `shapes` lists those there are;"
                " fetch the checkpoint again"
            )
        stored, file = self._stored[name]
        return file.read(stored)


def _by_declared_name(
    architecture: Architecture, files: Mapping[str, SafetensorsFile]
) -> dict[str, tuple[str, SafetensorsFile]]:
    """Returns for each tensor that is read its name in the files and its file."""
    found: dict[str, tuple[str, SafetensorsFile]] = {}
    for stored, file in files.items():
        name = tensor_name(architecture, stored)
        if name in found:
            raise CheckpointError(
                f"got tensors {shown(found[name][0])} and {shown(stored)}, two names of one; each"
                " must be there once; fetch the checkpoint again"
            )
        if name is not None:
            found[name] = (stored, file)
    return found


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
        file = SafetensorsFile(folder / shard, NUMBERS)
        for tensor in file.tensors:
            if tensor in found:
                raise CheckpointError(
                    f"got tensor {shown(tensor)} in both {found[tensor].name!r} and {shard!r}; each"
                    " must be in one shard; fetch the checkpoint again"
                )
            found[tensor] = file
    if expected is not None:
        _check_index(expected, found)
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Returns the index's map of tensor to shard. Shards are names of files in the same folder."""
    weight_map = read_json(path).get("weight_map")
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


def read_json(path: Path) -> dict[str, object]:
    with open_bytes(path) as file:
        num_bytes = file.seek(0, 2)
        if num_bytes > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"got {path.name!r} of {num_bytes} bytes; it may have {_MAX_JSON_BYTES}; fetch the"
                " checkpoint again"
            )
        file.seek(0)
        return parse_json(file.readall(), path.name)
