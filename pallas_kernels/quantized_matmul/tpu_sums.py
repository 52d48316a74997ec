"""Products on TPUs in which scales are left to the sums of groups: of few tokens, or in integers.

The values of a group are multiplied as the small integers that they are, which costs the vector
units next to nothing for each; what a group sums up to is then multiplied by its scale, once for
each row and token. Where several groups share a chunk, the tokens stand there once for each group,
with zeros for the others' inputs.
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
    ROW_TILES,
    Call,
    Chunks,
    Held,
    by_groups,
    halves,
)

TILE_TOKENS = 512
STEP_GROUPS = 8
"""Groups of a step of the loop over a row: as many as a vector has rows."""

STEP_ROWS = 1024
"""Rows of inputs in a step, at most: the program's length, and so its time to compile."""


class Inputs(NamedTuple):
    """What is multiplied.

    Attributes:
        x: `[tiles, chunks, groups * tokens, inputs]` of a chunk, in bfloat16 or int8.
        x_scales: of int8, f32 `[tiles, steps, tokens, groups]` of a step; else None.
        x_sums: beside minimums, f32 `[T, groups]`: what a group's inputs sum up to; else None.
        held: the matrices.
    """

    x: Any
    x_scales: Any
    x_sums: Any
    held: Held


class _Plan(NamedTuple):
    """What is static.

    Attributes:
        chunks: how rows are cut.
        num_tokens: of a tile.
        num_rows: of a tile of the matrix.
        num_chunks: of a step.
        in_integers: whether int8 is multiplied with int8.
    """

    chunks: Chunks
    num_tokens: int
    num_rows: int
    num_chunks: int
    in_integers: bool

    @property
    def num_steps(self) -> int:
        return self.chunks.num_chunks // self.num_chunks

    @property
    def num_groups(self) -> int:
        """Of a step."""
        return self.num_chunks * self.chunks.num_groups


def multiply(
    x: Float[Array, "T in"] | Shaped[Array, "T in"],
    x_scales: Float[Array, "T groups"] | None,
    held: Held,
    chunks: Chunks,
    layer: Shaped[Array, "1"],
    call: Call,
) -> Float[Array, "T out"]:
    """Multiplies x, in bfloat16, or in int8 with scales, by a layer's matrix."""
    num_rows = held.values.shape[1]
    tiles = pl.cdiv(x.shape[0], TILE_TOKENS)
    num_tokens = pl.cdiv(pl.cdiv(x.shape[0], tiles), 8) * 8
    most = min(STEP_GROUPS, STEP_ROWS // num_tokens) // chunks.num_groups
    plan = _Plan(
        chunks=chunks,
        num_tokens=num_tokens,
        num_rows=next(rows for rows in ROW_TILES if num_rows % rows == 0),
        num_chunks=_divisor(chunks.num_chunks, most),
        in_integers=x_scales is not None and call.multiplies_int8,
    )
    surplus = tiles * num_tokens - x.shape[0]
    padded = jnp.pad(x, ((0, surplus), (0, 0)))
    inputs = Inputs(
        x=_spread(chunks.inputs(padded), plan),
        x_scales=None if x_scales is None else _by_steps(x_scales, surplus, plan),
        x_sums=None if held.minimums is None else _sums(padded, plan),
        held=held,
    )
    out = _call(layer, inputs, plan, call)
    return out[: x.shape[0]]


def _spread(x: Shaped[Array, "T n width"], plan: _Plan) -> Shaped[Array, "tiles n rows width"]:
    """Puts chunks first, and tokens once for each group of a chunk."""
    chunks = plan.chunks
    tiled = x.reshape(-1, plan.num_tokens, *x.shape[1:])
    tiled = jnp.swapaxes(tiled, 1, 2)[:, :, None]
    group = jnp.arange(chunks.num_groups, dtype=jnp.int32)
    is_own = group[:, None] == jnp.asarray(chunks.group_of_input(), jnp.int32)[None, :]
    spread = jnp.where(is_own[None, None, :, None, :], tiled, jnp.zeros((), x.dtype))
    return spread.reshape(*spread.shape[:2], -1, spread.shape[-1])


def _by_steps(
    scales: Float[Array, "T groups"], surplus: int, plan: _Plan
) -> Float[Array, "tiles steps tokens own"]:
    padded = jnp.pad(scales, ((0, surplus), (0, 0)))
    steps = padded.reshape(-1, plan.num_tokens, plan.num_steps, plan.num_groups)
    return jnp.swapaxes(steps, 1, 2)


def _sums(x: Float[Array, "T in"], plan: _Plan) -> Float[Array, "T groups"]:
    num_groups = plan.chunks.num_chunks * plan.chunks.num_groups
    grouped = x.astype(jnp.float32).reshape(x.shape[0], num_groups, -1)
    return jnp.sum(grouped, axis=-1)


def _call(
    layer: Shaped[Array, "1"], inputs: Inputs, plan: _Plan, call: Call
) -> Float[Array, "T out"]:
    tiles, num_tokens = inputs.x.shape[0], plan.num_tokens
    num_rows = inputs.held.values.shape[1]

    def of_tile(array: Any) -> pl.BlockSpec | None:
        if array is None:
            return None
        return pl.BlockSpec((1, *array.shape[1:]), lambda row, token, _: (token, 0, 0, 0))

    x_sums = None
    if inputs.x_sums is not None:
        x_sums = pl.BlockSpec(
            (num_tokens, inputs.x_sums.shape[1]), lambda row, token, _: (token, 0)
        )
    kernel: Any = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            # Tokens are the inner axis, so that a matrix is read once.
            grid=(num_rows // plan.num_rows, tiles),
            in_specs=[
                Inputs(
                    x=of_tile(inputs.x),
                    x_scales=of_tile(inputs.x_scales),
                    x_sums=x_sums,
                    held=inputs.held.specs(plan.num_rows, plan.chunks),
                )
            ],
            out_specs=pl.BlockSpec((num_tokens, plan.num_rows), lambda row, token, _: (token, row)),
            scratch_shapes=[
                pltpu.VMEM((plan.num_steps, plan.num_groups, plan.num_rows), jnp.float32)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles * num_tokens, num_rows), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.vmem_limit
        ),
        interpret=call.interpret,
        name="quantized_matmul_sums",
    )
    out: Array = kernel(layer, inputs)
    return out


