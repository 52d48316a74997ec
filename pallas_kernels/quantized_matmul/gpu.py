"""Products of few tokens with a model's matrices, on GPUs.

They take as long as the matrix takes to be read. XLA reads more than that: in a loop over layers it
copies a layer's matrix before it multiplies, and one that is quantized in groups it writes out in
bfloat16 first; where inputs are int8, too, it multiplies group after group. Here the matrix is read
once, where it lies, and becomes what it stands for in registers. See `takes` for what is better
left to XLA.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.storage import quantize_rows
from pallasite.pallas_kernels.triton import is_addressable, load, padded

MAX_TOKENS = 256
"""With more, the product itself costs more than XLA's detours do."""

GROUP_SIZES = (32, 64, 128, 256)

TILE_TOKENS = 128
TILE_ROWS = 64
BLOCK_BYTES = 128
"""Of a row of the matrix, that a program reads at once."""

GROUPED_BYTES = 64
"""The same where values become floats by groups; a group's, where it has more."""

WANTED_PROGRAMS = 512
"""Enough to fill the multiprocessors of today's GPUs (132 and 148) a few times over."""


def takes(num_tokens: int, matrix: QuantizedMatrix, dtype: DTypeLike) -> bool:
    """Tells whether a product is one for these kernels.

    Of a matrix that lies by itself and has no groups XLA converts what it has read on the way into
    its own product, which is as good.
    """
    if num_tokens > MAX_TOKENS or not is_addressable(matrix.values):
        return False
    if matrix.quantizes_inputs and matrix.is_packed:
        return False
    if not matrix.quantizes_inputs and dtype != jnp.bfloat16:
        return False
    if matrix.num_groups == 1 and not matrix.is_packed:
        return matrix.layer is not None
    return matrix.num_inputs // matrix.num_groups in GROUP_SIZES


class _Inputs(NamedTuple):
    """What is multiplied, in device memory; of the kernel, refs to it.

    A part holds the low halves of packed bytes, or the high ones; others have one part.

    Attributes:
        x: `[parts, T, bytes]` in bfloat16 or int8: the inputs that the bytes of a row meet.
        x_scales: `[T, groups]`; None where x is bfloat16, and beside whole rows.
        values, scales, minimums: those of the matrices of all layers, `[L, out, ...]`. Scales of
            whole rows are None, and left to the sums.
        layer: `[1]`.
    """

    x: Any
    x_scales: Any
    values: Any
    scales: Any
    minimums: Any
    layer: Any


