"""Products of few tokens with matrices that are quantized in groups, on GPUs.

XLA turns such a matrix into bfloat16 in memory first, which costs several times what reading it
does, or, where inputs are int8 too, multiplies group after group. Here a program has some rows of
the matrix in its registers only, as the values that they stand for. See `takes` for what is better
left to XLA.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.storage import quantize_rows
from pallasite.pallas_kernels.triton import is_addressable, load, padded

MAX_TOKENS = 256
"""With more, the product itself costs more than a matrix in bfloat16 does."""

GROUP_SIZES = (32, 64, 128, 256)

TILE_TOKENS = 128
TILE_ROWS = 64
BLOCK_BYTES = 64
"""Of a row of the matrix, that a program reads at once; a group's, where it has more."""

WANTED_PROGRAMS = 512
"""Enough to fill the multiprocessors of today's GPUs (132 and 148) a few times over."""


def takes(num_tokens: int, matrix: QuantizedMatrix, dtype: DTypeLike) -> bool:
    """Tells whether a product is one for these kernels.

    Of a matrix without groups XLA converts what it has read on the way into its own product, which
    is as good.
    """
    size = matrix.num_inputs // matrix.num_groups
    return (
        num_tokens <= MAX_TOKENS
        and matrix.num_groups > 1
        and size in GROUP_SIZES
        and (matrix.quantizes_inputs or dtype == jnp.bfloat16)
        and is_addressable(matrix.values)
    )


