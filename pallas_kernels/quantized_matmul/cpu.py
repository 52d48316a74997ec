"""The CPU's body of products: one custom call for matrices in strips, see `cpu/`.

It takes integers whose inputs are rounded to int8 too, in groups of 32, and bfloat16; a layer of
stacked matrices is read where it lies. What can be done while rows are rounded or results are
written is done there: see `Fused`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallasite.pallas_kernels.cpu import MULTIPLY
from pallasite.pallas_kernels.quantized_matmul.contract import QuantizedMatrix

Gate = Literal["silu", "gelu"]

_GATES: dict[Gate | None, int] = {None: -1, "silu": 0, "gelu": 1}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Fused:
    """What is done beside the products.

    The fields are typed Any since the same tree also holds abstract shapes.

    Attributes:
        count: how many rows of x are in use, the first ones; the results of others may be anything,
            NaN too. None for all.
        wanted: which rows of x are, bool `[T]`, as `count` says. None for all.
        norm: the scale of a root-mean-square norm that x goes through first, `[in]`, or `[L, in]`
            beside stacked matrices.
        epsilon: that norm's.
        gate: of two matrices: gate(x @ first.T) * (x @ second.T); gelu is tanh's approximation.
        residual: added to the result, `[T, out]`.
    """

    count: Any = None
    wanted: Any = None
    norm: Any = None
    epsilon: float = field(default=0.0, metadata={"static": True})
    gate: Gate | None = field(default=None, metadata={"static": True})
    residual: Any = None


def takes(*matrices: QuantizedMatrix) -> bool:
    """Returns whether one call multiplies by all of these."""
    kinds = {matrix.values.dtype == jnp.uint16 for matrix in matrices}
    return len(kinds) == 1 and all(
        matrix.in_strips
        and bool(matrix.target.instructions)
        and (matrix.scales is None or matrix.quantizes_inputs)
        for matrix in matrices
    )


def quantized_matmul(x: Float[Array, "T in"], matrix: QuantizedMatrix) -> Float[Array, "T out"]:
    """See the op in the package."""
    return fused_matmul(x, [matrix], Fused())


def fused_matmul(
    x: Float[Array, "T in"], matrices: Sequence[QuantizedMatrix], fused: Fused
) -> Float[Array, "T out"]:
    """Multiplies x by each matrix; results lie side by side, or are gated."""
    first = matrices[0]
    layer = first.layer if first.layer is not None else jnp.zeros((), jnp.int32)
    arguments = [x.astype(jnp.float32), layer.astype(jnp.int32)]
    if fused.count is not None:
        arguments.append(fused.count.astype(jnp.int32))
    if fused.wanted is not None:
        arguments.append(fused.wanted)
    if fused.norm is not None:
        arguments.append(fused.norm)
    if fused.residual is not None:
        arguments.append(fused.residual)
    for matrix in matrices:
        parts = (matrix.values, matrix.scales, matrix.minimums)
        arguments += [part for part in parts if part is not None]
    counted = matrices[:1] if fused.gate else matrices
    num_outputs = sum(matrix.num_rows for matrix in counted)
    call = jax.ffi.ffi_call(MULTIPLY, jax.ShapeDtypeStruct((x.shape[0], num_outputs), jnp.float32))
    return call(
        *arguments,
        instructions=first.target.instructions,
        has_count=fused.count is not None,
        has_wanted=fused.wanted is not None,
        has_norm=fused.norm is not None,
        has_residual=fused.residual is not None,
        gate=np.int32(_GATES[fused.gate]),
        epsilon=np.float32(fused.epsilon),
    )
