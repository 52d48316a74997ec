"""Paged attention of requests with one query each, on GPUs.

Every request's cached tokens are cut into splits that run at once (Dao et al. 2023,
"Flash-Decoding"), each for all queries of one key head. How many splits a program has depends on
its shapes alone; how many of them have work, and how much, follows each request's length. A second
kernel adds the splits up.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig
from pallasite.pallas_kernels.paged_attention.gpu_block import (
    NEVER,
    BlockReader,
    Curve,
    Inputs,
    Softmax,
)
from pallasite.pallas_kernels.triton import both, load, padded, within

SPLIT_TOKENS = 256
"""A split has at least so many cached tokens, unless the request has fewer."""

MAX_SPLITS = 32

WANTED_PROGRAMS = 256
"""Two for each multiprocessor of today's GPUs (132 and 148): measured on an H200, more splits of
eight requests of 2,048 cost more to merge than they save, and one of 32,768 gains nothing."""

MAX_QUERIES = 64
"""Queries of one key head that a program attends; more are cut up."""


class Partials(NamedTuple):
    """What each split of each query comes to; only splits with work are written.

    Attributes:
        tops: `[B, N, splits]`, see `Softmax`.
        totals: `[B, N, splits]`.
        weighted: `[B, N, splits, H]`.
    """

    tops: Any
    totals: Any
    weighted: Any


class _Plan(NamedTuple):
    """What is static about the kernels.

    Attributes:
        block_tokens: cached tokens of a block.
        num_splits: how many programs share a request and a key head.
        num_queries: rows of a program's products, a power of two.
        num_tiles: how many programs share the queries of a key head.
        fills_rest: whether rows without a decoding request are to be zeros.
        num_warps: of a program.
        num_stages: how far loads run ahead of products, plus one.
    """

    block_tokens: int
    num_splits: int
    num_queries: int
    num_tiles: int
    fills_rest: bool
    num_warps: int
    num_stages: int

    @classmethod
    def make(cls, inputs: Inputs) -> "_Plan":
        num_tokens = inputs.q.shape[0]
        num_rows, num_columns = inputs.page_table.shape
        num_key_heads, page_size = inputs.values.shape[2], inputs.values.shape[4]
        num_queries = min(padded(inputs.heads_per_key), MAX_QUERIES)
        num_tiles = pl.cdiv(inputs.heads_per_key, num_queries)
        fills_chip = pl.cdiv(WANTED_PROGRAMS, num_rows * num_key_heads * num_tiles)
        # A few at least, since one request may be far longer than the others.
        wanted = min(max(fills_chip, 4), MAX_SPLITS)
        # Measured on an H200: int8, which is widened before it is multiplied, is 10% faster with
        # fewer threads of more registers.
        is_int8 = inputs.values.dtype == jnp.int8
        return cls(
            block_tokens=32,
            num_splits=min(wanted, pl.cdiv(num_columns * page_size, SPLIT_TOKENS)),
            num_queries=num_queries,
            num_tiles=num_tiles,
            fills_rest=num_tokens == num_rows,
            num_warps=2 if is_int8 else 4,
            num_stages=4 if is_int8 else 5,
        )

    def blocks(self, inputs: Inputs, row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns a request's first block, the one after its last, and how many a split takes."""
        kv_len = decoded_len(inputs, row)
        first = inputs.first_visible(kv_len - 1) // self.block_tokens
        end = pl.cdiv(kv_len, self.block_tokens)
        least = SPLIT_TOKENS // self.block_tokens
        return first, end, jnp.maximum(pl.cdiv(end - first, self.num_splits), least)


def decoded_len(inputs: Inputs, row: jax.Array) -> jax.Array:
    """Returns a decoding request's cached tokens, 0 for other rows."""
    return jnp.where(row < inputs.num_decode[0], inputs.kv_lens[row], 0)


def attend_decode(inputs: Inputs, config: AttentionConfig) -> Float[Array, "T N H"]:
    """Returns the outputs of the first num_decode rows.

    Where T equals B the others are zeros, else whatever the memory held.
    """
    plan = _Plan.make(inputs)
    num_rows, num_key_heads = inputs.kv_lens.shape[0], inputs.values.shape[2]
    _, num_heads, width = inputs.q.shape
    out = jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32)
    partials = Partials(
        *(
            jax.ShapeDtypeStruct((num_rows, num_heads, plan.num_splits, *end), jnp.float32)
            for end in ((), (), (width,))
        )
    )
    is_whole = plan.num_splits == 1
    attended = pl.pallas_call(
        partial(_attend, plan=plan, curve=Curve.make(config)),
        out_shape=out if is_whole else partials,
        grid=(num_key_heads * plan.num_tiles, plan.num_splits, num_rows),
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=config.interpret,
        name="paged_attention_decode",
    )(inputs)
    if is_whole:
        return attended
    return pl.pallas_call(
        partial(_merge, plan=plan),
        out_shape=out,
        grid=(num_heads, num_rows),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=config.interpret,
        name="paged_attention_merge",
    )(inputs, attended)


