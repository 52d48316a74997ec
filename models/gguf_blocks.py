"""GGUF's quantized blocks as they are: integers, scales and minimums, without rounding again.

What a number stands for is scale * integer + minimum, exactly, in f32. The layouts are ggml's
(ggml-common.h): a block of 32, or of 256 cut into eight groups, little-endian.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_bytes import open_bytes, read_exactly, require_finite
from pallasite.models.forms import Rule, pattern_name
from pallasite.models.gguf_kinds import kind_by_name
from pallasite.models.quantize import QuantizedTensor

BLOCK_FORMS = {"Q4_0": "q4_1", "Q4_1": "q4_1", "Q4_K": "w4a8:32", "Q8_0": "q8_0"}
"""The form that holds each kind exactly. Q4_0 is Q4_1 with a minimum of -8 scales."""

_GROUP = 32


def block_rules(kinds: Mapping[str, str]) -> tuple[Rule, ...]:
    """Returns the rules for the forms of weights whose layers are all of kinds in BLOCK_FORMS.

    Args:
        kinds: of each tensor, by its Hugging Face name.
    """
    forms: dict[str, set[str | None]] = {}
    for name, kind in kinds.items():
        forms.setdefault(pattern_name(name), set()).add(BLOCK_FORMS.get(kind))
    # Layers are stacked, so that they must be of one form.
    return tuple(
        (f"^{re.escape(pattern)}$", form)
        for pattern, (form, *others) in forms.items()
        if form is not None and not others
    )


def read_blocks(
    path: Path, offset: int, shape: tuple[int, ...], kind_name: str, name: str
) -> QuantizedTensor:
    """Returns a matrix `[out, in]` of a kind in BLOCK_FORMS.

    Raises CheckpointError naming the tensor where bytes are missing or a scale is not finite.
    """
    kind = kind_by_name(kind_name)
    num_rows, num_inputs = shape
    blocks = np.empty((num_rows, num_inputs // kind.block_len, kind.block_bytes), np.uint8)
    with open_bytes(path) as file:
        file.seek(offset)
        read_exactly(file, blocks.reshape(-1), name)
    tensor = _READERS[kind_name](blocks)
    require_finite(tensor.scales, name)
    if tensor.minimums is not None:
        require_finite(tensor.minimums, name)
    return tensor


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """A float16 of each block, as f32."""
    octets = np.ascontiguousarray(blocks[..., start : start + 2])
    return octets.view("<f2")[..., 0].astype(np.float32)


def _codes(octets: np.ndarray) -> np.ndarray:
    """The nibbles of groups' 16 bytes, `[..., 16]`: low ones first. Returns `[rows, inputs]`."""
    codes = np.empty((*octets.shape[:-1], 2, octets.shape[-1]), np.uint8)
    np.bitwise_and(octets, 15, out=codes[..., 0, :])
    np.right_shift(octets, 4, out=codes[..., 1, :])
    return codes.reshape(len(octets), -1)


def _read_q4_0(blocks: np.ndarray) -> QuantizedTensor:
    scales = _halves(blocks, 0)
    return QuantizedTensor(_codes(blocks[..., 2:]), scales, scales * np.float32(-8))


def _read_q4_1(blocks: np.ndarray) -> QuantizedTensor:
    return QuantizedTensor(_codes(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _read_q8_0(blocks: np.ndarray) -> QuantizedTensor:
    values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return QuantizedTensor(values.reshape(len(blocks), -1), _halves(blocks, 0))


def _read_q4_k(blocks: np.ndarray) -> QuantizedTensor:
    """Scales and minimums of six bits each, times one of the block's own."""
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=-1)
    minimums = np.concatenate((second & 63, (third >> 4) | (second >> 6) << 4), axis=-1)
    # Four runs of 32 bytes, whose low and high bits are a group each.
    octets = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, _GROUP)
    codes = np.concatenate((octets & 15, octets >> 4), axis=3).reshape(len(blocks), -1)
    return QuantizedTensor(
        codes,
        (_halves(blocks, 0)[..., None] * scales).reshape(len(blocks), -1),
        -(_halves(blocks, 2)[..., None] * minimums).reshape(len(blocks), -1),
    )


_READERS = {"Q4_0": _read_q4_0, "Q4_1": _read_q4_1, "Q4_K": _read_q4_k, "Q8_0": _read_q8_0}
