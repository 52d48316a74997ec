"""One GGUF file: metadata and the places of its tensors, read without trusting a number in it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Which model is in it is not known here. Parsing is our own: every count, length and offset is held
against the file's size before anything is made of it, and a vocabulary of 50,000 tokens takes some
50 ms.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_bytes import open_bytes
from pallasite.models.checkpoint_fields import shown
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_blocks import read_blocks
from pallasite.models.gguf_kinds import kind_of, read_tensor
from pallasite.models.quantize import QuantizedTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_METADATA = 65_536
MAX_TENSORS = 100_000
MAX_DIMS = 4
MAX_NAME_BYTES = 65_535
# Of all arrays together: the largest vocabularies have some 300,000 tokens and as many merges.
MAX_ARRAY_ITEMS = 1 << 22
MAX_ARRAY_DEPTH = 4

_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
# struct's letter for each of the format's plain types.
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the file.

    Attributes:
        name: the file's name for it.
        shape: in numpy's order, the contiguous axis last.
        kind: how its numbers are stored ("Q4_1").
        offset: its first byte, counted from the file's beginning.
        num_bytes: how many it takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file whose header has been read and checked. It holds no open file.

    Attributes:
        metadata: values by key: str, int, float, bool, and lists of them.
        tensors: each tensor's place by its name, in the file's order.

    Raises CheckpointError for whatever is damaged, cut short, contradictory or not supported.
    """

    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_bytes(path) as file:
            if file.seek(0, 2) < 24:
                raise damaged("a file of fewer than 24 bytes", "a GGUF file has at least a header")
            # Pages that hold the header only are touched, and all are given back at the end.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _HeaderParser(data).parse()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor: F32, F16 and BF16 as they are, other kinds dequantized to float32."""
        tensor = self.tensors[name]
        return read_tensor(self._path, tensor.offset, tensor.shape, tensor.kind, name)

    def read_blocks(self, name: str) -> QuantizedTensor:
        """Returns a matrix of a kind in BLOCK_FORMS as it is: integers, scales and minimums."""
        tensor = self.tensors[name]
        return read_blocks(self._path, tensor.offset, tensor.shape, tensor.kind, name)


def damaged(got: str, allowed: str) -> CheckpointError:
    """The error for a file that does not hold together."""
    return CheckpointError(f"got {got}; {allowed}; fetch the file again")


