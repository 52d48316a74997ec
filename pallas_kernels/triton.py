"""What kernels for Pallas's Triton backend share: masked reads, sizes, and which arrays they reach.

A program works on small arrays whose sides are powers of two, and addresses memory by arrays of
indices, under masks where there is less memory than indices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Reads what a ref names, zeros where the mask says no."""
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Returns where both masks say yes; None is yes everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def within(index: jax.Array, length: int) -> jax.Array | None:
    """Returns which of an arange of `padded(length)` are below length, None for all."""
    return None if padded(length) == length else index < length


def padded(length: int) -> int:
    """Returns the least power of two that is a side of arrays to multiply: 16 or more."""
    return max(16, pl.next_power_of_2(length))


def unreached(itemsize: int) -> range:
    """Returns of how many elements an array must not be: a kernel would not find them all.

    Pallas counts elements with 64 bits in arrays of more than 4 GiB, else with 32, which are
    signed: too few for 8-bit elements from 2 GiB on.
    """
    return range(2**31 + 1, 2**32 // itemsize + 1)


def is_addressable(array: Any) -> bool:
    """Tells whether a kernel finds each element of an array."""
    return math.prod(array.shape) not in unreached(array.dtype.itemsize)
