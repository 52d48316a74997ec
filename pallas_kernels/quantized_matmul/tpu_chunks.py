"""How the TPU's kernels cut a matrix in groups, and what they are given of it and of x.

A row is taken in chunks of whole groups and whole vectors. The bytes of a chunk meet the inputs
that they stand for: of packed bytes the low halves meet the first half of a chunk's inputs here,
the high ones the second half.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.target import Target

LANES = 128
LEAST_BYTES = 16
"""Of a group. In smaller ones its scale would cost more than its values."""

ROW_TILES = (512, 256, 128)
"""Rows of a matrix that a kernel takes at once; one of them must divide all."""


class Chunks(NamedTuple):
    """How a row is cut.

    Attributes:
        num_bytes: of a row, in a chunk.
        num_groups: in a chunk.
        num_chunks: in a row.
        is_packed: whether a byte holds two values.
    """

    num_bytes: int
    num_groups: int
    num_chunks: int
    is_packed: bool

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> "Chunks | None":
        """Returns how a matrix's rows are cut; None where groups and vectors do not fit."""
        width = matrix.values.shape[-1]
        group_bytes = width // matrix.num_groups
        num_bytes = max(LANES, group_bytes)
        if group_bytes < LEAST_BYTES or num_bytes % group_bytes or num_bytes % LANES:
            return None
        if width % num_bytes:
            return None
        return cls(num_bytes, num_bytes // group_bytes, width // num_bytes, matrix.is_packed)

    @property
    def has_vectors_of_groups(self) -> bool:
        """Whether a row's groups fill whole vectors. See `Held`."""
        return self.num_chunks * self.num_groups % LANES == 0

    @property
    def num_inputs(self) -> int:
        """Of a chunk."""
        return self.num_bytes * (2 if self.is_packed else 1)

    def inputs(self, x: Shaped[Array, "T in"]) -> Shaped[Array, "T n width"]:
        """Returns x by chunks, in the order in which a chunk's bytes meet it."""
        chunks = x.reshape(-1, self.num_inputs)
        if self.is_packed:
            # Lanes change their places in the matrix unit; a product with 1 is exact.
            halves = np.arange(self.num_inputs).reshape(self.num_groups, 2, -1)
            source = np.swapaxes(halves, 0, 1).reshape(-1)
            places = np.arange(self.num_inputs)[:, None] == source[None, :]
            chunks = jnp.dot(
                chunks, jnp.asarray(places, x.dtype), preferred_element_type=jnp.float32
            ).astype(x.dtype)
        return chunks.reshape(x.shape[0], self.num_chunks, self.num_inputs)

    def group_of_input(self) -> np.ndarray:
        """Returns the group in its chunk of each of `inputs`."""
        return np.arange(self.num_inputs) % self.num_bytes * self.num_groups // self.num_bytes


class Held(NamedTuple):
    """The matrices of all layers, in device memory; of a kernel, a tile of rows of one layer.

    Attributes:
        values: `[L, out, bytes]`.
        scales, minimums: `[L, out, groups]` where groups fill whole vectors, else `[L, groups,
            out]`. That is how a TPU lays out floats, with as little padding as can be; told
            otherwise, XLA would copy the parts of all layers. Minimums are None but for packed
            values.
    """

    values: Any
    scales: Any
    minimums: Any

    @classmethod
    def of(cls, matrix: QuantizedMatrix, chunks: Chunks) -> "Held":
        """Returns a matrix's parts as kernels take them."""
        if matrix.layer is None:
            matrix = jax.tree.map(lambda part: part[None], matrix)
        scales, minimums = matrix.scales, matrix.minimums
        if not chunks.has_vectors_of_groups:
            scales, minimums = jax.tree.map(
                lambda part: jnp.swapaxes(part, 1, 2), (scales, minimums)
            )
        return cls(matrix.values, scales, minimums)

    def specs(self, num_rows: int, chunks: Chunks) -> "Held":
        """Returns a tile's blocks, for a grid whose first axis counts tiles of rows."""
        width, num_groups = self.values.shape[2], chunks.num_chunks * chunks.num_groups

        def rows_first(tile: Array, _: Array, layer_ref: Any) -> tuple[Any, ...]:
            return layer_ref[0], tile, 0

        def rows_last(tile: Array, _: Array, layer_ref: Any) -> tuple[Any, ...]:
            return layer_ref[0], 0, tile

        if chunks.has_vectors_of_groups:
            groups = pl.BlockSpec((1, num_rows, num_groups), rows_first)
        else:
            groups = pl.BlockSpec((1, num_groups, num_rows), rows_last)
        return Held(
            values=pl.BlockSpec((1, num_rows, width), rows_first),
            scales=groups,
            minimums=None if self.minimums is None else groups,
        )

    def tile_bytes(self, num_rows: int) -> int:
        """Returns the bytes that a tile of rows takes."""
        num_layers, total = self.values.shape[:2]
        parts = [part for part in self if part is not None]
        return num_rows * sum(p.size * p.dtype.itemsize for p in parts) // (num_layers * total)


class Call(NamedTuple):
    """How kernels are called.

    Attributes:
        multiplies_int8: as the target does.
        vmem_limit: bytes that a kernel may take.
        interpret: of its `pallas_call`.
    """

    multiplies_int8: bool
    vmem_limit: int
    interpret: Any


def by_groups(held_ref: Any, chunks: Chunks) -> Float[Array, "groups rows"]:
    """Returns a tile's scales or minimums."""
    return held_ref[0].T if chunks.has_vectors_of_groups else held_ref[0]


def halves(packed: Shaped[Array, "rows bytes"]) -> tuple[Shaped[Array, "rows bytes"], ...]:
    """Returns the low and the high halves of bytes, each in a byte of int8."""
    words = pltpu.bitcast(packed, jnp.uint32)
    mask = jnp.uint32(0x0F0F0F0F)
    low, high = words & mask, (words >> jnp.uint32(4)) & mask
    return pltpu.bitcast(low, jnp.int8), pltpu.bitcast(high, jnp.int8)


def vmem_limit(target: Target) -> int:
    """Returns how much VMEM a kernel may take; XLA keeps things there, too."""
    if target.vmem_bytes is None:
        raise ValueError(f"got the target {target.name}, whose VMEM is not known")
    return target.vmem_bytes * 3 // 4
