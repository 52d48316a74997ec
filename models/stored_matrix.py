"""A quantized matrix in a checkpoint: which tensors it is made of, and how they become one.

What the formats share is here: small integers side by side in int32 words, zeros that are codes,
and checks of shapes and types. Which tensors a format has, and what they mean, is the format's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pallasite.models.checkpoint_bytes import BFLOAT16, FLOAT16, FLOAT32
from pallasite.models.checkpoint_fields import shown
from pallasite.models.checkpoint_safetensors import SafeTensor
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import Form
from pallasite.models.quantize import QuantizedTensor

INT32 = np.dtype(np.int32)
SCALE_TYPES = (FLOAT16, BFLOAT16, FLOAT32)

Raw = Mapping[str, np.ndarray]
"""A matrix's tensors as they are in the file, by part."""


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A quantized matrix as a checkpoint has it.

    Attributes:
        shape: (out, in).
        form: what it is held in without rounding again.
        parts: the name of each of its tensors, by part.
        build: makes it of its tensors. Raises CheckpointError where they contradict each other.
    """

    shape: tuple[int, int]
    form: Form
    parts: Mapping[str, str]
    build: Callable[[Raw], QuantizedTensor]


@dataclass(frozen=True)
class Module:
    """The tensors whose names begin alike, as in `model.layers.0.mlp.up_proj.qweight`.

    Attributes:
        name: what they begin with, "model.layers.0.mlp.up_proj".
        tensors: by what they end in, "qweight".
    """

    name: str
    tensors: Mapping[str, SafeTensor]

    def parts(self, *required: str, optional: Sequence[str] = ()) -> dict[str, str]:
        """Returns the names of a quantized matrix's tensors; a bias is a tensor of its own.

        Raises CheckpointError for one that is missing or that the format does not have.
        """
        for part in required:
            if part not in self.tensors:
                raise CheckpointError(
                    f"got no tensor {shown(f'{self.name}.{part}')}; a quantized matrix of this"
                    f" format has {', '.join(required)}; fetch the checkpoint again"
                )
        for part in self.tensors:
            if part not in (*required, *optional, "bias"):
                raise CheckpointError(
                    f"got tensor {shown(f'{self.name}.{part}')}; a quantized matrix of this format"
                    f" has {', '.join((*required, *optional))}; convert the checkpoint"
                )
        return {part: f"{self.name}.{part}" for part in self.tensors if part != "bias"}

    def shape(self, part: str, *types: np.dtype) -> tuple[int, int]:
        """Returns the shape of a tensor that must be a matrix of one of these types."""
        tensor = self.tensors[part]
        if tensor.dtype not in types or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise self.error(
                part, f"it must be a matrix of {' or '.join(str(dtype) for dtype in types)}"
            )
        return (tensor.shape[0], tensor.shape[1])

    def require(self, part: str, shape: tuple[int, ...], *types: np.dtype) -> None:
        """Raises CheckpointError unless a tensor has this shape and one of these types."""
        tensor = self.tensors[part]
        if tensor.shape != shape or tensor.dtype not in types:
            raise self.error(
                part, f"it must be {list(shape)} of {' or '.join(str(dtype) for dtype in types)}"
            )

    def error(self, part: str, allowed: str) -> CheckpointError:
        tensor = self.tensors[part]
        return CheckpointError(
            f"got tensor {shown(f'{self.name}.{part}')} of shape {list(tensor.shape)} and type"
            f" {tensor.dtype}; {allowed}; fetch the checkpoint again"
        )


def modules_of(tensors: Mapping[str, SafeTensor]) -> list[Module]:
    """Groups tensors by all but the last part of their names, in the order of the first of each."""
    grouped: dict[str, dict[str, SafeTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        grouped.setdefault(module, {})[part] = tensor
    return [Module(name, parts) for name, parts in grouped.items()]


def unpack(words: np.ndarray, num_bits: int) -> np.ndarray:
    """Returns the 4- or 8-bit fields of int32 `[rows, n]`, the lowest bits first.

    The result is uint8 `[rows, n * 32 / num_bits]`.
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if num_bits == 8:
        return octets
    fields = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=fields[..., 0])
    np.right_shift(octets, 4, out=fields[..., 1])
    return fields.reshape(octets.shape[0], -1)


def with_zeros(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> QuantizedTensor:
    """Makes 4-bit codes `[out, in]` one that stand for (code - zero) * scale.

    Scales of 16 bits are exact in f32, and so is their product with a zero.

    Args:
        scales, zeros: `[out, groups]`, floats and integers.
    """
    scales = np.ascontiguousarray(scales, np.float32)
    minimums = -(scales * zeros.astype(np.float32))
    return QuantizedTensor(np.ascontiguousarray(codes), scales, minimums)


def without_zeros(codes: np.ndarray, scales: np.ndarray) -> QuantizedTensor:
    """Makes 8-bit codes `[out, in]` one that stand for (code - 128) * scale."""
    values = np.ascontiguousarray(codes ^ np.uint8(0x80)).view(np.int8)
    return QuantizedTensor(values, np.ascontiguousarray(scales, np.float32))
