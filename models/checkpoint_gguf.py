"""A GGUF file seen as a Hugging Face checkpoint: its names, its order of rows, its norms."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_fields import Fields, shown
from pallasite.models.config import ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.gguf_architectures import ARCHITECTURES, NAMES, Architecture
from pallasite.models.gguf_blocks import BLOCK_FORMS, block_rules
from pallasite.models.gguf_config import read_config
from pallasite.models.gguf_file import GgufFile
from pallasite.models.quantize import Stored


class GgufCheckpoint:
    """An opened GGUF file; satisfies `Checkpoint`.

    Attributes:
        config: the model's sizes.
        shapes: every tensor's shape. One that the architecture does not know keeps its own name.
        metadata: the file's, for its tokenizer and chat template.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, object]

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.metadata = self._file.metadata
        fields = Fields(self.metadata, "the GGUF's metadata")
        name = fields.text("general.architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"got general.architecture={shown(name)}; known are {', '.join(ARCHITECTURES)};"
                " choose a model of one of these"
            )
        self._architecture = ARCHITECTURES[name]
        self._stored_names = _hf_names(self._architecture, self._file)
        self.shapes = {
            hf_name: self._file.tensors[stored].shape
            for hf_name, stored in self._stored_names.items()
        }
        config = read_config(self._file, self._architecture, name, self.shapes)
        kinds = {name: self._file.tensors[own].kind for name, own in self._stored_names.items()}
        self.config = replace(config, block_forms=block_rules(kinds))
        self._check_rows()

    def read(self, name: str, form: Form | None = None) -> Stored:
        """See `Checkpoint.read`."""
        if name not in self._stored_names:
            raise CheckpointError(
                f"got no tensor {name!r} in the GGUF; `shapes` lists those there are; convert the"
                " model again"
            )
        stored, num_heads = self._stored_names[name], self._interleaved_heads(name)
        kind = self._file.tensors[stored].kind
        if form is not None and str(form) == BLOCK_FORMS.get(kind):
            blocks = self._file.read_blocks(stored)
            return blocks.map(lambda part: separate_halves(part, num_heads) if num_heads else part)
        tensor = self._file.read(stored)
        if num_heads:
            separate_halves(tensor, num_heads)
        if self._architecture.has_whole_norms and name.endswith("norm.weight"):
            # In float32: a 16-bit type would round what is left differently from the original.
            return tensor.astype(np.float32) - np.float32(1)
        return tensor

    def _interleaved_heads(self, name: str) -> int:
        """How many heads' rows the file interleaves in this tensor, 0 for most."""
        if not self._architecture.is_interleaved:
            return 0
        if name.endswith(".self_attn.q_proj.weight"):
            return self.config.num_query_heads
        return self.config.num_kv_heads if name.endswith(".self_attn.k_proj.weight") else 0

    def _check_rows(self) -> None:
        for name, shape in self.shapes.items():
            num_rows = self._interleaved_heads(name) * self.config.head_width
            if num_rows and shape[0] != num_rows:
                raise CheckpointError(
                    f"got {shape[0]} rows in tensor {name!r}; the metadata's heads make"
                    f" {num_rows}; convert the model again"
                )


def _hf_names(architecture: Architecture, file: GgufFile) -> dict[str, str]:
    """Returns Hugging Face's name of each tensor, to the file's name for it."""
    names = {}
    for stored in file.tensors:
        layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", stored)
        if layer and layer[2] in architecture.layer_names:
            names[f"model.layers.{layer[1]}.{architecture.layer_names[layer[2]]}"] = stored
        elif stored not in architecture.settings:
            names[NAMES.get(stored, stored)] = stored
    num_settings = len(architecture.settings & set(file.tensors))
    if len(names) + num_settings != len(file.tensors):
        raise CheckpointError(
            "got a GGUF that holds a tensor under both GGUF's and Hugging Face's name; each must"
            " stand once; convert the model again"
        )
    return names


def separate_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of each head's rows, in place, one head at a time; returns them.

    `rows` is [N*H, D], each head's rows in the order 0, H/2, 1, H/2+1, ...; after it 0, 1, 2, ....
    """
    for head in np.split(rows, num_heads):
        pairs = head.copy()
        head[: len(head) // 2] = pairs[0::2]
        head[len(head) // 2 :] = pairs[1::2]
    return rows