class _Inputs(NamedTuple):
    """What is multiplied, in device memory; of the kernel, refs to it.

    A part holds the low halves of packed bytes, or the high ones; others have one part.

    Attributes:
        x: `[parts, T, bytes]` in bfloat16 or int8: the inputs that the bytes of a row meet.
        x_scales: `[T, groups]`, or None where x is bfloat16.
        values, scales, minimums: those of the matrices of all layers, `[L, out, ...]`.
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
        group_bytes: of a group, in a row of the matrix.
        num_groups: of a block.
        num_blocks: of a program.
        num_splits: how many programs share a row.
    """

    num_tokens: int
    group_bytes: int
    num_groups: int
    num_blocks: int
    num_splits: int

    @classmethod
    def make(cls, inputs: _Inputs) -> "_Plan":
        num_tokens = inputs.x.shape[1]
        _, num_rows, num_groups = inputs.scales.shape
        group_bytes = inputs.values.shape[2] // num_groups
        in_block = 1 if inputs.x_scales is not None else max(1, BLOCK_BYTES // group_bytes)
        num_blocks = pl.cdiv(num_groups, in_block)
        tiles = pl.cdiv(num_rows, TILE_ROWS) * pl.cdiv(num_tokens, TILE_TOKENS)
        wanted = min(pl.cdiv(WANTED_PROGRAMS, tiles), pl.cdiv(num_blocks, 4))
        per_program = pl.cdiv(num_blocks, wanted)
        return cls(
            num_tokens=min(padded(num_tokens), TILE_TOKENS),
            group_bytes=group_bytes,
            num_groups=in_block,
            num_blocks=per_program,
            num_splits=pl.cdiv(num_blocks, per_program),
        )


def quantized_matmul(
    x: Float[Array, "T in"], matrix: QuantizedMatrix, interpret: bool = False
) -> Float[Array, "T out"]:
    """See the op in the package; of what `takes` says yes to."""
    num_tokens, num_rows = x.shape[0], matrix.scales.shape[-2]
    inputs = _prepare(x, matrix)
    plan = _Plan.make(inputs)
    sums = pl.pallas_call(
        partial(_multiply, plan=plan),
        out_shape=jax.ShapeDtypeStruct((plan.num_splits, num_tokens, num_rows), jnp.float32),
        grid=(
            pl.cdiv(num_rows, TILE_ROWS),
            plan.num_splits,
            pl.cdiv(num_tokens, plan.num_tokens),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="quantized_matmul",
    )(inputs)
    return jnp.sum(sums, axis=0)


def _prepare(x: Float[Array, "T in"], matrix: QuantizedMatrix) -> _Inputs:
    num_tokens, num_groups = x.shape[0], matrix.num_groups
    grouped = x.reshape(num_tokens, num_groups, -1)
    x_scales = None
    if matrix.quantizes_inputs:
        grouped, x_scales = quantize_rows(grouped)
    else:
        grouped = grouped.astype(jnp.bfloat16)
    num_parts = 2 if matrix.is_packed else 1
    parts = grouped.reshape(num_tokens, num_groups, num_parts, -1)
    stacked = matrix
    if matrix.layer is None:
        stacked = jax.tree.map(lambda part: part[None], matrix)
    return _Inputs(
        x=jnp.moveaxis(parts, 2, 0).reshape(num_parts, num_tokens, -1),
        x_scales=x_scales,
        values=stacked.values,
        scales=stacked.scales,
        minimums=stacked.minimums,
        layer=jnp.zeros(1, jnp.int32) if matrix.layer is None else matrix.layer.reshape(1),
    )


def _multiply(inputs: _Inputs, out_ref: Any, *, plan: _Plan) -> None:
    """Some rows of the matrix by some tokens, over one split; out_ref is `[splits, T, out]`."""
    tile, split, token_tile = (pl.program_id(axis) for axis in range(3))
    row = tile * TILE_ROWS + jnp.arange(TILE_ROWS, dtype=jnp.int32)
    token = token_tile * plan.num_tokens + jnp.arange(plan.num_tokens, dtype=jnp.int32)
    is_row, is_token = row < inputs.scales.shape[1], token < inputs.x.shape[1]
    num_groups = inputs.scales.shape[2]
    num_bytes = plan.num_groups * plan.group_bytes
    layer = inputs.layer[0]

    def block(index: jax.Array, sums: jax.Array) -> jax.Array:
        byte = index * num_bytes + jnp.arange(num_bytes, dtype=jnp.int32)
        group = index * plan.num_groups + jnp.arange(plan.num_groups, dtype=jnp.int32)
        is_byte, is_group = byte < inputs.values.shape[2], group < num_groups
        values = _load(inputs.values, (layer, row[:, None], byte[None, :]), (is_row, is_byte))
        scales = _load(inputs.scales, (layer, row[:, None], group[None, :]), (is_row, is_group))
        if inputs.x_scales is not None:
            x = _load(inputs.x, (0, token[:, None], byte[None, :]), (is_token, is_byte))
            x_scales = _load(
                inputs.x_scales, (token[:, None], group[None, :]), (is_token, is_group)
            )
            own = _dot(values, x, jnp.int32).astype(jnp.float32)
            return sums + own * scales * x_scales.reshape(1, plan.num_tokens)
        minimums = None
        if inputs.minimums is not None:
            minimums = _load(
                inputs.minimums, (layer, row[:, None], group[None, :]), (is_row, is_group)
            )
        for part, own in enumerate(_parts(values, inputs.x.shape[0])):
            weights = _scaled(own, scales, minimums)
            x = _load(inputs.x, (part, token[:, None], byte[None, :]), (is_token, is_byte))
            sums = sums + _dot(weights.astype(jnp.bfloat16), x, jnp.float32)
        return sums

    first = split * plan.num_blocks
    end = jnp.minimum(first + plan.num_blocks, pl.cdiv(num_groups, plan.num_groups))
    nothing = jnp.zeros((TILE_ROWS, plan.num_tokens), jnp.float32)
    sums = jax.lax.fori_loop(first, end, block, nothing)
    mask = is_token[:, None] & is_row[None, :]
    plgpu.store(out_ref.at[split, token[:, None], row[None, :]], sums.T, mask=mask)


def _scaled(values: jax.Array, scales: jax.Array, minimums: jax.Array | None) -> jax.Array:
    """Returns `[rows, bytes]` of what values stand for, with scales `[rows, groups]`."""
    grouped = values.reshape(*scales.shape, -1) * scales[:, :, None]
    if minimums is not None:
        grouped = grouped + minimums[:, :, None]
    return grouped.reshape(values.shape)


def _parts(values: jax.Array, num_parts: int) -> tuple[jax.Array, ...]:
    """Returns in f32 what a block of bytes holds, the halves of packed ones apart."""
    if num_parts == 1:
        return (values.astype(jnp.float32),)

    def half(values: jax.Array) -> jax.Array:
        # The bits of 2 ** 23 + value: a conversion is slower.
        bits = values.astype(jnp.int32) | 0x4B000000
        return jax.lax.bitcast_convert_type(bits, jnp.float32) - 2.0**23

    return half(values & 15), half(values >> 4)


def _load(ref: Any, at: tuple[Any, ...], is_there: tuple[jax.Array, jax.Array]) -> jax.Array:
    return load(ref.at[at], is_there[0][:, None] & is_there[1][None, :])


def _dot(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiplies `[r, n]` by the transpose of `[t, n]`."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
