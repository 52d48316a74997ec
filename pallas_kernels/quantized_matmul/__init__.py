"""Products with matrices in any form: the op that models call and its choice of body."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallasite.pallas_kernels.quantized_matmul import cpu, gpu, reference, tpu
from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix
from pallasite.pallas_kernels.quantized_matmul.cpu import Fused, Gate, fused_matmul
from pallasite.pallas_kernels.quantized_matmul.cpu import takes as fuses
from pallasite.pallas_kernels.quantized_matmul.reference import dequantize
from pallasite.pallas_kernels.quantized_matmul.strips import rows_of

__all__ = [
    "Fused",
    "Gate",
    "QuantizedMatrix",
    "dequantize",
    "fused_matmul",
    "fuses",
    "quantized_matmul",
    "rows_of",
]


def quantized_matmul(
    x: Float[Array, "T in"], matrix: QuantizedMatrix, dtype: DTypeLike
) -> Float[Array, "T out"]:
    """Multiplies x by the transpose of a matrix; sums are f32, or int32 and then f32.

    `dtype` is what x and the values are rounded to, f32 or bfloat16, unless the matrix has its
    inputs rounded to int8. Most products are XLA's own, whatever the target; see each body for the
    others.
    """
    if x.shape[1] != matrix.num_inputs:
        raise ValueError(f"got {x.shape[1]} inputs for a matrix of {matrix.num_inputs}")
    if matrix.num_inputs % matrix.num_groups:
        raise ValueError(f"got {matrix.num_groups} groups of {matrix.num_inputs} inputs; not whole")
    if cpu.takes(matrix):
        return cpu.quantized_matmul(x, matrix)
    if matrix.target.platform == "gpu" and gpu.takes(x.shape[0], matrix, dtype):
        return gpu.quantized_matmul(x, matrix)
    if matrix.target.platform == "tpu" and tpu.takes(x.shape[0], matrix, dtype):
        return tpu.quantized_matmul(x, matrix)
    return reference.quantized_matmul(x, matrix.alone(), dtype)
