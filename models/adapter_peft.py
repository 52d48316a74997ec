"""An adapter's folder in the PEFT format: adapter_config.json and adapter_model.safetensors.

Opening one checks all of it against the model and the room that there is; nothing is put on a
device here.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from pallasite.models.adapters import AdapterSpec, HostLowRank
from pallasite.models.checkpoint_bytes import open_bytes
from pallasite.models.checkpoint_fields import Fields, parse_json, shown
from pallasite.models.checkpoint_safetensors import SafetensorsFile
from pallasite.models.errors import CheckpointError
from pallasite.models.lora import adapter_key
from pallasite.models.weights import Matrix

_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
# What PEFT's LoRA can do that is not served; each must be absent, or have the value that is none.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": (),
    "layer_replication": ([],),
}
# What A and B begin with and the base keeps its weights; of the others (PiSSA, OLoRA, CorDA, LoftQ)
# a part is taken out of the base, so that A and B mean nothing beside the base as it was.
_KEEP_BASE: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


class PeftAdapter:
    """An opened adapter that fits a model.

    Raises CheckpointError for a folder that is damaged, and for an adapter that has a rank, shapes,
    targets or settings other than what the room takes.
    """

    def __init__(self, folder: Path, room: AdapterSpec) -> None:
        self._room = room
        self._fields = Fields(_read_config(folder / "adapter_config.json"), "adapter_config.json")
        self._file = SafetensorsFile(folder / "adapter_model.safetensors")
        if self._fields.text("peft_type") != "LORA":
            raise self._fields.error("peft_type", "only 'LORA' is supported")
        for name, neutral in _UNSUPPORTED.items():
            value = self._fields.values.get(name)
            if value is not None and value not in neutral:
                raise self._fields.error(name, "it is not supported here; leave it out")
        if (start := self._fields.values.get("init_lora_weights")) not in _KEEP_BASE:
            raise CheckpointError(
                f"got init_lora_weights={shown(start)} in adapter_config.json, which changes the"
                " base's own weights; allowed are true, false, 'gaussian', 'eva' and 'orthogonal';"
                " save the adapter anew with PEFT's path_initial_model_for_weight_conversion"
            )
        self._pairs = self._find_pairs()

    def read(self) -> dict[str, HostLowRank]:
        """Returns the arrays of every matrix that the adapter changes, by `adapter_key`."""
        read = {}
        for matrix in self._room.matrices():
            names = [
                name for name in _module_names(matrix, self._num_layers) if name in self._pairs
            ]
            if names:
                read[adapter_key(matrix.source)] = self._read_matrix(matrix)
        return read

    @property
    def _num_layers(self) -> int:
        return self._room.model.config.num_layers

    def _read_matrix(self, matrix: Matrix) -> HostLowRank:
        partition, rank = self._room.model.partition, self._room.rank
        rows = matrix.source.rows or (0, matrix.source.shape[0])
        inputs = partition.axis(matrix.axes[-1], matrix.source.shape[1])
        outputs = partition.axis(matrix.axes[-2], rows[1] - rows[0])
        a = np.zeros((self._num_layers, rank, inputs.size), np.float32)
        b = np.zeros((self._num_layers, rank, outputs.size), np.float32)
        for layer, name in enumerate(_module_names(matrix, self._num_layers)):
            if name not in self._pairs:
                continue
            own_a, own_b = (self._file.read(part).astype(np.float32) for part in self._pairs[name])
            own = len(own_a)
            a[layer, :own] = inputs.lay_out(own_a, 1)
            with np.errstate(over="ignore"):
                scaled = own_b[rows[0] : rows[1]].astype(np.float64) * self._scale(name, own)
            # An infinite B would reach every token of a batch: what is not its own is 0 * B.
            if np.abs(scaled).max(initial=0) > _LARGEST:
                raise CheckpointError(
                    f"got a B of {shown(name)} that its alpha scales beyond the floats; it must be"
                    " finite; fetch or train the adapter again"
                )
            b[layer, :own] = outputs.lay_out(scaled.astype(np.float32).T, 1)
        return HostLowRank(a, b)

    def _scale(self, name: str, rank: int) -> float:
        own = self._own("alpha_pattern", name)
        alpha = own[0].number(own[1]) if own else self._fields.number("lora_alpha", 8.0)
        is_stable = self._fields.flag("use_rslora", False)
        return alpha / (math.sqrt(rank) if is_stable else rank)

    def _find_pairs(self) -> dict[str, tuple[str, str]]:
        """Returns the names of A and B by their module's name, checked."""
        shapes = {
            name: matrix.source.shape
            for matrix in self._room.matrices()
            for name in _module_names(matrix, self._num_layers)
        }
        assert shapes, "the engine refuses adapters where there is room for none"
        found: dict[str, dict[str, str]] = {}
        for tensor in self._file.tensors:
            match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", tensor)
            module = match[1].removeprefix(_PREFIX) if match else tensor
            if "language_model." in module:
                raise CheckpointError(
                    f"got tensor {shown(tensor)}, of an adapter for a model with a vision part;"
                    " adapters of models that are language alone are supported; train one on the"
                    " language model"
                )
            if match is None or module not in shapes:
                raise CheckpointError(
                    f"got tensor {shown(tensor)} in the adapter; adapters of this model may change"
                    f" {', '.join(self._target_names())} of its {self._num_layers} layers; train"
                    " another, or choose the base that this one was made for"
                )
            found.setdefault(module, {})[match[2]] = tensor
        if not found:
            raise CheckpointError("got an adapter without tensors; fetch or train it again")
        return {name: self._check_pair(name, pair, shapes[name]) for name, pair in found.items()}

    def _check_pair(
        self, name: str, pair: Mapping[str, str], shape: tuple[int, ...]
    ) -> tuple[str, str]:
        if len(pair) != 2:
            raise CheckpointError(
                f"got only one of lora_A and lora_B for {shown(name)}; both are needed; fetch the"
                " adapter again"
            )
        a, b = (self._file.tensors[pair[part]].shape for part in "AB")
        own = self._own("rank_pattern", name)
        rank = own[0].integer(own[1]) if own else self._fields.integer("r")
        if rank > self._room.rank:
            raise CheckpointError(
                f"got an adapter of rank {rank}; at most {self._room.rank} is allowed; start the"
                " server with a higher --max-adapter-rank"
            )
        if a != (rank, shape[1]) or b != (shape[0], rank):
            raise CheckpointError(
                f"got A {list(a)} and B {list(b)} for {shown(name)}; with r={rank} this model needs"
                f" {[rank, shape[1]]} and {[shape[0], rank]}; the adapter was made for another"
                " base, or its config is wrong"
            )
        return pair["A"], pair["B"]

    def _own(self, field: str, name: str) -> tuple[Fields, str] | None:
        """Where a module's own rank or alpha is: the first pattern that its name ends with."""
        own = self._fields.fields(field)
        for pattern in own.values:
            # Patterns may be expressions; names of modules, which is what PEFT writes, are enough.
            if not re.fullmatch(r"[\w.]{1,200}", pattern):
                raise own.error(pattern, "only modules' names are supported as patterns")
            if f".{name}".endswith(f".{pattern}"):
                return own, pattern
        return None

    def _target_names(self) -> list[str]:
        names = (matrix.source.pattern_name.rsplit(".", 1)[-1] for matrix in self._room.matrices())
        return list(dict.fromkeys(names))


def _module_names(matrix: Matrix, num_layers: int) -> list[str]:
    return [name.removesuffix(".weight") for name in matrix.source.names(num_layers)]


def _read_config(path: Path) -> dict[str, object]:
    with open_bytes(path) as file:
        if file.seek(0, 2) > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"got {path.name!r} of more than {_MAX_CONFIG_BYTES} bytes; fetch the adapter again"
            )
        file.seek(0)
        return parse_json(file.readall(), path.name)
