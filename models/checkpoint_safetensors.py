"""One safetensors file: a header of names, types and places, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, little-endian; a
JSON header; the bytes, without holes). Folders, shards and configs are not known here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_bytes import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    open_bytes,
    read_exactly,
    read_numbers,
)
from pallasite.models.checkpoint_fields import parse_json, shown
from pallasite.models.errors import CheckpointError

FLOATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
NUMBERS = FLOATS | {
    "F8_E4M3": FLOAT8,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""Types by the format's names: what plain weights may have, and what quantized ones are made of."""

MAX_HEADER_BYTES = 32 << 20
MAX_DIMS = 8


@dataclass(frozen=True)
class SafeTensor:
    """A tensor's place: `offset` is in bytes from the file's beginning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class SafetensorsFile:
    """A safetensors file whose header has been read and checked. It holds no open file.

    Attributes:
        name: the file's name, without its folder.
        tensors: each tensor's place by its name, in the order of their bytes.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, np.dtype] = FLOATS) -> None:
        """Raises CheckpointError for a damaged header, or a tensor of a type not in `dtypes`."""
        self.name = path.name
        self._dtypes = dtypes
        self._path = path
        with open_bytes(path) as file:
            file_bytes = file.seek(0, 2)
            header_bytes = 0
            if file_bytes >= 8:
                file.seek(0)
                header_bytes = int.from_bytes(file.read(8), "little")
            most = min(MAX_HEADER_BYTES, file_bytes - 8)
            if not 2 <= header_bytes <= most:
                raise self._damaged(
                    f"a header of {header_bytes} bytes in a file of {file_bytes}",
                    f"the header must have 2 to {max(most, 2)} bytes",
                )
            header = np.empty(header_bytes, np.uint8)
            read_exactly(file, header, "the header")
        entries = parse_json(header.tobytes(), f"a header of {path.name!r}")
        entries.pop("__metadata__", None)
        self.tensors = self._place(entries, data_start=8 + header_bytes, file_bytes=file_bytes)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor of the file, in the file's own type. Raises CheckpointError."""
        tensor = self.tensors[name]
        return read_numbers(self._path, tensor.offset, tensor.shape, tensor.dtype, name)

    def _place(
        self, entries: dict[str, object], data_start: int, file_bytes: int
    ) -> dict[str, SafeTensor]:
        spans = sorted(
            (*self._span(name, entry), name) for name, entry in entries.items()
        )  # begin, end, shape, dtype's name, name
        tensors = {}
        expected = 0
        for begin, end, shape, dtype, name in spans:
            if begin != expected:
                what = "shares bytes with another" if begin < expected else "follows a hole"
                raise self._damaged(
                    f"tensor {shown(name)} at byte {begin}, where {expected} comes next",
                    f"no tensor {what}",
                )
            expected = end
            tensors[name] = SafeTensor(shape, self._dtypes[dtype], data_start + begin)
        if data_start + expected != file_bytes:
            last = f" to the end of tensor {shown(spans[-1][-1])}" if spans else ""
            raise self._damaged(
                f"{file_bytes} bytes", f"the header asks for {data_start + expected}{last}"
            )
        return tensors

    def _span(self, name: str, entry: object) -> tuple[int, int, tuple[int, ...], str]:
        """Checks one entry of the header on its own."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(
                f"an entry of tensor {shown(name)} that is not an object of three fields",
                "it must have dtype, shape and data_offsets",
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in self._dtypes:
            raise CheckpointError(
                f"got tensor {shown(name)} of type {shown(dtype)} in {self.name!r}; allowed are"
                f" {', '.join(self._dtypes)}; convert the checkpoint"
            )
        if not _are_sizes(shape) or len(shape) > MAX_DIMS:
            raise self._damaged(
                f"a shape of tensor {shown(name)} that is not a list of sizes",
                f"it must have at most {MAX_DIMS} integers >= 0",
            )
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._damaged(
                f"data_offsets of tensor {shown(name)} that are not a begin and an end",
                "they must be two integers >= 0 in order",
            )
        num_bytes = math.prod(shape) * self._dtypes[dtype].itemsize
        if num_bytes != offsets[1] - offsets[0]:
            raise self._damaged(
                f"tensor {shown(name)} with {offsets[1] - offsets[0]} bytes",
                f"its shape {shape} of {dtype} takes {num_bytes}",
            )
        return offsets[0], offsets[1], tuple(shape), dtype

    def _damaged(self, got: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"got {got} in {self.name!r}; {allowed}; fetch the file again")


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