class _Plan(NamedTuple):
    """What is static about the kernel.

    Attributes:
        num_tokens: of a tile, a power of two.
        num_bytes: of a row of the matrix, in a block.
        num_groups: of a row, in a block; 0 where rows are whole.
        num_blocks: of a program.
        num_splits: how many programs share a row.
    """

    num_tokens: int
    num_bytes: int
    num_groups: int
    num_blocks: int
    num_splits: int

    @classmethod
    def make(cls, inputs: _Inputs) -> "_Plan":
        num_tokens = inputs.x.shape[1]
        _, num_rows, width = inputs.values.shape
        num_bytes, num_groups = BLOCK_BYTES // inputs.values.dtype.itemsize, 0
        if inputs.scales is not None:
            group_bytes = width // inputs.scales.shape[2]
            # Sums of int8 have the scales of one group.
            is_integer = inputs.x_scales is not None
            num_groups = 1 if is_integer else max(1, GROUPED_BYTES // group_bytes)
            num_bytes = num_groups * group_bytes
        num_blocks = pl.cdiv(width, num_bytes)
        tiles = pl.cdiv(num_rows, TILE_ROWS) * pl.cdiv(num_tokens, TILE_TOKENS)
        wanted = min(pl.cdiv(WANTED_PROGRAMS, tiles), pl.cdiv(num_blocks, 4))
        per_program = pl.cdiv(num_blocks, wanted)
        return cls(
            num_tokens=min(padded(num_tokens), TILE_TOKENS),
            num_bytes=num_bytes,
            num_groups=num_groups,
            num_blocks=per_program,
            num_splits=pl.cdiv(num_blocks, per_program),
        )


def quantized_matmul(
    x: Float[Array, "T in"], matrix: QuantizedMatrix, interpret: bool = False
) -> Float[Array, "T out"]:
    """See the op in the package; of what `takes` says yes to."""
    num_tokens, num_rows = x.shape[0], matrix.values.shape[-2]
    grouped = x.reshape(num_tokens, matrix.num_groups, -1)
    x_scales = None
    if matrix.quantizes_inputs:
        grouped, x_scales = quantize_rows(grouped)
    inputs = _inputs(grouped, x_scales, matrix)
    plan = _Plan.make(inputs)
    is_integer = inputs.x.dtype == jnp.int8 and inputs.scales is None
    sums_dtype = jnp.int32 if is_integer else jnp.float32
    sums = pl.pallas_call(
        partial(_multiply, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.num_splits, num_tokens, num_rows), sums_dtype),
        grid=(
            pl.cdiv(num_rows, TILE_ROWS),
            plan.num_splits,
            pl.cdiv(num_tokens, plan.num_tokens),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="quantized_matmul",
    )(inputs)
    total = jnp.sum(sums, axis=0).astype(jnp.float32)
    if inputs.scales is not None:
        return total
    if x_scales is not None:
        total = total * x_scales
    scales = matrix.alone().scales
    return total if scales is None else total * scales[None, :, 0]


def _inputs(
    grouped: Float[Array, "T groups n"] | Int8[Array, "T groups n"],
    x_scales: Float[Array, "T groups"] | None,
    matrix: QuantizedMatrix,
) -> _Inputs:
    num_tokens, num_groups, _ = grouped.shape
    if x_scales is None:
        grouped = grouped.astype(jnp.bfloat16)
    num_parts = 2 if matrix.is_packed else 1
    parts = grouped.reshape(num_tokens, num_groups, num_parts, -1)
    stacked, layer = matrix, matrix.layer
    if layer is None:
        stacked = jax.tree.map(lambda part: part[None], matrix)
        layer = jnp.zeros((), jnp.int32)
    is_whole = num_groups == 1 and not matrix.is_packed
    return _Inputs(
        x=jnp.moveaxis(parts, 2, 0).reshape(num_parts, num_tokens, -1),
        x_scales=None if is_whole else x_scales,
        values=stacked.values,
        scales=None if is_whole else stacked.scales,
        minimums=stacked.minimums,
        layer=layer.reshape(1),
    )


class _Tile(NamedTuple):
    """Which rows of the matrix and which tokens a program multiplies, padded to whole tiles."""

    inputs: _Inputs
    plan: _Plan
    row: jax.Array
    token: jax.Array

    @property
    def is_row(self) -> jax.Array:
        return self.row < self.inputs.values.shape[1]

    @property
    def is_token(self) -> jax.Array:
        return self.token < self.inputs.x.shape[1]

    def add_block(self, index: jax.Array, sums: jax.Array) -> jax.Array:
        """Adds a block's products to sums `[rows, tokens]`."""
        inputs = self.inputs
        if inputs.scales is None:
            values = self._of_matrix(inputs.values, index, self.plan.num_bytes)
            if inputs.x.dtype != values.dtype:
                values = values.astype(jnp.float32).astype(jnp.bfloat16)
            return sums + _dot(values, self._x(0, index), sums.dtype)
        if inputs.x_scales is not None:
            values = self._of_matrix(inputs.values, index, self.plan.num_bytes)
            own = _dot(values, self._x(0, index), jnp.int32).astype(jnp.float32)
            x_scales = load(inputs.x_scales.at[self.token, index], self.is_token)
            return sums + own * self._scales(inputs.scales, index) * x_scales[None, :]
        for part, weights in enumerate(self._dequantized(index)):
            weights = weights.astype(jnp.bfloat16)
            sums = sums + _dot(weights, self._x(part, index), jnp.float32)
        return sums

    def _dequantized(self, index: jax.Array) -> tuple[jax.Array, ...]:
        """Returns what a block's bytes stand for, in f32, the halves of packed ones apart."""
        inputs = self.inputs
        values = self._of_matrix(inputs.values, index, self.plan.num_bytes)
        scales = self._scales(inputs.scales, index)[:, :, None]
        parts = [values]
        if inputs.x.shape[0] == 2:
            parts = [_small_integers(values & 15), _small_integers(values >> 4)]
        grouped = [
            part.astype(jnp.float32).reshape(*scales.shape[:2], -1) * scales for part in parts
        ]
        if inputs.minimums is not None:
            minimums = self._scales(inputs.minimums, index)[:, :, None]
            grouped = [part + minimums for part in grouped]
        return tuple(part.reshape(values.shape) for part in grouped)

    def _scales(self, ref: Any, index: jax.Array) -> jax.Array:
        return self._of_matrix(ref, index, self.plan.num_groups)

    def _of_matrix(self, ref: Any, index: jax.Array, size: int) -> jax.Array:
        column = index * size + jnp.arange(size, dtype=jnp.int32)
        mask = self.is_row[:, None] & (column < ref.shape[2])[None, :]
        return load(ref.at[self.inputs.layer[0], self.row[:, None], column[None, :]], mask)

    def _x(self, part: int, index: jax.Array) -> jax.Array:
        ref, size = self.inputs.x, self.plan.num_bytes
        column = index * size + jnp.arange(size, dtype=jnp.int32)
        mask = self.is_token[:, None] & (column < ref.shape[2])[None, :]
        return load(ref.at[part, self.token[:, None], column[None, :]], mask)


def _multiply(inputs: _Inputs, out_ref: Any, *, plan: _Plan) -> None:
    """Some rows of the matrix by some tokens, over one split; out_ref is `[splits, T, out]`."""
    row, split, token = (pl.program_id(axis) for axis in range(3))
    tile = _Tile(
        inputs,
        plan,
        row * TILE_ROWS + jnp.arange(TILE_ROWS, dtype=jnp.int32),
        token * plan.num_tokens + jnp.arange(plan.num_tokens, dtype=jnp.int32),
    )
    first = split * plan.num_blocks
    end = jnp.minimum(first + plan.num_blocks, pl.cdiv(inputs.values.shape[2], plan.num_bytes))
    nothing = jnp.zeros((TILE_ROWS, plan.num_tokens), out_ref.dtype)
    sums = jax.lax.fori_loop(first, end, tile.add_block, nothing)
    mask = tile.is_token[:, None] & tile.is_row[None, :]
    plgpu.store(out_ref.at[split, tile.token[:, None], tile.row[None, :]], sums.T, mask=mask)


def _small_integers(values: jax.Array) -> jax.Array:
    """Returns uint8 as f32, without the conversion, which is slower."""
    bits = values.astype(jnp.int32) | 0x4B000000
    return jax.lax.bitcast_convert_type(bits, jnp.float32) - 2.0**23


def _dot(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiplies `[r, n]` by the transpose of `[t, n]`."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
