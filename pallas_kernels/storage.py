"""How floats are held in fewer bits: bfloat16, see `Target.holds_bfloat16_as_bits`, and int8.

An array of dtype uint16 here always means the bits of bfloat16 values. The dtype of the array that
is at hand decides, so nothing else has to be passed along.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallasite.pallas_kernels.target import Target


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


def quantize_rows(values: Float[Array, "*r n"]) -> tuple[Int8[Array, "*r n"], Float[Array, "*r"]]:
    """Rounds each row to int8 with a scale of its own; returns them so that values = rows * scale.

    The largest magnitude of a row becomes 127 or -127. A row of zeros has a scale of 0, and so has
    one whose values are all below 1.5e-36, for which f32 has no scale with a finite inverse.
    """
    values = values.astype(jnp.float32)
    # Not a division by 127: compilers make this of one, some do and some do not, and kernels that
    # write the same rows shall have the same bits.
    scales = jnp.max(jnp.abs(values), axis=-1) * np.float32(1 / 127)
    is_zero = scales < jnp.finfo(jnp.float32).tiny
    inverse = jnp.where(is_zero, 0.0, 1 / jnp.where(is_zero, 1.0, scales))
    rows = jnp.round(values * inverse[..., None]).astype(jnp.int8)
    return rows, jnp.where(is_zero, 0.0, scales)
