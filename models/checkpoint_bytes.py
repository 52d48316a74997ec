"""Bytes of weights files: read in full or refused, and never a number that is not finite.

Tensors are not mapped: pages of a mapped file count as resident until the kernel takes them back,
and a file cut short under a mapping ends the process. Bytes go straight into the tensor's memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np

from pallasite.models.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

# Magnitude bits of a float, and infinity's: a larger magnitude is a NaN. FLOAT8 has one NaN alone.
_MAGNITUDE = {
    FLOAT8: (np.uint8, 0x7F, 0x7F),
    BFLOAT16: (np.uint16, 0x7FFF, 0x7F80),
    FLOAT16: (np.uint16, 0x7FFF, 0x7C00),
    FLOAT32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
}

# Small enough that a piece is still in the processor's cache when it is checked.
_PIECE_BYTES = 1 << 20


@contextmanager
def open_bytes(path: Path) -> Iterator[FileIO]:
    """Opens a file unbuffered. Whatever the operating system refuses is CheckpointError."""
    try:
        with FileIO(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"got {path.name!r}, which cannot be read ({error.strerror}); it must be a readable"
            " file; check that it is there and its permissions"
        ) from error


def read_exactly(file: FileIO, target: np.ndarray, name: str) -> None:
    """Fills `target` (uint8) from where `file` stands; `name` is the tensor in the message."""
    view = target.data
    while view.nbytes:
        num_read = file.readinto(view)
        if not num_read:
            raise CheckpointError(
                f"got {target.nbytes - view.nbytes} of {target.nbytes} bytes in tensor {name!r}"
                " before the end of the file; all must be there; fetch the file again"
            )
        view = view[num_read:]


def read_numbers(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, name: str
) -> np.ndarray:
    """Returns a tensor stored as plain little-endian integers, or floats of a type above."""
    array = np.empty(math.prod(shape), dtype)
    with open_bytes(path) as file:
        file.seek(offset)
        step = _PIECE_BYTES // dtype.itemsize
        for start in range(0, array.size, step):
            piece = array[start : start + step]
            read_exactly(file, piece.view(np.uint8), name)
            if dtype in _MAGNITUDE:
                require_finite(piece, name)
    return array.reshape(shape)


def require_finite(values: np.ndarray, name: str) -> None:
    """Raises CheckpointError if any of a contiguous piece of tensor `name` is infinite or NaN."""
    unsigned, mask, infinity = _MAGNITUDE[values.dtype]
    # On the bits: half the time of isfinite in f32, and ml_dtypes has no fast isfinite.
    magnitudes = values.view(unsigned) & unsigned(mask)
    if magnitudes.max(initial=0) >= infinity:
        count = int((magnitudes >= infinity).sum())
        raise CheckpointError(
            f"got {count} values or scales that are infinite or NaN in tensor {name!r}; weights"
            " must be finite; fetch the file again"
        )
