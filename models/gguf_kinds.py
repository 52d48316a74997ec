"""The kinds of numbers that a GGUF stores, how many bytes they take, and how they become float32.

Quantized kinds are rows of blocks: a few scales and 32 or 256 small integers. The gguf package
knows each block's layout; here its work is cut into pieces, so that temporaries stay small.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pallasite.models.checkpoint_bytes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    open_bytes,
    read_exactly,
    read_numbers,
    require_finite,
)
from pallasite.models.checkpoint_fields import shown
from pallasite.models.errors import CheckpointError

FLOAT_DTYPES = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}

# Numbers dequantized at once: a 24th of the tensor within these bounds. Below them the package's
# overhead a call shows; above them its temporaries (some 17 bytes a number, together) leave the
# processor's cache and the time doubles.
_MIN_PIECE, _MAX_PIECE = 1 << 14, 1 << 17


@dataclass(frozen=True)
class GgufKind:
    """A type of stored number: `block_bytes` bytes hold `block_len` numbers."""

    name: str
    block_len: int
    block_bytes: int


# By the number that stands for each in the file (ggml.h, enum ggml_type).
KINDS = {
    0: GgufKind("F32", 1, 4),
    1: GgufKind("F16", 1, 2),
    2: GgufKind("Q4_0", 32, 18),
    3: GgufKind("Q4_1", 32, 20),
    6: GgufKind("Q5_0", 32, 22),
    7: GgufKind("Q5_1", 32, 24),
    8: GgufKind("Q8_0", 32, 34),
    12: GgufKind("Q4_K", 256, 144),
    13: GgufKind("Q5_K", 256, 176),
    14: GgufKind("Q6_K", 256, 210),
    30: GgufKind("BF16", 1, 2),
}
_KINDS_BY_NAME = {kind.name: kind for kind in KINDS.values()}


def kind_by_name(name: str) -> GgufKind:
    """Returns the kind of a name that a file's tensor has."""
    return _KINDS_BY_NAME[name]


def kind_of(number: int, name: str) -> GgufKind:
    """Returns the kind by a file's number for it; CheckpointError names an unsupported one."""
    if number in KINDS:
        return KINDS[number]
    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    raise CheckpointError(
        f"got tensor {shown(name)} of type {known.get(number, number)}; supported are"
        f" {', '.join(_KINDS_BY_NAME)}; convert the model to one of these"
    )


def read_tensor(
    path: Path, offset: int, shape: tuple[int, ...], kind_name: str, name: str
) -> np.ndarray:
    """Returns a tensor in the file's own float type, or dequantized to float32.

    Beside the result it takes a fifth of its size at most, or 0.3 MiB. Raises CheckpointError
    naming the tensor where bytes are missing, or a number or scale is not finite.
    """
    if kind_name in FLOAT_DTYPES:
        return read_numbers(path, offset, shape, FLOAT_DTYPES[kind_name], name)
    kind, number = _KINDS_BY_NAME[kind_name], GGMLQuantizationType[kind_name]
    array = np.empty(math.prod(shape), np.float32)
    num_blocks = min(_MAX_PIECE, max(_MIN_PIECE, array.size // 24)) // kind.block_len
    blocks = np.empty(num_blocks * kind.block_bytes, np.uint8)
    piece_len = num_blocks * kind.block_len
    # Infinite scales make NaNs, which are looked for; numpy need not warn of them.
    with open_bytes(path) as file, np.errstate(all="ignore"):
        file.seek(offset)
        for start in range(0, array.size, piece_len):
            piece = array[start : start + piece_len]
            stored = blocks[: piece.size // kind.block_len * kind.block_bytes]
            read_exactly(file, stored, name)
            piece[:] = dequantize(stored[None], number)[0]
            require_finite(piece, name)
    return array.reshape(shape)
