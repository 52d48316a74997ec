"""Products with matrices in groups, on TPUs: which of them are kernels', and which kernel's.

XLA converts a whole row's values on the way into its own product, and reads them as they are
stored, in a loop over layers too. For groups it writes wide copies of the matrix or its scales to
memory first, or multiplies group after group: docs/quantized.md has the figures.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallasite.pallas_kernels.quantized_matmul import tpu_sums, tpu_wide
from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.quantized_matmul.tpu_chunks import (
    ROW_TILES,
    Call,
    Chunks,
    Held,
    vmem_limit,
)
from pallasite.pallas_kernels.storage import quantize_rows

MOST_GROUP = 1024
"""Inputs of a group: so many products of int8 sum up exactly in f32, too."""

MOST_TOKENS = 512
"""With more, XLA's own product makes up for its detours."""

MOST_INTEGER_TOKENS = 256
"""Where inputs are int8, too: with more, static figures do not show that a kernel is better."""

MOST_SPREAD = 128
"""Tokens times groups of a chunk: with more, values are scaled before they are multiplied."""


def takes(num_tokens: int, matrix: QuantizedMatrix, dtype: DTypeLike) -> bool:
    """Tells whether a product is one for these kernels."""
    if num_tokens > (MOST_INTEGER_TOKENS if matrix.quantizes_inputs else MOST_TOKENS):
        return False
    if matrix.quantizes_inputs and matrix.is_packed:
        return False
    if matrix.num_groups == 1 or matrix.values.dtype not in (jnp.int8, jnp.uint8):
        return False
    if not matrix.quantizes_inputs and dtype != jnp.bfloat16:
        return False
    if matrix.num_inputs // matrix.num_groups > MOST_GROUP:
        return False
    return matrix.values.shape[-2] % min(ROW_TILES) == 0 and Chunks.of(matrix) is not None


def quantized_matmul(
    x: Float[Array, "T in"], matrix: QuantizedMatrix, interpret: Any = False
) -> Float[Array, "T out"]:
    """See the op in the package. `interpret` is its `pallas_call`'s, for tests on a CPU.

    Products of few tokens have a group's scale left to its part of the sum, which rounds less than
    the definition does.
    """
    chunks = Chunks.of(matrix)
    assert chunks is not None
    held = Held.of(matrix, chunks)
    layer = jnp.zeros(1, jnp.int32) if matrix.layer is None else matrix.layer.reshape(1)
    call = Call(matrix.target.multiplies_int8, vmem_limit(matrix.target), interpret)
    if matrix.quantizes_inputs:
        grouped = x.reshape(x.shape[0], matrix.num_groups, -1)
        rows, scales = quantize_rows(grouped)
        rows = rows.reshape(x.shape)
        if not call.multiplies_int8:
            rows = rows.astype(jnp.bfloat16)
        return tpu_sums.multiply(rows, scales, held, chunks, layer, call)
    rounded = x.astype(jnp.bfloat16)
    if x.shape[0] * chunks.num_groups <= MOST_SPREAD:
        return tpu_sums.multiply(rounded, None, held, chunks, layer, call)
    return tpu_wide.multiply(rounded, held, chunks, layer, call)