def _attend(inputs: Inputs, *outputs: Any, plan: _Plan, curve: Curve) -> None:
    """One split of one request, for the queries of a key head or a tile of them.

    `outputs` are those of Partials or, of a single split, the result `[T, N, H]`.
    """
    head, tile = pl.program_id(0) // plan.num_tiles, pl.program_id(0) % plan.num_tiles
    split, row = pl.program_id(1), pl.program_id(2)
    first, end, per_split = plan.blocks(inputs, row)
    start = first + split * per_split
    end = jnp.minimum(start + per_split, end)
    width = inputs.q.shape[2]

    group = tile * plan.num_queries + jnp.arange(plan.num_queries, dtype=jnp.int32)
    query = head * inputs.heads_per_key + group
    is_query = group < inputs.heads_per_key
    column = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
    mask = both(is_query[:, None], within(column, width))

    def attend() -> Softmax:
        q = inputs.queries((row, query[:, None], column), mask, curve)
        reader = BlockReader(inputs, row, head, plan.block_tokens)
        kv_len = decoded_len(inputs, row)
        first_visible = inputs.first_visible(kv_len - 1)

        def block(index: jax.Array, softmax: Softmax) -> Softmax:
            start = index * plan.block_tokens
            position = start + jnp.arange(plan.block_tokens, dtype=jnp.int32)
            visible = (position < kv_len) & (position >= first_visible)
            return softmax.add(q, reader.read(start, visible), visible[None, :], curve)

        nothing = Softmax.start(plan.num_queries, padded(width))
        return jax.lax.fori_loop(start, end, block, nothing)

    if plan.num_splits > 1:
        partials = Partials(*outputs)

        @pl.when(start < end)
        def _() -> None:
            softmax = attend()
            plgpu.store(partials.tops.at[row, query, split], softmax.top, mask=is_query)
            plgpu.store(partials.totals.at[row, query, split], softmax.total, mask=is_query)
            plgpu.store(
                partials.weighted.at[row, query[:, None], split, column],
                softmax.weighted,
                mask=mask,
            )

    else:
        (out_ref,) = outputs

        @pl.when((start < end) | plan.fills_rest)
        def _() -> None:
            softmax = attend()
            sinks = None if inputs.sinks is None else load(inputs.sinks.at[query], is_query)
            plgpu.store(out_ref.at[row, query[:, None], column], softmax.result(sinks), mask=mask)


def _merge(inputs: Inputs, partials: Partials, out_ref: Any, *, plan: _Plan) -> None:
    """Adds up the splits of one query; out_ref is `[T, N, H]`."""
    head, row = pl.program_id(0), pl.program_id(1)
    first, end, per_split = plan.blocks(inputs, row)
    width = inputs.q.shape[2]
    split = jnp.arange(pl.next_power_of_2(plan.num_splits), dtype=jnp.int32)
    has_work = (split < plan.num_splits) & (first + split * per_split < end)

    @pl.when((first < end) | plan.fills_rest)
    def _() -> None:
        column = jnp.arange(padded(width), dtype=jnp.int32)[None, :]
        in_row = within(column, width)
        tops = load(partials.tops.at[row, head, split], has_work)
        tops = jnp.where(has_work, tops, NEVER)
        totals = load(partials.totals.at[row, head, split], has_work)
        weighted = load(
            partials.weighted.at[row, head, split[:, None], column],
            both(has_work[:, None], in_row),
        )
        top = jnp.max(tops)
        shares = jnp.exp2(tops - top)
        softmax = Softmax(
            top.reshape(1),
            jnp.sum(totals * shares).reshape(1),
            jnp.sum(weighted * shares[:, None], axis=0)[None, :],
        )
        sinks = None if inputs.sinks is None else inputs.sinks[head].reshape(1)
        plgpu.store(out_ref.at[row, head, column], softmax.result(sinks), mask=in_row)
