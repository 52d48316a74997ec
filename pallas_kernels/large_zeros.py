"""A large array of zeros on its devices; on a CPU in large pages of memory, see `cpu/clear.cc`."""

from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from pallasite.pallas_kernels.cpu import CLEAR
from pallasite.pallas_kernels.target import Target


def large_zeros(
    shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding, target: Target
) -> jax.Array:
    """Returns zeros of a shape and dtype, placed by `sharding`."""
    if not target.instructions:
        return jnp.zeros(shape, dtype, device=sharding)
    return _cleared(shape, jnp.dtype(dtype), sharding)()


@cache
def _cleared(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.stages.Compiled:
    own = jax.ShapeDtypeStruct(sharding.shard_shape(shape), dtype)
    clear = jax.shard_map(
        lambda: jax.ffi.ffi_call(CLEAR, own)(),
        mesh=sharding.mesh,
        in_specs=(),
        out_specs=sharding.spec,
        check_vma=False,
    )
    return jax.jit(clear).lower().compile()
