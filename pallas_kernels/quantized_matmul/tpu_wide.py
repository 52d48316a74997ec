"""Products on TPUs of many tokens: a tile of the matrix becomes bfloat16 in VMEM, once for all.

What it stands for is computed and rounded as the definition does. Inputs run along the rows of
vectors there, so that a group's scales and minimums, one for each row of the matrix, lie as its
values do and are repeated at no cost.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from pallasite.pallas_kernels.quantized_matmul.tpu_chunks import (
    LANES,
    Call,
    Chunks,
    Held,
    by_groups,
    halves,
)

TILES = ((512, 512), (256, 512), (512, 256), (256, 256), (128, 256), (128, 128))
"""Tokens and rows of a tile, the best first."""

DOT_INPUTS = 1024
"""Inputs of one product in VMEM, at most."""


class Inputs(NamedTuple):
    """What is multiplied.

    Attributes:
        x: bfloat16 `[T, in]`, in the chunks' order.
        held: the matrices.
    """

    x: Any
    held: Held


class Scratch(NamedTuple):
    """Of a tile of rows: shapes `[chunks, groups of a chunk, rows]` and `[in, rows]`."""

    scales: Any
    minimums: Any
    weights: Any


def multiply(
    x: Float[Array, "T in"], held: Held, chunks: Chunks, layer: Shaped[Array, "1"], call: Call
) -> Float[Array, "T out"]:
    """Multiplies x, in bfloat16, by a layer's matrix."""
    num_rows = held.values.shape[1]
    tile = _tile(x, held, chunks, call)
    tiles = pl.cdiv(x.shape[0], tile[0])
    num_tokens = pl.cdiv(pl.cdiv(x.shape[0], tiles), 16) * 16
    padded = jnp.pad(x, ((0, tiles * num_tokens - x.shape[0]), (0, 0)))
    inputs = Inputs(x=chunks.inputs(padded).reshape(padded.shape), held=held)
    groups = pltpu.VMEM((chunks.num_chunks, chunks.num_groups, tile[1]), jnp.float32)
    kernel: Any = pl.pallas_call(
        partial(_kernel, chunks=chunks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            # Tokens are the inner axis, so that a matrix is read and converted once.
            grid=(num_rows // tile[1], tiles),
            in_specs=[
                Inputs(
                    x=pl.BlockSpec((num_tokens, x.shape[1]), lambda row, token, _: (token, 0)),
                    held=held.specs(tile[1], chunks),
                )
            ],
            out_specs=pl.BlockSpec((num_tokens, tile[1]), lambda row, token, _: (token, row)),
            scratch_shapes=[
                Scratch(
                    scales=groups,
                    minimums=None if held.minimums is None else groups,
                    weights=pltpu.VMEM((x.shape[1], tile[1]), jnp.bfloat16),
                )
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], num_rows), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.vmem_limit
        ),
        interpret=call.interpret,
        name="quantized_matmul_wide",
    )
    out: Array = kernel(layer, inputs)
    return out[: x.shape[0]]


def _tile(x: Float[Array, "T in"], held: Held, chunks: Chunks, call: Call) -> tuple[int, int]:
    """Returns tokens and rows of a tile that divides the rows and fits into VMEM."""
    num_inputs = x.shape[1]
    # Groups take whole vectors of 8 in the scratch.
    groups = 8 * pl.cdiv(chunks.num_groups, 8) * chunks.num_chunks * (2 if chunks.is_packed else 1)

    def num_bytes(num_tokens: int, num_rows: int) -> int:
        num_tokens = min(num_tokens, x.shape[0])
        scratch = num_rows * (2 * num_inputs + 4 * groups)
        blocks = 2 * num_inputs * num_tokens + 4 * num_tokens * num_rows
        # Blocks have two buffers each.
        return scratch + 2 * (blocks + held.tile_bytes(num_rows))

    fitting = [tile for tile in TILES if held.values.shape[1] % tile[1] == 0]
    return next((t for t in fitting if num_bytes(*t) <= call.vmem_limit), fitting[-1])


def _kernel(
    _layer_ref: Any, inputs: Inputs, out_ref: Any, scratch: Scratch, *, chunks: Chunks
) -> None:
    """A tile of rows by a tile of tokens."""

    @pl.when(pl.program_id(1) == 0)
    def convert() -> None:
        _lay_out(inputs.held.scales, scratch.scales, chunks)
        if scratch.minimums is not None:
            _lay_out(inputs.held.minimums, scratch.minimums, chunks)

        def convert_chunk(chunk: Array, _: None) -> None:
            for part, values in enumerate(_parts(inputs.held.values, chunk, chunks)):
                first = (chunk * (2 if chunks.is_packed else 1) + part) * chunks.num_bytes
                at = pl.ds(pl.multiple_of(first, LANES), chunks.num_bytes)
                scratch.weights[at] = _scaled(values, chunk, scratch, chunks)

        jax.lax.fori_loop(0, chunks.num_chunks, convert_chunk, None)

    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    num_chunks = next(
        n
        for n in range(chunks.num_chunks, 0, -1)
        if chunks.num_chunks % n == 0 and (n == 1 or n * chunks.num_inputs <= DOT_INPUTS)
    )
    num_inputs = num_chunks * chunks.num_inputs

    def add(index: Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(index * num_inputs, LANES), num_inputs)
        out_ref[...] += jnp.dot(
            inputs.x[:, at], scratch.weights[at], preferred_element_type=jnp.float32
        )

    jax.lax.fori_loop(0, chunks.num_chunks // num_chunks, add, None)


def _lay_out(held_ref: Any, by_chunks_ref: Any, chunks: Chunks) -> None:
    groups = by_groups(held_ref, chunks)
    for chunk in range(chunks.num_chunks):
        first = chunk * chunks.num_groups
        by_chunks_ref[chunk] = groups[first : first + chunks.num_groups]


def _parts(
    values_ref: Any, chunk: Array, chunks: Chunks
) -> tuple[Shaped[Array, "bytes rows"], ...]:
    """Returns a chunk's values in int8, the halves of packed ones apart, turned."""
    first = pl.multiple_of(chunk * chunks.num_bytes, LANES)
    values = values_ref[0, :, pl.ds(first, chunks.num_bytes)]
    return tuple(part.T for part in (halves(values) if chunks.is_packed else (values,)))


def _scaled(
    values: Shaped[Array, "bytes rows"], chunk: Array, scratch: Scratch, chunks: Chunks
) -> Float[Array, "bytes rows"]:
    num_bytes = chunks.num_bytes // chunks.num_groups
    scaled = []
    for group in range(chunks.num_groups):
        own = values[group * num_bytes : (group + 1) * num_bytes].astype(jnp.float32)
        own = own * scratch.scales[chunk, group : group + 1]
        if scratch.minimums is not None:
            own = own + scratch.minimums[chunk, group : group + 1]
        scaled.append(own)
    return jnp.concatenate(scaled).astype(jnp.bfloat16)
