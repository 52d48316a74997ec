"""Small functions to compile, each made for what its report must say."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.target import Target


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matmul_kernel(x_ref, y_ref, o_ref, acc_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def clear():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def store():
        o_ref[...] = acc_ref[...].astype(o_ref.dtype)


def matmul(target: Target, block: int = 256) -> Case:
    """A product of [1024, 2048] with [2048, 512]: 4 x 2 x 4 steps for blocks of 256."""

    def function(x, y):
        return pl.pallas_call(
            _matmul_kernel,
            name="matmul",
            grid=(1024 // block, 512 // block, 4),
            in_specs=[
                pl.BlockSpec((block, 512), lambda i, j, k: (i, k)),
                pl.BlockSpec((512, block), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((block, block), lambda i, j, k: (i, j)),
            out_shape=jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16),
            scratch_shapes=[pltpu.VMEM((block, block), jnp.float32)],
        )(x, y)

    x = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16)
    return Case(function, (x, y))


def _exponential(rows_vmem_ref, o_ref, slot, row):
    values = rows_vmem_ref[slot, pl.ds(row * 8, 8)]
    o_ref[pl.ds(row * 8, 8)] += jnp.exp(values)


def _ragged_kernel(num_ref, x_hbm_ref, o_ref, rows_vmem_ref, sem):
    num = num_ref[0]

    def fetch(i, slot):
        return pltpu.make_async_copy(x_hbm_ref.at[i], rows_vmem_ref.at[slot], sem.at[slot])

    o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(num > 0)
    def first():
        fetch(0, 0).start()

    def each(i, carry):
        slot = jax.lax.rem(i, 2)

        @pl.when(i + 1 < num)
        def prefetch():
            fetch(i + 1, 1 - slot).start()

        fetch(i, slot).wait()

        def rows(j, carry):
            _exponential(rows_vmem_ref, o_ref, slot, j)
            return carry

        return jax.lax.fori_loop(0, 16, rows, carry)

    jax.lax.fori_loop(0, num, each, 0)


def ragged(target: Target) -> Case:
    """Sums exponentials of the first `num` of 5,000 blocks of [128, 256], each copied by hand."""

    def function(num, x):
        return pl.pallas_call(
            _ragged_kernel,
            name="ragged",
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_shape=_float32(128, 256),
            scratch_shapes=[
                pltpu.VMEM((2, 128, 256), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        )(num, x)

    return Case(function, (jax.ShapeDtypeStruct((1,), jnp.int32), _float32(5000, 128, 256)))
