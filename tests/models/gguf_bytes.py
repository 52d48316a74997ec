"""GGUF files byte by byte, damaged ones included, and a slow definition of its kinds of blocks.

Both are written down from the format's description, a byte and a number at a time: oracles for a
reader that does neither.
"""

import struct

import numpy as np

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
_LETTERS = dict(zip((*range(8), 10, 11, 12), "BbHhIifBQqd", strict=True))


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, item: object) -> bytes:
    """A metadata value without its kind. An array is (kind, items)."""
    if kind == STRING:
        return string(item)
    if kind == ARRAY:
        inner, items = item
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack("<" + _LETTERS[kind], item)


def metadata(key: str | bytes, kind: int, item: object) -> bytes:
    return string(key) + struct.pack("<I", kind) + value(kind, item)


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; `dims` in the file's order, the contiguous one first."""
    head = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + head + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    entries: list[bytes], tensors: list[bytes], data: bytes = b"", *, version: int = 3
) -> bytes:
    """A file of these parts, with `data` at the next multiple of 32."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def slow_dequantize(kind: str, block: bytes) -> list[float]:
    """One block's numbers, by ggml's definition of its layout, in double precision."""
    return _BLOCKS[kind](block)


def _half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def _nibbles(quants: bytes) -> list[int]:
    """Low nibbles of 16 bytes, then the high ones."""
    return [byte & 15 for byte in quants] + [byte >> 4 for byte in quants]


def _fifth_bits(bits: int) -> list[int]:
    return [(bits >> i & 1) << 4 for i in range(32)]


def _q4_0(block: bytes) -> list[float]:
    return [(q - 8) * _half(block, 0) for q in _nibbles(block[2:])]


def _q4_1(block: bytes) -> list[float]:
    return [q * _half(block, 0) + _half(block, 2) for q in _nibbles(block[4:])]


def _q5_0(block: bytes) -> list[float]:
    highs = _fifth_bits(int.from_bytes(block[2:6], "little"))
    pairs = zip(_nibbles(block[6:]), highs, strict=True)
    return [((low | high) - 16) * _half(block, 0) for low, high in pairs]


def _q5_1(block: bytes) -> list[float]:
    highs = _fifth_bits(int.from_bytes(block[4:8], "little"))
    pairs = zip(_nibbles(block[8:]), highs, strict=True)
    return [(low | high) * _half(block, 0) + _half(block, 2) for low, high in pairs]


def _q8_0(block: bytes) -> list[float]:
    return [q * _half(block, 0) for q in struct.unpack("<32b", block[2:])]


def _scale_and_min(scales: bytes, j: int) -> tuple[int, int]:
    """The j-th pair of 6-bit numbers out of 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low = scales[j + 4]
    return low & 15 | scales[j - 4] >> 6 << 4, low >> 4 | scales[j] >> 6 << 4


def _q4_k(block: bytes) -> list[float]:
    return _q45_k(block, bytes(32), block[16:])


def _q5_k(block: bytes) -> list[float]:
    return _q45_k(block, block[16:48], block[48:])


def _q45_k(block: bytes, high_bits: bytes, quants: bytes) -> list[float]:
    numbers = []
    for j in range(8):
        scale, least = _scale_and_min(block[4:16], j)
        for i in range(32):
            byte = quants[j // 2 * 32 + i]
            low = byte >> 4 if j % 2 else byte & 15
            q = low + 16 * (high_bits[i] >> j & 1)
            numbers.append(_half(block, 0) * scale * q - _half(block, 2) * least)
    return numbers


def _q6_k(block: bytes) -> list[float]:
    numbers = [0.0] * 256
    for half in range(2):
        lows, highs = block[64 * half : 64 * half + 64], block[128 + 32 * half : 160 + 32 * half]
        scales = struct.unpack_from("<8b", block, 192 + 8 * half)
        for i in range(32):
            for part in range(4):
                byte = lows[i + 32 * (part % 2)]
                low = byte >> 4 if part >= 2 else byte & 15
                q = (low | (highs[i] >> 2 * part & 3) << 4) - 32
                scale = scales[2 * part + i // 16]
                numbers[128 * half + 32 * part + i] = _half(block, 208) * scale * q
    return numbers


_BLOCKS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
# Where each kind's 16-bit scales stand in a block.
SCALES_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(
    rng: np.random.Generator, kind: str, num_blocks: int, block_bytes: int
) -> np.ndarray:
    """Random bytes, uint8 [num_blocks, block_bytes], with scales of 0.5 to 2, of either sign."""
    blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        signs = rng.choice([-1.0, 1.0], (num_blocks, 1))
        scales = (signs * rng.uniform(0.5, 2.0, (num_blocks, 1))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks
