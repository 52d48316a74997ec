"""Writes tensors one at a time into safetensors files of a bounded size, and their index.

Format: as in checkpoint_safetensors.py. A file's header comes before its tensors and is known after
them, so that room is left for it; the format allows spaces at its end.
"""

import json
from io import FileIO
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_safetensors import NUMBERS

HEADER_BYTES = 1 << 18

_NAMES = {dtype: name for name, dtype in NUMBERS.items()}
_METADATA = {"__metadata__": {"format": "pt"}}


class ShardWriter:
    """Files of tensors in a folder. `finish` gives them their names.

    Attributes:
        num_bytes: of all tensors so far.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.num_bytes = 0
        self._folder = folder
        self._max_bytes = max_bytes
        self._shards: list[dict[str, object]] = []
        self._file: FileIO | None = None
        self._offset = 0
        self._header_len = 0

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Appends a tensor of one of the types in NUMBERS. Raises OSError."""
        tensor = np.ascontiguousarray(tensor)
        begin, end = self._offset, self._offset + tensor.nbytes
        entry = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        # Readers map files: a tensor has to begin where a number of its type may.
        is_aligned = begin % tensor.dtype.itemsize == 0
        # A shard later its offsets are shorter, never longer.
        length = len(json.dumps({name: entry}))
        has_room = end <= self._max_bytes and self._header_len + length <= HEADER_BYTES
        if self._file is None or (begin > 0 and not (is_aligned and has_room)):
            self._begin()
            entry["data_offsets"] = [0, tensor.nbytes]
        assert self._file is not None
        self._shards[-1][name] = entry
        self._header_len += length
        _write_all(self._file, tensor.reshape(-1).view(np.uint8))
        self._offset += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Ends the last file, names all of them and writes the index. Raises OSError."""
        if self._file is None:
            self._begin()
        self._end()
        if len(self._shards) == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(self._shards):
            name = f"model-{index + 1:05}-of-{len(self._shards):05}.safetensors"
            self._path(index).rename(self._folder / name)
            weight_map |= {tensor: name for tensor in shard if tensor not in _METADATA}
        index_file = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index_file, indent=2))

    def close(self) -> None:
        """Closes the file that is open; unless all were finished it stays without a header."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, index: int) -> Path:
        return self._folder / f"unfinished-{index + 1:05}"

    def _begin(self) -> None:
        if self._file is not None:
            self._end()
        self._shards.append(dict(_METADATA))
        self._file = FileIO(self._path(len(self._shards) - 1), "xb")
        self._file.seek(8 + HEADER_BYTES)
        self._offset = 0
        self._header_len = len(json.dumps(_METADATA))

    def _end(self) -> None:
        assert self._file is not None
        header = json.dumps(self._shards[-1]).encode().ljust(HEADER_BYTES)
        self._file.seek(0)
        _write_all(self._file, np.frombuffer(HEADER_BYTES.to_bytes(8, "little") + header, np.uint8))
        self._file.close()
        self._file = None


def _write_all(file: FileIO, octets: np.ndarray) -> None:
    view = octets.data
    while view.nbytes:
        view = view[file.write(view) :]
