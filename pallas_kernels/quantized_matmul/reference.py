"""Products with quantized matrices in jnp: the definition, and the body without a kernel."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.quantized_matmul.strips import GROUP, unpack
from pallasite.pallas_kernels.storage import decode, quantize_rows


def quantized_matmul(
    x: Float[Array, "T in"], matrix: QuantizedMatrix, dtype: DTypeLike
) -> Float[Array, "T out"]:
    """See the op in the package."""
    if matrix.in_strips and matrix.quantizes_inputs:
        return _dot(_round_but_largest(x), dequantize(matrix), jnp.float32)
    matrix = unpack(matrix)
    if matrix.scales is None:
        return _dot(x, decode(matrix.values), dtype)
    if matrix.quantizes_inputs:
        return _multiply_integers(x, matrix)
    if matrix.num_groups == 1 and not matrix.is_packed:
        # A whole row's scale is left to the sum: the values are exact in bfloat16, products not.
        return _dot(x, matrix.values, dtype) * matrix.scales[None, :, 0]
    return _dot(x, dequantize(matrix), dtype)


def dequantize(matrix: QuantizedMatrix) -> Float[Array, "out in"]:
    """Returns the values that a matrix stands for, in f32."""
    matrix = unpack(matrix)
    num_rows, num_groups = matrix.scales.shape
    if matrix.is_packed:
        pairs = matrix.values.reshape(num_rows, num_groups, -1)
        values = jnp.concatenate((pairs & 15, pairs >> 4), axis=-1)
    else:
        values = matrix.values.reshape(num_rows, num_groups, -1)
    scaled = values.astype(jnp.float32) * matrix.scales[..., None]
    if matrix.minimums is not None:
        scaled = scaled + matrix.minimums[..., None]
    return scaled.reshape(num_rows, -1)


def _round_but_largest(x: Float[Array, "T in"]) -> Float[Array, "T in"]:
    """Rounds all but the largest of each group of 32 to 127 steps up and down."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUP)
    largest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    is_kept = jnp.arange(GROUP)[None, None] == largest
    rows, scales = quantize_rows(jnp.where(is_kept, 0.0, groups))
    rounded = rows.astype(jnp.float32) * scales[..., None]
    return jnp.where(is_kept, groups, rounded).reshape(x.shape)


def _multiply_integers(x: Float[Array, "T in"], matrix: QuantizedMatrix) -> Float[Array, "T out"]:
    num_tokens, num_groups = x.shape[0], matrix.num_groups
    rows, x_scales = quantize_rows(x.reshape(num_tokens, num_groups, -1))
    values = matrix.values.reshape(matrix.values.shape[0], num_groups, -1)
    if matrix.is_packed:
        values = jnp.concatenate((values & 15, values >> 4), axis=-1).astype(jnp.int8)
    if num_groups == 1 and matrix.minimums is None:
        sums = jax.lax.dot_general(
            rows[:, 0],
            values[:, 0],
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        ).astype(jnp.float32)
        return sums * x_scales * matrix.scales[None, :, 0]

    def add_group(group: Int[Array, ""], total: Float[Array, "T out"]) -> Float[Array, "T out"]:
        own_rows, own_values, own_x_scales, own_scales = (
            jax.lax.dynamic_index_in_dim(array, group, 1, keepdims=False)
            for array in (rows, values, x_scales, matrix.scales)
        )
        sums = jax.lax.dot_general(
            own_rows, own_values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        ).astype(jnp.float32)
        total = total + sums * own_x_scales[:, None] * own_scales[None, :]
        if matrix.minimums is None:
            return total
        own_minimums = jax.lax.dynamic_index_in_dim(matrix.minimums, group, 1, keepdims=False)
        x_sums = own_x_scales * jnp.sum(own_rows, axis=1, dtype=jnp.int32).astype(jnp.float32)
        return total + x_sums[:, None] * own_minimums[None, :]

    # Group by group: the sums of all at once would be as many times larger than the result.
    nothing = jnp.zeros((num_tokens, matrix.values.shape[0]), jnp.float32)
    return jax.lax.fori_loop(0, num_groups, add_group, nothing)


def _dot(x: Float[Array, "T in"], weight: jax.Array, dtype: DTypeLike) -> Float[Array, "T out"]:
    return jax.lax.dot_general(
        x.astype(dtype),
        weight.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