def _kernel(
    _layer_ref: Any, inputs: Inputs, out_ref: Any, scales_vmem_ref: Any, *, plan: _Plan
) -> None:
    """A tile of rows by a tile of tokens; the scratch is `[steps, groups of a step, rows]`."""
    held, chunks = inputs.held, plan.chunks

    @pl.when(pl.program_id(1) == 0)
    def lay_out() -> None:
        scales = by_groups(held.scales, chunks)
        for step in range(plan.num_steps):
            first = step * plan.num_groups
            scales_vmem_ref[step] = scales[first : first + plan.num_groups]

    if inputs.x_sums is None:
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    else:
        groups_axis = 1 if chunks.has_vectors_of_groups else 0
        out_ref[...] = jax.lax.dot_general(
            inputs.x_sums[...],
            held.minimums[0],
            (((1,), (groups_axis,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def step(index: Array, _: None) -> None:
        total, scales = out_ref[...], scales_vmem_ref[index]
        x_scales = None if inputs.x_scales is None else inputs.x_scales[0, index]
        for part in range(plan.num_chunks):
            sums = _chunk_sums(inputs, index * plan.num_chunks + part, plan)
            for group in range(chunks.num_groups):
                own = sums[group * plan.num_tokens : (group + 1) * plan.num_tokens]
                column = part * chunks.num_groups + group
                if x_scales is not None:
                    own = own * x_scales[:, column : column + 1]
                total = total + own * scales[column : column + 1]
        out_ref[...] = total

    jax.lax.fori_loop(0, plan.num_steps, step, None)


def _chunk_sums(inputs: Inputs, chunk: Array, plan: _Plan) -> Float[Array, "spread rows"]:
    num_bytes = plan.chunks.num_bytes
    values = inputs.held.values[0, :, pl.ds(pl.multiple_of(chunk * num_bytes, LANES), num_bytes)]
    if plan.chunks.is_packed:
        values = jnp.concatenate([half.astype(jnp.bfloat16) for half in halves(values)], axis=1)
    elif not plan.in_integers:
        values = values.astype(jnp.bfloat16)
    # Sums of int8 in f32 are exact, too, in groups of up to 1,024.
    sums = jax.lax.dot_general(
        inputs.x[0, chunk],
        values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32 if plan.in_integers else jnp.float32,
    )
    return sums.astype(jnp.float32)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor that is at most `most`, and at least 1."""
    return next(d for d in range(max(1, min(most, number)), 0, -1) if number % d == 0)