class _HeaderParser:
    """A position in the file's bytes that moves on with each value read, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._position = 0
        self._items_left = MAX_ARRAY_ITEMS
        self._place = "the header"

    def parse(self) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        if (magic := self._data[:4]) != MAGIC:
            raise CheckpointError(
                f"got a file that begins with {magic!r}; a GGUF file begins with {MAGIC!r}; name a"
                " GGUF file or a Hugging Face folder"
            )
        self._position = 4
        version = self._plain("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"got GGUF version {version}; versions 2 and 3 are supported, little-endian;"
                " convert the file again"
            )
        num_tensors, num_metadata = self._plain("Q"), self._plain("Q")
        if num_tensors > MAX_TENSORS or num_metadata > MAX_METADATA:
            raise damaged(
                f"{num_tensors} tensors and {num_metadata} metadata entries",
                f"allowed are {MAX_TENSORS} and {MAX_METADATA}",
            )
        metadata: dict[str, object] = {}
        for _ in range(num_metadata):
            self._place = "the metadata's keys"
            key = self._name()
            if key in metadata:
                raise damaged(f"metadata key {shown(key)} twice", "each may stand once")
            self._place = f"metadata {shown(key)}"
            metadata[key] = self._value(self._plain("I"))
        return metadata, self._tensors(num_tensors, metadata.get("general.alignment", 32))

    def _tensors(self, num_tensors: int, alignment: object) -> dict[str, GgufTensor]:
        if type(alignment) is not int or not (8 <= alignment <= 1 << 20) or alignment % 8:
            raise damaged(
                f"general.alignment={shown(alignment)}", "it must be a multiple of 8, at most 1 MiB"
            )
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            self._place = "the tensors' names"
            name = self._name()
            if name in tensors:
                raise damaged(f"tensor {shown(name)} twice", "each may stand once")
            self._place = f"tensor {shown(name)}"
            tensors[name] = self._tensor(name, alignment)
        data_start = -(-self._position // alignment) * alignment
        return _place_all(tensors, data_start, self._size)

    def _tensor(self, name: str, alignment: int) -> GgufTensor:
        """Reads one entry. Its offset still counts from where the tensors' bytes begin."""
        num_dims = self._plain("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise damaged(
                f"tensor {shown(name)} of {num_dims} axes", f"allowed are 1 to {MAX_DIMS}"
            )
        shape = tuple(self._plain("Q") for _ in range(num_dims))[::-1]
        kind = kind_of(self._plain("I"), name)
        offset = self._plain("Q")
        if 0 in shape or shape[-1] % kind.block_len:
            raise damaged(
                f"tensor {shown(name)} of shape {shape} and type {kind.name}",
                f"no axis may be empty, and the last a multiple of {kind.block_len}",
            )
        if offset % alignment:
            raise damaged(
                f"tensor {shown(name)} at byte {offset}", f"it must be a multiple of {alignment}"
            )
        num_bytes = math.prod(shape) // kind.block_len * kind.block_bytes
        return GgufTensor(name, shape, kind.name, offset, num_bytes)

    def _value(self, value_type: int, depth: int = 0) -> object:
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array(depth + 1)
        value = self._plains(value_type, 1)[0]
        # The shortest decimal that rounds to it: 1e-05, as the JSON of the same model says, where
        # widening would give 9.999999747378752e-06.
        return float(str(np.float32(value))) if value_type == _FLOAT32 else value

    def _array(self, depth: int) -> list[object]:
        value_type, num_items = self._plain("I"), self._plain("Q")
        self._items_left -= num_items
        if self._items_left < 0 or depth > MAX_ARRAY_DEPTH:
            raise damaged(
                f"an array of {num_items} items, {depth} deep, in {self._place}",
                f"allowed are {MAX_ARRAY_ITEMS} items in all arrays, {MAX_ARRAY_DEPTH} deep",
            )
        if value_type == _STRING:
            return [*self._strings(num_items)]
        if value_type == _ARRAY:
            return [self._array(depth + 1) for _ in range(num_items)]
        return [*self._plains(value_type, num_items)]

    def _plains(self, value_type: int, num_items: int) -> list[int | float]:
        if value_type not in _PLAIN:
            raise damaged(
                f"a value of type {value_type} in {self._place}", "the format's types are 0 to 12"
            )
        letter = _PLAIN[value_type]
        begin = self._advance(num_items * struct.calcsize("<" + letter))
        values = struct.unpack_from(f"<{num_items}{letter}", self._data, begin)
        if value_type == _BOOL:
            if any(value > 1 for value in values):
                raise damaged(f"a boolean above 1 in {self._place}", "it must be 0 or 1")
            return [value == 1 for value in values]
        return list(values)

    def _plain(self, letter: str) -> int:
        begin = self._advance(4 if letter == "I" else 8)
        return struct.unpack_from("<" + letter, self._data, begin)[0]

    def _name(self) -> str:
        begin = self._position
        name = self._string()
        if not 1 <= self._position - begin - 8 <= MAX_NAME_BYTES:
            raise damaged(
                f"a name of {self._position - begin - 8} bytes in {self._place}",
                f"allowed are 1 to {MAX_NAME_BYTES}",
            )
        return name

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, num_items: int) -> list[str]:
        """The one loop whose speed is felt: it runs once a token and once a merge."""
        data, size, position = self._data, self._size, self._position
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(num_items):
                begin = position + 8
                position = begin + unpack(data, position)[0]
                if position > size:
                    raise self._cut_short(position - begin)
                strings.append(data[begin:position].decode())
        except struct.error:
            raise self._cut_short(8) from None
        except UnicodeDecodeError as error:
            raise damaged(
                f"a string that is not UTF-8 in {self._place} ({error.reason})",
                "all strings must be UTF-8",
            ) from None
        self._position = position
        return strings

    def _advance(self, num_bytes: int) -> int:
        """Moves on by `num_bytes` and returns where they begin."""
        begin = self._position
        if num_bytes > self._size - begin:
            raise self._cut_short(num_bytes)
        self._position = begin + num_bytes
        return begin

    def _cut_short(self, num_bytes: int) -> CheckpointError:
        return damaged(
            f"a file of {self._size} bytes that ends within {self._place}",
            f"{num_bytes} bytes must follow there",
        )


def _place_all(
    tensors: dict[str, GgufTensor], data_start: int, file_bytes: int
) -> dict[str, GgufTensor]:
    """Turns offsets into places in the file, held against its end and against each other."""
    placed = {
        name: GgufTensor(name, t.shape, t.kind, data_start + t.offset, t.num_bytes)
        for name, t in tensors.items()
    }
    taken = 0
    for tensor in sorted(placed.values(), key=lambda t: t.offset):
        end = tensor.offset + tensor.num_bytes
        if tensor.offset < taken:
            raise damaged(
                f"tensor {shown(tensor.name)} at byte {tensor.offset}, within another",
                "no two may share bytes",
            )
        if end > file_bytes:
            raise damaged(
                f"a file of {file_bytes} bytes",
                f"tensor {shown(tensor.name)} of shape {tensor.shape} ends at byte {end}",
            )
        taken = end
    return placed
