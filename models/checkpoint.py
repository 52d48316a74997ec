"""What every checkpoint format offers, whatever its files look like.

A reader presents the tensors under Hugging Face's names and in Hugging Face's orientation
(`[out, in]` for a projection, rope as two halves), so that a family's declarations name each
tensor once. Opening one reads headers only and checks them; tensors are read one at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from pallasite.models.checkpoint_gguf import GgufCheckpoint
from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.config import ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.quantize import Stored


@runtime_checkable
class Checkpoint(Protocol):
    """An opened checkpoint.

    Attributes:
        config: the model's sizes, read and checked.
        shapes: every tensor's shape under its Hugging Face name, in file order.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, form: Form | None = None) -> Stored:
        """Returns one tensor: float32 or the file's own 16-bit float type; or as it was quantized.

        The latter where `config.stored_forms` has a rule for it, and where `form`, which the tensor
        is to be held in, is that of a rule of `config.block_forms`. The caller may keep it; nothing
        else does. Raises CheckpointError naming the tensor where its bytes are missing or cannot be
        right (a scale that is not finite).
        """
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file, or a Hugging Face folder with config.json and *.safetensors."""
    if path.is_dir():
        return HfCheckpoint(path)
    if path.is_file():
        return GgufCheckpoint(path)
    raise CheckpointError(
        f"got {path.name!r}, which is neither a file nor a folder; a model is a GGUF file, a"
        " Hugging Face folder or a pulled name; check the spelling or run `pallasite pull`"
    )
