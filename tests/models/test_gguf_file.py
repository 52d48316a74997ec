"""One GGUF file: every number as the format defines it, every damage named."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_file import GgufFile
from pallasite.models.gguf_kinds import KINDS
from tests.models.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    SCALES_AT,
    STRING,
    UINT32,
    UINT64,
    gguf_bytes,
    metadata,
    random_blocks,
    slow_dequantize,
    string,
    tensor,
)

QUANTIZED = {kind.name: (number, kind) for number, kind in KINDS.items() if kind.block_len > 1}


def written(path: Path, content: bytes) -> GgufFile:
    path.write_bytes(content)
    return GgufFile(path)


def one_tensor(number: int, blocks: np.ndarray, shape: tuple[int, ...]) -> bytes:
    return gguf_bytes([], [tensor("w", shape[::-1], number)], blocks.tobytes())


class TestNumbers:
    @pytest.mark.parametrize("kind", QUANTIZED)
    def test_each_kind_is_what_the_format_says(self, tmp_path, rng, kind):
        number, layout = QUANTIZED[kind]
        shape = (3, 2 * layout.block_len)
        blocks = random_blocks(rng, kind, 6, layout.block_bytes)
        read = written(tmp_path / "x.gguf", one_tensor(number, blocks, shape)).read("w")
        expected = np.array([slow_dequantize(kind, block.tobytes()) for block in blocks])
        assert read.dtype == np.float32
        assert read.shape == shape
        # A product and a difference in float32, of terms as large as the block's largest number.
        tolerance = 4 * np.finfo(np.float32).eps * np.abs(expected).max(axis=1, keepdims=True)
        error = np.abs(read.reshape(expected.shape) - expected)
        assert np.isfinite(read).all()
        assert np.abs(expected).max() > 2
        assert (error <= tolerance).all()

    @pytest.mark.parametrize("kind", QUANTIZED)
    def test_pieces_make_the_whole_in_little_memory(self, tmp_path, rng, kind):
        number, layout = QUANTIZED[kind]
        shape = (576, 1536 - 256)
        num_blocks = shape[0] * shape[1] // layout.block_len
        blocks = random_blocks(rng, kind, num_blocks, layout.block_bytes)
        file = written(tmp_path / "x.gguf", one_tensor(number, blocks, shape))
        tracemalloc.start()
        try:
            read = file.read("w")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert read.nbytes < peak <= 1.25 * read.nbytes
        whole = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(read, whole.reshape(shape))

    @pytest.mark.parametrize(
        ("number", "dtype"), [(0, np.float32), (1, np.float16), (30, ml_dtypes.bfloat16)]
    )
    def test_floats_are_read_as_they_are(self, tmp_path, rng, number, dtype):
        stored = rng.normal(size=(5, 7)).astype(dtype)
        read = written(tmp_path / "x.gguf", one_tensor(number, stored, (5, 7))).read("w")
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, stored)

    @pytest.mark.parametrize(
        ("kind", "at"), [(kind, at) for kind, places in SCALES_AT.items() for at in places]
    )
    @pytest.mark.parametrize("scale", [np.inf, np.nan])
    def test_a_scale_that_is_not_finite_names_its_tensor(self, tmp_path, rng, kind, at, scale):
        number, layout = QUANTIZED[kind]
        blocks = random_blocks(rng, kind, 4, layout.block_bytes)
        blocks[2, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        file = written(tmp_path / "x.gguf", one_tensor(number, blocks, (2, 2 * layout.block_len)))
        with pytest.raises(CheckpointError, match="infinite or NaN in tensor 'w'"):
            file.read("w")


DAMAGED = [
    (b"", "fewer than 24"),
    (b"GGUF", "fewer than 24"),
    (b"PK\x03\x04" + bytes(20), r"begins with b'PK"),
    (gguf_bytes([], [], version=1), "version 1"),
    (gguf_bytes([], [], version=3 << 24), "little-endian"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "9223372036854775808 metadata"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "1099511627776 tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "the tensors' names"),
    (gguf_bytes([b"\xff" * 8], []), "metadata's keys"),
    (gguf_bytes([metadata("", UINT32, 1)], []), "name of 0 bytes"),
    (gguf_bytes([metadata("k" * 70_000, UINT32, 1)], []), "name of 70000 bytes"),
    (gguf_bytes([metadata(b"\xff", UINT32, 1)], []), "not UTF-8"),
    (gguf_bytes([metadata("k", STRING, b"\xff")], []), "not UTF-8 in metadata 'k'"),
    (gguf_bytes([string("k") + struct.pack("<I", 13)], []), "type 13 in metadata 'k'"),
    (gguf_bytes([metadata("k", BOOL, 2)], []), "boolean above 1 in metadata 'k'"),
    (gguf_bytes([metadata("k", UINT32, 1)] * 2, []), "key 'k' twice"),
    (
        gguf_bytes([string("k") + struct.pack("<IIQ", ARRAY, UINT64, 2**61)], []),
        "array of 2305843009213693952 items",
    ),
    (
        gguf_bytes([string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**22)], []),
        "ends within metadata 'k'",
    ),
    (
        gguf_bytes([string("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", 9, 1) * 9], []),
        "5 deep",
    ),
    (gguf_bytes([metadata("general.alignment", UINT32, 0)], []), "general.alignment=0"),
    (gguf_bytes([metadata("general.alignment", UINT32, 12)], []), "general.alignment=12"),
    (gguf_bytes([metadata("general.alignment", STRING, "8")], []), "general.alignment='8'"),
    (gguf_bytes([], [tensor("w", (1,))] * 2, bytes(64)), "tensor 'w' twice"),
    (gguf_bytes([], [tensor("w", ())]), "'w' of 0 axes"),
    (gguf_bytes([], [tensor("w", (1,) * 5)]), "'w' of 5 axes"),
    (gguf_bytes([], [tensor("w", (0, 4))]), "'w' of shape .4, 0."),
    (gguf_bytes([], [tensor("w", (2**63,) * 4)], bytes(64)), "tensor 'w' of shape"),
    (gguf_bytes([], [tensor("w", (33,), 2)], bytes(64)), "multiple of 32"),
    (gguf_bytes([], [tensor("w", (128,), 12)], bytes(144)), "multiple of 256"),
    (gguf_bytes([], [tensor("w", (256,), 10)], bytes(84)), "'w' of type Q2_K; supported"),
    (gguf_bytes([], [tensor("w", (256,), 99)], bytes(84)), "'w' of type 99; supported"),
    (gguf_bytes([], [tensor("w", (8,), 0, 16)], bytes(64)), "'w' at byte 16"),
    (gguf_bytes([], [tensor("w", (8,), 0, 0)], bytes(31)), "'w' of shape .* ends at byte"),
    (gguf_bytes([], [tensor("w", (8,), 0, 2**63)], bytes(32)), "'w' of shape .* ends at"),
    (
        gguf_bytes([], [tensor("v", (9,), 0, 0), tensor("w", (8,), 0, 32)], bytes(64)),
        "'w' at byte 128, within another",
    ),
]


class TestHeader:
    def test_every_kind_of_metadata_is_read(self, tmp_path):
        plain = {0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31)}
        plain |= {10: 2**64 - 1, 11: -(2**63), 12: 0.1, FLOAT32: 1e-5}
        entries = [metadata(f"k{kind}", kind, item) for kind, item in plain.items()]
        entries += [
            metadata("true", BOOL, 1),
            metadata("flags", ARRAY, (BOOL, [0, 1])),
            metadata("text", STRING, "né\n"),
            metadata("texts", ARRAY, (STRING, ["", "a", "🙂"])),
            metadata("none", ARRAY, (UINT32, [])),
            metadata("floats", ARRAY, (FLOAT32, [0.5, -1.0])),
            metadata("nested", ARRAY, (ARRAY, [(UINT32, [1, 2]), (STRING, ["x"])])),
        ]
        read = written(tmp_path / "x.gguf", gguf_bytes(entries, [], version=2)).metadata
        assert read == {f"k{kind}": item for kind, item in plain.items()} | {
            "true": True,
            "flags": [False, True],
            "text": "né\n",
            "texts": ["", "a", "🙂"],
            "none": [],
            "floats": [0.5, -1.0],
            "nested": [[1, 2], ["x"]],
        }
        assert read["true"] is True

    def test_tensors_are_placed_by_the_alignment(self, tmp_path, rng):
        first, second = rng.normal(size=(2, 3)).astype("<f4"), rng.normal(size=8).astype("<f4")
        entries = [metadata("general.alignment", UINT32, 64)]
        tensors = [tensor("b", (8,), 0, 64), tensor("a", (3, 2), 0, 0)]
        head = gguf_bytes(entries, tensors)
        head += bytes(-len(head) % 64)
        file = written(tmp_path / "x.gguf", head + first.tobytes() + bytes(40) + second.tobytes())
        assert list(file.tensors) == ["b", "a"]
        assert file.tensors["b"].offset == len(head) + 64
        assert file.tensors["a"].num_bytes == 24
        np.testing.assert_array_equal(file.read("a"), first)
        np.testing.assert_array_equal(file.read("b"), second)

    @pytest.mark.parametrize(("content", "named"), DAMAGED, ids=[named for _, named in DAMAGED])
    def test_a_damaged_header_is_named(self, tmp_path, content, named):
        with pytest.raises(CheckpointError, match=named) as error:
            written(tmp_path / "x.gguf", content)
        assert str(tmp_path) not in str(error.value)
        assert len(str(error.value)) < 500

    def test_a_large_vocabulary_is_read_whole(self, tmp_path):
        tokens = [f"token{i}" for i in range(49_152)]
        merges = [f"to ken{i}" for i in range(48_900)]
        entries = [
            metadata("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
            metadata("tokenizer.ggml.merges", ARRAY, (STRING, merges)),
            metadata("tokenizer.ggml.token_type", ARRAY, (5, [1] * len(tokens))),
        ]
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes(entries, []))
        file = GgufFile(path)
        assert file.metadata["tokenizer.ggml.tokens"] == tokens
        assert file.metadata["tokenizer.ggml.merges"] == merges
