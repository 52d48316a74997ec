"""How floats are held in fewer bits: bfloat16, see `Target.holds_bfloat16_as_bits`, int8 and fp8.

An array of dtype uint16 here always means the bits of bfloat16 values. The dtype of the array that
is at hand decides, so nothing else has to be passed along.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallasite.pallas_kernels.target import Target

LARGEST = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.float8_e4m3fn): 448}
"""What the largest magnitude of a row becomes, in each type that a scale goes with."""


def storage_dtype(dtype: DTypeLike, target: Target) -> jnp.dtype:
    """Returns the dtype that values of `dtype` are held in on `target`."""
    if jnp.dtype(dtype) == jnp.bfloat16 and target.holds_bfloat16_as_bits:
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def encode(values: jax.Array, held_as: DTypeLike) -> jax.Array:
    """Rounds float `values` to what `held_as` holds, and returns them in that dtype."""
    if jnp.dtype(held_as) == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(held_as)


def decode(held: jax.Array) -> jax.Array:
    """Returns the values of a held array: bfloat16 for its bits, any other float as it is."""
    if held.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(held, jnp.bfloat16)
    return held


def quantize_rows(
    values: Float[Array, "*r n"], held_as: DTypeLike = jnp.int8
) -> tuple[Shaped[Array, "*r n"], Float[Array, "*r"]]:
    """Rounds each row with a scale of its own; returns them so that values = rows * scale.

    `held_as` is int8 or float8_e4m3fn. The largest magnitude of a row becomes the type's `LARGEST`,
    127 or 448. A row of zeros has a scale of 0, and so has one whose values are all below 1.5e-36
    (5.3e-36 for fp8), for which f32 has no scale with a finite inverse.
    """
    largest = LARGEST[jnp.dtype(held_as)]
    values = values.astype(jnp.float32)
    # Not a division by 127: compilers make this of one, some do and some do not, and kernels that
    # write the same rows shall have the same bits.
    scales = jnp.max(jnp.abs(values), axis=-1) * np.float32(1 / largest)
    is_zero = scales < jnp.finfo(jnp.float32).tiny
    inverse = jnp.where(is_zero, 0.0, 1 / jnp.where(is_zero, 1.0, scales))
    rows = values * inverse[..., None]
    if jnp.dtype(held_as) == jnp.int8:
        rows = jnp.round(rows)
    return rows.astype(held_as), jnp.where(is_zero, 0.0, scales)
