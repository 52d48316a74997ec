"""Small functions to compile, each made for what its report must say."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.target import Target


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matmul_kernel(x_ref, y_ref, o_ref, acc_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def clear():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    rows = pl.ds(0, 256)
    acc_ref[rows] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def store():
        o_ref[...] = acc_ref[rows].astype(o_ref.dtype)


def matmul(target: Target, acc_rows: int = 256) -> Case:
    """A product of [1024, 2048] with [2048, 512] in 4 x 2 x 4 steps; 256 rows of sums suffice."""
    block = 256

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
            scratch_shapes=[pltpu.VMEM((acc_rows, block), jnp.float32)],
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


def _product_kernel(x_ref, y_ref, o_ref):
    product = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)
    o_ref[...] = product.astype(o_ref.dtype)


def product(target: Target, block: int = 64, num_warps: int = 4) -> Case:
    """A product of [1024, 128] with [128, 512] by Triton."""

    def function(x, y):
        return pl.pallas_call(
            _product_kernel,
            name="my-product",
            grid=(1024 // block, 512 // block),
            in_specs=[
                pl.BlockSpec((block, 128), lambda i, j: (i, 0)),
                pl.BlockSpec((128, block), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16),
            compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=2),
        )(x, y)

    x = jax.ShapeDtypeStruct((1024, 128), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((128, 512), jnp.bfloat16)
    return Case(function, (x, y))


def _crowded_kernel(x_ref, o_ref):
    def crowd(i, carry):
        x = [x_ref[i, j] for j in range(128)]
        sums = [x[0]]
        for value in x[1:]:
            sums.append(sums[-1] * 0.5 + value)
        # Each is needed once more, in the other order.
        total = sums[-1]
        for value in reversed(sums[:-1]):
            total = total * 0.5 + value
        o_ref[i] = total
        return carry

    jax.lax.fori_loop(0, 8, crowd, 0)


def crowded(target: Target) -> Case:
    """128 vectors that live at once."""

    def function(x):
        return pl.pallas_call(_crowded_kernel, name="crowded", out_shape=_float32(8, 8, 128))(x)

    return Case(function, (_float32(8, 128, 8, 128),))


def update(target: Target, is_donated: bool) -> Case:
    """Adds to one row of [4096, 1024]."""

    def function(cache, index):
        return cache.at[index].add(1.0)

    arguments = (_float32(4096, 1024), jax.ShapeDtypeStruct((), jnp.int32))
    return Case(function, arguments, donated=(0,) if is_donated else ())


def sums(target: Target, num_devices: int = 1) -> Case:
    """Sums columns of [1024, 1024], whose rows are shared out."""
    mesh = jax.sharding.AbstractMesh((num_devices,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding)
    return Case(lambda x: x.sum(axis=0), (x,), mesh=mesh)


def _branching_kernel(x_ref, o_ref):
    def outer(i, carry):
        def large():
            o_ref[...] += jnp.exp(x_ref[...])

        def small():
            o_ref[...] += jnp.dot(x_ref[...], x_ref[...])

        jax.lax.cond(x_ref[0, 0] > jnp.float32(1), large, small)

        @pl.loop(0, 12, step=3)
        def stepped(j):
            o_ref[pl.ds(j * 8, 8)] += jnp.float32(1)

        return carry

    jax.lax.fori_loop(0, 6, outer, 0)


def branching(target: Target) -> Case:
    """Two branches of one condition and a loop that `pl.loop` makes, in a loop; called twice."""

    def function(x, y):
        call = pl.pallas_call(_branching_kernel, name="branching", out_shape=_float32(128, 128))
        return call(x), call(y)

    return Case(function, (_float32(128, 128), _float32(128, 128)))


def sharded_matmul(target: Target) -> Case:
    """`matmul` on each of 4 devices, over which the rows are shared out."""
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    by_rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    case = matmul(target)
    function = jax.shard_map(
        case.function, in_specs=(by_rows, whole), out_specs=by_rows, check_vma=False
    )
    sharding = jax.sharding.NamedSharding(mesh, by_rows)
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16, sharding=sharding)
    return Case(function, (x, case.arguments[1]), mesh=mesh)


def layers(target: Target) -> Case:
    """A loop over 5 layers, each a product with int8 weights [2048, 2048]."""

    def function(x, weights):
        def layer(index, x):
            own = jax.lax.dynamic_index_in_dim(weights, index, keepdims=False)
            product = jnp.dot(
                x.astype(jnp.bfloat16),
                own.astype(jnp.bfloat16),
                preferred_element_type=jnp.float32,
            )
            return jnp.tanh(product)

        return jax.lax.fori_loop(0, 5, layer, x)

    return Case(function, (_float32(8, 2048), jax.ShapeDtypeStruct((5, 2048, 2048), jnp.int8)))
