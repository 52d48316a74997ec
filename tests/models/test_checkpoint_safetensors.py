"""One safetensors file: odd ones are read, damaged ones are named."""

import json

import ml_dtypes
import numpy as np
import pytest

from pallasite.models.checkpoint_safetensors import NUMBERS, SafetensorsFile
from pallasite.models.errors import CheckpointError


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = [
    (b"", "0 bytes in a file of 0"),
    (b"\x00" * 7, "file of 7"),
    (b"\x00" * 8, "0 bytes in a file of 8"),
    ((2**63).to_bytes(8, "little") + b"{}", "9223372036854775808 bytes"),
    ((3).to_bytes(8, "little") + b"{}", "3 bytes in a file of 10"),
    (safetensors_bytes(b"{x"), "not valid JSON"),
    (safetensors_bytes(b"[]"), "a list"),
    (safetensors_bytes(b'{"w":1,"w":2}'), "'w' stands twice"),
    (safetensors_bytes({"w": []}), "'w'.*three fields"),
    (safetensors_bytes({"w": {"dtype": "F32"}}), "'w'.*three fields"),
    (
        safetensors_bytes({"w": entry(dtype="I64")}, bytes(8)),
        "'w' of type 'I64'.*F32, F16, BF16",
    ),
    (safetensors_bytes({"w": entry(dtype=[])}, bytes(8)), "'w' of type a list"),
    (safetensors_bytes({"w": entry(shape=[-2])}, bytes(8)), "shape of tensor 'w'"),
    (safetensors_bytes({"w": entry(shape=[True])}, bytes(8)), "shape of tensor 'w'"),
    (safetensors_bytes({"w": entry(shape=[1] * 9)}, bytes(4)), "at most 8"),
    (safetensors_bytes({"w": entry(shape=[2**62] * 8)}, bytes(8)), "'w' with 8 bytes"),
    (safetensors_bytes({"w": entry(offsets=[8, 0])}, bytes(8)), "data_offsets of tensor 'w'"),
    (safetensors_bytes({"w": entry(offsets=[0])}, bytes(8)), "data_offsets of tensor 'w'"),
    (safetensors_bytes({"w": entry(shape=[3])}, bytes(8)), r"shape \[3\] of F32 takes 12"),
    (safetensors_bytes({"w": entry()}, bytes(7)), "the end of tensor 'w'"),
    (safetensors_bytes({"w": entry()}, bytes(9)), "the end of tensor 'w'"),
    (safetensors_bytes({"w": entry(offsets=[4, 12])}, bytes(12)), "'w' at byte 4.*hole"),
    (
        safetensors_bytes({"w": entry(), "v": entry(offsets=[4, 12])}, bytes(12)),
        "'v' at byte 4.*shares",
    ),
]


@pytest.mark.parametrize(("content", "named"), DAMAGED, ids=[named for _, named in DAMAGED])
def test_a_damaged_safetensors_header_is_named(tmp_path, content, named):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as error:
        SafetensorsFile(path)
    assert "x.safetensors" in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_odd_but_valid_safetensors_are_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(shape=[], dtype="F16", offsets=[8, 10]),
        "a": entry(),
        "empty": entry(shape=[0, 4], offsets=[8, 8]),
    }
    path = tmp_path / "x.safetensors"
    data = np.array([1.5, -2.0], "<f4").tobytes() + np.array(3.0, "<f2").tobytes()
    path.write_bytes(safetensors_bytes(json.dumps(header).encode() + b"   ", data))
    file = SafetensorsFile(path)
    np.testing.assert_array_equal(file.read("a"), np.float32([1.5, -2.0]))
    assert file.read("b").shape == ()
    assert file.read("b") == 3.0
    assert file.read("empty").shape == (0, 4)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("I64", np.int64),
        ("I32", np.int32),
        ("I8", np.int8),
        ("U8", np.uint8),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    ],
)
def test_types_of_quantized_weights_are_read_where_they_are_asked_for(tmp_path, dtype, stored):
    values = np.array([5, 0, 1, 120, 96]).astype(stored)
    path = tmp_path / "x.safetensors"
    header = {"w": entry(shape=[5], dtype=dtype, offsets=[0, values.nbytes])}
    path.write_bytes(safetensors_bytes(header, values.tobytes()))
    with pytest.raises(CheckpointError, match=f"'w' of type '{dtype}'.*F32, F16, BF16;"):
        SafetensorsFile(path)
    read = SafetensorsFile(path, NUMBERS).read("w")
    assert read.dtype == stored
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("octet", [0x7F, 0xFF])
def test_an_fp8_nan_is_named(tmp_path, octet):
    path = tmp_path / "x.safetensors"
    header = {"w": entry(shape=[3], dtype="F8_E4M3", offsets=[0, 3])}
    path.write_bytes(safetensors_bytes(header, bytes([0x7E, octet, 0xFE])))
    with pytest.raises(CheckpointError, match=r"got 1 values.*'w'"):
        SafetensorsFile(path, NUMBERS).read("w")
