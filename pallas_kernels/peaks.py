"""The largest value of each row, its place, and whether the row is fit to be sampled from.

The op, its definition in jnp, and the CPU's body: one pass over the values, see `cpu/`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallasite.pallas_kernels.cpu import FIND_PEAKS
from pallasite.pallas_kernels.target import Target


class Peaks(NamedTuple):
    """What `find_peaks` returns.

    Attributes:
        largest: of each row. +inf counts; where there is a NaN, this is any number.
        first: where it stands first, 0 in a row of -inf alone; of no meaning where there is a NaN,
            and then possibly V.
        is_finite: whether all values are below +inf: NaN is not, -inf is.
    """

    largest: Float32[Array, "B"]
    first: Int32[Array, "B"]
    is_finite: Bool[Array, "B"]


def find_peaks(values: Float32[Array, "B V"], target: Target) -> Peaks:
    """Returns the largest value of each row, its first index, and whether the row is finite.

    V is 1 at least. Zeros of both signs are equal, and either may be returned.
    """
    if target.instructions:
        return _call_body(values, target.instructions)
    largest = jnp.max(values, axis=1)
    # NaN compares false, and max drops it on some backends.
    is_finite = jnp.all(values < jnp.inf, axis=1)
    return Peaks(largest, _first_equal(values, largest), is_finite)


def _first_equal(values: Float32[Array, "B V"], value: Float32[Array, "B"]) -> Int32[Array, "B"]:
    # Several times faster than argmax on a CPU.
    num_values = values.shape[1]
    index = jnp.arange(num_values, dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(values == value[:, None], index, num_values), axis=1)


def _call_body(values: Float32[Array, "B V"], instructions: str) -> Peaks:
    results = [
        jax.ShapeDtypeStruct(values.shape[:1], dtype)
        for dtype in (jnp.float32, jnp.int32, jnp.bool_)
    ]
    return Peaks(*jax.ffi.ffi_call(FIND_PEAKS, results)(values, instructions=instructions))
