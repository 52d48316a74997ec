"""How 16-bit floats are held in memory, see `Target.holds_bfloat16_as_bits`.

An array of dtype uint16 here always means the bits of bfloat16 values. The dtype of the array that
is at hand decides, so nothing else has to be passed along.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
