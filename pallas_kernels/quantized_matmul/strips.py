"""How matrices lie in memory for the CPU's bodies: strips of sixteen rows, read in one direction.

Sixteen rows are the lanes of a kernel. A group of 32 inputs has, for each row of a strip, its
integers four by four, as a dot product of bytes takes them:

    nibbles   uint8 [..., strips, groups, 4, 16, 4]: byte i of vector j has input 4 j + i of the
              group in its low bits, and input 16 + 4 j + i in its high ones
    bytes     uint8 [..., strips, groups, 8, 16, 4]: input 4 j + i, plus 128
    floats    uint16 [..., strips, inputs / 2, 16, 2]: the bits of bfloat16

Scales and minimums are [..., strips, groups, 16], of float16 where the checkpoint's are, else f32.
A matrix is brought into this order once, on the host, when it is loaded.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix

LANES = 16
GROUP = 32

_PER_GROUP = {"int4": (4, LANES, 4), "int8": (8, LANES, 4)}


def fits(num_rows: int, num_inputs: int, group: int | None) -> bool:
    """Returns whether a matrix can lie in strips; the group is that of its scales, if it has any.

    Scales of larger groups are repeated for each 32 inputs.
    """
    has_groups = group is None or group % GROUP == 0
    return num_rows % LANES == 0 and num_inputs % GROUP == 0 and has_groups


def strip_shapes(kind: str, num_rows: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a matrix's parts by their names; the kind is int4, int8 or bf16."""
    strips = num_rows // LANES
    if kind == "bf16":
        return {"values": (strips, num_inputs // 2, LANES, 2)}
    groups = num_inputs // GROUP
    shapes = {"values": (strips, groups, *_PER_GROUP[kind]), "scales": (strips, groups, LANES)}
    return shapes | ({"minimums": (strips, groups, LANES)} if kind == "int4" else {})


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Returns uint8 in 0..15 `[out, in]` as strips."""
    groups = values.reshape(values.shape[0], -1, 2, GROUP // 2)
    return _as_strips(groups[:, :, 0] | groups[:, :, 1] << 4)


def pack_bytes(values: np.ndarray) -> np.ndarray:
    """Returns int8 `[out, in]` as strips."""
    codes = np.ascontiguousarray(values).view(np.uint8) ^ np.uint8(0x80)
    return _as_strips(codes.reshape(values.shape[0], -1, GROUP))


def pack_floats(bits: np.ndarray) -> np.ndarray:
    """Returns the bits of bfloat16, uint16 `[out, in]`, as strips."""
    pairs = np.ascontiguousarray(bits).view(np.uint32)
    strips = pairs.reshape(-1, LANES, pairs.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(strips).view(np.uint16).reshape(*strips.shape, 2)


def pack_scales(scales: np.ndarray, num_inputs: int) -> np.ndarray:
    """Returns `[out, groups]` as strips, one for each 32 inputs."""
    each = np.repeat(scales, num_inputs // GROUP // scales.shape[1], axis=1)
    return np.ascontiguousarray(each.reshape(-1, LANES, each.shape[1]).transpose(0, 2, 1))


def rows_of(matrix: QuantizedMatrix, index: jax.Array) -> QuantizedMatrix:
    """Returns rows of an unstacked matrix as a plain one `[n, in]`.

    Args:
        index: int32 `[n]`.
    """
    if not matrix.in_strips:
        return jax.tree.map(lambda part: part[index], matrix)
    strip, lane = index // LANES, index % LANES
    if matrix.values.dtype == jnp.uint16:
        pairs = matrix.values[strip, :, lane]
        return replace(matrix, values=pairs.reshape(pairs.shape[0], -1), in_strips=False)
    vectors = matrix.values[strip, :, :, lane].reshape(strip.shape[0], -1, 4)
    return _plain(matrix, vectors, lambda part: part[strip, :, lane])


def unpack(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Returns an unstacked matrix in strips as a plain one."""
    if not matrix.in_strips:
        return matrix
    num_rows = matrix.values.shape[0] * LANES
    if matrix.values.dtype == jnp.uint16:
        values = jnp.moveaxis(matrix.values, 2, 1).reshape(num_rows, -1)
        return replace(matrix, values=values, in_strips=False)
    vectors = jnp.moveaxis(matrix.values, 3, 1).reshape(num_rows, -1, 4)
    return _plain(matrix, vectors, lambda part: jnp.moveaxis(part, 2, 1).reshape(num_rows, -1))


def _as_strips(codes: np.ndarray) -> np.ndarray:
    """Brings bytes `[out, groups, n]` into the order of strips, four by four."""
    num_rows, num_groups, size = codes.shape
    words = np.ascontiguousarray(codes).view(np.uint32)
    strips = words.reshape(-1, LANES, num_groups, size // 4).transpose(0, 2, 3, 1)
    packed = np.ascontiguousarray(strips).view(np.uint8)
    return packed.reshape(num_rows // LANES, num_groups, size // 4, LANES, 4)


def _plain(matrix: QuantizedMatrix, vectors: jax.Array, own: object) -> QuantizedMatrix:
    """A plain matrix of bytes `[rows, groups * vectors, 4]`; `own` picks the scales of its rows."""
    assert callable(own)
    num_rows = vectors.shape[0]
    scales = own(matrix.scales).astype(jnp.float32)
    minimums = None if matrix.minimums is None else own(matrix.minimums).astype(jnp.float32)
    values = vectors.reshape(num_rows, -1)
    if minimums is None:
        values = jax.lax.bitcast_convert_type(values ^ jnp.uint8(0x80), jnp.int8)
    return replace(
        matrix, values=values, scales=scales, minimums=minimums, layer=None, in_strips=False
    )
